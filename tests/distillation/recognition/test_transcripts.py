"""Transcripts: every format of lists, every reason to leave a row out, and what identifies a set."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch

import prepare_data
from distillation.errors import UserError
from distillation.recognition.labels import make_vocabulary
from distillation.recognition.manifests import read_rows
from distillation.recognition.transcripts import (
    ADVICE,
    LEFT_OUT,
    Utterance,
    learnable,
    read_sets,
    report_left_out,
    shortages,
)


@pytest.fixture(scope="module")
def audio(noise, tmp_path_factory) -> Path:
    """a.wav, b.wav and clips/c.flac of 1, 2 and 3 s, and files that cannot be used."""
    folder = tmp_path_factory.mktemp("audio")
    for seconds, name in enumerate(("a.wav", "b.wav", "clips/c.flac"), 1):
        noise(folder / name, seconds, 0)
    noise(folder / "fast.wav", 1, 0, 8_000)
    noise(folder / "stereo.wav", 1, 0, channels=2)
    noise(folder / "short.wav", 0.01, 0)
    (folder / "text.wav").write_text("no audio")
    return folder


def write(folder: Path, content: str | bytes, name: str = "list.tsv") -> Path:
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder / name


def refusal(source: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_sets([source])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def utterances_of(source: Path) -> list[Utterance]:
    return read_sets([source])[0].utterances


def texts(source: Path, **settings) -> list[tuple[str, str]]:
    return [(u.path.name, u.text) for u in read_sets([source], **settings)[0].utterances]


def test_own_lists(audio):
    content = "\ufeffa.wav\thello\u2028big\x85 world\x0b\r\n\nb.wav\t  so   what\r\n".encode()
    assert texts(write(audio, content)) == [("a.wav", "HELLO BIG WORLD"), ("b.wav", "SO WHAT")]
    assert texts(write(audio, "a.wav\tHello"), case="keep") == [("a.wav", "Hello")]
    assert "list.tsv line 2 is not path<TAB>text: 3 columns" in refusal(write(audio, "a.wav\tA\nb.wav\tB\tspeaker\n"))
    assert "list.tsv line 1 is not path<TAB>text" in refusal(write(audio, "a.wav A\n"))
    assert "list.tsv line 1 is not path<TAB>text" in refusal(write(audio, "\tA\n"))
    assert "1 malformed (first" in (message := refusal(write(audio, "a\0\tA\n")))
    assert "names no file: 'a\\x00'" in message and texts(write(audio, "a\0\tA\nb.wav\tB")) == [("b.wav", "B")]
    assert "list.tsv: not UTF-8 text (byte 7)" in refusal(write(audio, b"a.wav\tc\xe9\n"))
    assert "list.tsv: not UTF-8 text (byte 10)" in refusal(write(audio, b"\xef\xbb\xbfa.wav\tc\xe9\n"))
    assert "list.tsv: no transcribed utterance; known are a Kaldi folder" in refusal(write(audio, "\n"))
    assert "nothing.tsv: neither a folder nor a file" in refusal(audio / "nothing.tsv")


def test_languages_of_one_run_are_written_alike(audio):
    train = write(audio, "a.wav\tkisir\nb.wav\tStraße გამარჯობა", "train.tsv")
    valid = write(audio, "a.wav\tk\u0131s\u0131r", "valid.tsv")
    (first, second), (third,) = (found.utterances for found in read_sets([train, valid]))
    assert [first.text, second.text, third.text] == ["K\u0130S\u0130R", "STRAßE გამარჯობა", "KISIR"]
    assert read_sets([train])[0].utterances[0].text == "KISIR"
    assert make_vocabulary([third.text]) == ["<pad>", "|", "I", "K", "R", "S"]


def test_librispeech(audio, tmp_path, noise):
    noise(tmp_path / "1" / "2" / "1-2-0000.flac", 1, 0)
    write(tmp_path / "1" / "2", "1-2-0000 HELLO  WORLD\n1-2-0001 \n1-2-0002 GONE\n", "1-2.trans.txt")
    (found,) = read_sets([tmp_path])
    (utterance,) = found.utterances
    assert utterance[1:4] == (16_000, "HELLO WORLD", 0) and utterance.place.endswith("1-2.trans.txt line 1")
    assert [row.kind for row in found.left_out] == ["empty transcript", "missing audio"]
    assert "no transcribed utterance" in refusal(audio / "clips")


def test_kaldi(audio, tmp_path):
    def row(*lines: str, **files: str) -> list[tuple]:
        for name, content in files.items():
            write(tmp_path, content, name.replace("_", "."))
        write(tmp_path, "\n".join(lines), "text")
        return [(r.path.name, r.text, r.start, r.end, r.fault) for r in read_rows(tmp_path)]

    scp = f"r1 {audio}/a.wav\nr2\t{audio}/b.wav \nr3 {audio}/with a space.wav\n"
    assert row("r1 hello world", "r2  x", "r3", "r4 y", wav_scp=scp, utt2spk="r1 s1\n") == [
        ("a.wav", "hello world", 0.0, None, None), ("b.wav", "x", 0.0, None, None),
        ("with a space.wav", "", 0.0, None, None), ("r4", "y", 0.0, None, ("missing audio", "no r4 in wav.scp")),
    ]  # fmt: skip
    segments = "u1 r2 0.5 1.25\nu2 r2 1.0 -1\nu3 r9 0 1\nu5 r2 0 2.3\nu6 r2 0 2.6\n"
    found = row("u1 one", "u2 two", "u3 three", "u4 four", "u5 five", "u6 six", segments=segments)
    assert found[2:4] == [
        ("u3", "three", 0.0, None, ("missing audio", "no r9 in wav.scp")),
        ("u4", "four", 0.0, None, ("missing audio", "no such line in segments")),
    ]  # fmt: skip
    (kept,) = read_sets([tmp_path])
    assert [u[1:4] for u in kept.utterances] == [
        (12_000, "ONE", 8_000), (16_000, "TWO", 16_000), (32_000, "FIVE", 0)
    ]  # fmt: skip
    assert kept.left_out[2][2:] == ("outside its audio", "samples 0 to 41600 of 32000")
    for bad, reason in {
        "": "is not utterance, recording, start and end",
        "r2 1.0": "is not utterance, recording, start and end, in seconds: r2 1.0",
        "r2 x y": "is not utterance, recording, start and end",
        "r2 1_0 2_0": "is not utterance, recording, start and end",
        "r2 0 inf": "is not utterance, recording, start and end",
        "r2 0 1 0 x": "is not utterance, recording, start and end",
        "r2 0 1 1": "is of channel 1, counted from 0",
        "r2 2 1": "ends before it starts",
        "r2 0 1e300": "end is 1e+300: not a number of seconds",
    }.items():
        write(tmp_path, f"u1 {bad}\nu2 r2 0 1 0", "segments")
        (found,) = read_sets([tmp_path])
        assert [u.text for u in found.utterances] == ["TWO"] and found.left_out[0].kind == "malformed"
        assert f"segments line 1 {reason}" in found.left_out[0].detail
    (tmp_path / "segments").unlink()
    write(tmp_path, f"r1 {audio}/a.wav\nr2 sph2pipe -f wav x.sph |\nr3 not named |\n", "wav.scp")
    write(tmp_path, "r1 one\nr2 two", "text")
    (found,) = read_sets([tmp_path])
    assert [u.text for u in found.utterances] == ["ONE"]
    assert found.left_out[0][2:] == ("made by a command", f"{tmp_path}/wav.scp line 2 is sph2pipe -f wav x.sph |")
    write(tmp_path, "r2 two", "text")
    assert "run the commands of wav.scp" in refusal(tmp_path)
    write(tmp_path, "r1 a.wav\nr1 b.wav\n", "wav.scp")
    assert "wav.scp line 2 has r1 for the second time" in refusal(tmp_path)


def test_common_voice_with_converted_audio(audio, noise, tmp_path):
    lines = ["client_id\tpath\tsentence\tage", "x\tc.mp3\tWie \u201egeht\u201c es?\t", "y\td.mp3\tGut\t", "z\te\tJa\t"]
    source = write(tmp_path, "\n".join(lines))
    assert [row.path for row in read_rows(source)] == [
        tmp_path / "clips" / name for name in ("c.mp3", "d.mp3", "e.mp3")
    ]
    for name in ("c.flac", "c.mp3.flac", "d.flac", "e.mp3", "e.flac"):
        noise(tmp_path / "converted" / name, 1, 0)
    assert [row.path.name for row in read_rows(source, tmp_path / "converted")] == ["c.mp3.flac", "d.flac", "e.mp3"]
    assert texts(source, audio=tmp_path / "converted")[0] == ("c.mp3.flac", "WIE \u201eGEHT\u201c ES?")
    assert "list.tsv line 2 has 3 columns, the first line 4" in refusal(write(tmp_path, f"{lines[0]}\nx\tc.mp3\tA"))


def test_folder_of_relative_paths(audio, tmp_path, caplog):
    source = write(tmp_path, f"a.wav\tA\n{audio}/b.wav\tB\nclips/c.mp3\tC\n")
    assert [row.path for row in read_rows(source, audio)] == [audio / n for n in ("a.wav", "b.wav", "clips/c.flac")]
    assert "--audio" not in caplog.text
    source = write(tmp_path, f"{audio}/b.wav\tB\n")
    assert [row.path for row in read_rows(source, tmp_path)] == [audio / "b.wav"]
    assert f"list.tsv: --audio {tmp_path} changes none of its paths" in caplog.text


@pytest.fixture(scope="module")
def converted(noise, tmp_path_factory) -> tuple[Path, Path]:
    """A folder whose files take their copies' names from each other, behind a link, and its copies."""
    folder = tmp_path_factory.mktemp("converted")
    data = folder / "disk" / "data"
    for seconds, name in enumerate(("a.wav", "a.mp3", "u.mp3", "u.mp3.wav", "in/1-2.wav", "in/1-3.FLAC"), 1):
        noise(data / name, seconds, 0, 16_000 if name in ("a.wav", "in/1-3.FLAC") else 22_050)
    (folder / "data").symlink_to(data)
    words = ["--data", str(folder / "data"), "--convert", str(folder / "out"), "--out", str(folder / "lists")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["prepare_data.py", *words, "--valid_fraction", "0.2"])
        prepare_data.main()
    noise(folder / "out" / "in" / "1-2.wav.flac", 9, 0)  # of an earlier conversion
    return folder / "data", folder / "out"


def seconds_of(source: Path, **settings) -> list[int]:
    return [round(u.num_frames / 16_000) for u in read_sets([source], **settings)[0].utterances]


@pytest.mark.parametrize("absolute", [False, True])
def test_a_row_gets_the_copy_of_the_file_that_it_names(converted, tmp_path, absolute):
    data, out = converted
    names = ["a.wav", "a.mp3", "u.mp3", "u.mp3.wav", "in/1-2.wav", "in/../in/1-3.FLAC"]
    root = f"{data}/" if absolute else ""
    source = write(tmp_path, "\n".join(f"{root}{name}\tA" for name in names))
    assert seconds_of(source, audio=out) == [1, 2, 3, 4, 5, 6]
    scp = "\n".join(f"{n} {root}{name}" for n, name in enumerate(names))
    write(tmp_path, scp, "wav.scp")
    write(tmp_path, "\n".join(f"{n} A" for n in range(6)), "text")
    assert seconds_of(tmp_path, audio=out) == [1, 2, 3, 4, 5, 6]
    inner = write(data / "in", '{"audio_filepath": "1-2.wav", "text": "A"}', "list.json")  # beside its audio
    assert seconds_of(inner, audio=out) == [5]


def test_librispeech_of_any_format_and_its_copies(converted, caplog):
    data, out = converted
    write(data / "in", "1-2 HELLO\n1-3 WORLD\n", "1.trans.txt")
    (found,) = read_sets([data])
    assert [u.text for u in found.utterances] == ["WORLD"] and found.left_out[0].kind == "not 16 kHz mono"
    assert seconds_of(data, audio=out) == seconds_of(data / "in", audio=out) == [5, 6]
    assert "--audio" not in caplog.text


def test_librispeech_folders_are_walked_as_audio_is(noise, tmp_path):
    chapter = tmp_path / "disk" / "1" / "2"
    noise(chapter / "1-2-0000.flac", 1, 0)
    write(chapter, "1-2-0000 HELLO\n/no/file X\n", "1-2.trans.txt")
    write(chapter, b"\xff\xfe", "._1-2.trans.txt")
    root = tmp_path / "root"
    (root / ".trash").mkdir(parents=True)
    write(root / ".trash", "1-2-0000 HELLO\n", "1-2.trans.txt")
    (root / "part").symlink_to(tmp_path / "disk")
    (chapter / "again").symlink_to(tmp_path / "disk")
    (utterance,) = read_sets([root])[0].utterances
    assert utterance.path == root / "part" / "1" / "2" / "1-2-0000.flac"


def test_json_lines(audio):
    rows = [
        {"audio_filepath": "a.wav", "text": "whole\u2028 file", "duration": 1.0001, "speaker": 7},
        {"audio_filepath": str(audio / "b.wav"), "text": "part", "offset": 0.25, "duration": 0.5},
        {"audio_filepath": "clips/c.flac", "text": "rest", "offset": 2, "duration": None},
    ]
    found = utterances_of(write(audio, "\n".join(json.dumps(r, ensure_ascii=False) for r in rows), "list.json"))
    assert [(u.num_frames, u.text, u.start) for u in found] == [
        (16_000, "WHOLE FILE", 0), (8_000, "PART", 4_000), (16_000, "REST", 32_000)
    ]  # fmt: skip
    first = json.dumps(rows[0]) + "\n"
    for bad, reason in {
        '{"audio_filepath": "a.wav", "text"': "is not JSON",
        "[" * 100_000: "is not JSON",
        '["a.wav", "A"]': "is no JSON object",
    }.items():
        assert f"list.json line 2 {reason}" in refusal(write(audio, first + bad, "list.json"))


@pytest.mark.parametrize(
    "bad, kind, detail",
    [
        ({"text": None}, "empty transcript", ""),
        ({"text": 7}, "malformed", "text is 7: not text"),
        ({"text": "\ud83d"}, "malformed", 'text is "\\ud83d": not text'),
        ({"audio_filepath": None}, "malformed", "audio_filepath is null: not text"),
        ({"audio_filepath": ["a.wav"]}, "malformed", 'audio_filepath is ["a.wav"]: not text'),
        ({"audio_filepath": ""}, "malformed", "names no file: ''"),
        ({"offset": -1}, "malformed", "offset is -1: not a number of seconds"),
        ({"offset": True}, "malformed", "offset is true: not a number of seconds"),
        ({"duration": math.nan}, "malformed", "duration is NaN: not a number of seconds"),
        ({"duration": 1e300}, "malformed", "duration is 1e+300: not a number of seconds"),
        ({"duration": "1.5"}, "malformed", 'duration is "1.5": not a number of seconds'),
    ],
)
def test_odd_values_leave_out_their_row_alone(audio, bad, kind, detail):
    good = {"audio_filepath": "a.wav", "text": "A"}
    odd = json.dumps({**good, **bad})
    (found,) = read_sets([write(audio, f"{json.dumps(good)}\n{odd}\n", "list.json")])
    assert [u.text for u in found.utterances] == ["A"]
    ((_, place, *reason),) = found.left_out
    assert place.endswith("list.json line 2") and reason == [kind, detail]
    assert f"1 {kind} (first" in refusal(write(audio, odd, "list.json"))


BAD = {
    "missing audio": ("no.wav\tA", "no.wav: No such file or directory"),
    "unreadable audio": ("text.wav\tA", "text.wav: "),
    "not 16 kHz mono": ("fast.wav\tA", "fast.wav: 8000 Hz, 1 channels"),
    "too short for a frame": ("short.wav\tA", "short.wav: 160 samples"),
    "empty transcript": ("a.wav\t ", "a.wav"),
    "| in the transcript": ("a.wav\tA|B", "a.wav"),
}


@pytest.mark.parametrize("kind", BAD)
def test_where_no_row_can_be_used(audio, kind):
    line, first = BAD[kind]
    message = refusal(write(audio, f"{line}\n{line}\n{BAD['missing audio'][0]}\n"))
    count = 3 if kind == "missing audio" else 2
    assert f"list.tsv: none of its 3 utterances can be used: {count} {kind} (first {audio}/{first}" in message
    assert message.endswith(f"; {ADVICE[kind]}")
    assert kind != "not 16 kHz mono" or "prepare_data.py --convert" in message


def test_rows_left_out_are_named_and_counted(audio, tmp_path, caplog):
    lines = ["a.wav\tGOOD", *(line for line, _ in BAD.values()), "stereo.wav\tA", f"b.wav\t{'TOO LONG ' * 20}"]
    (found,) = read_sets([write(audio, "\n".join(lines))])
    found = learnable(found, lambda samples: samples // 320)
    assert [u.text for u in found.utterances] == ["GOOD"] and found.utterances[0].place.endswith("list.tsv line 1")
    report_left_out([found], tmp_path)
    left_out = [line.split("\t") for line in (tmp_path / LEFT_OUT).read_text().splitlines()]
    kinds = [*BAD, "not 16 kHz mono", "longer than its audio allows"]
    assert [cells[2].split(":")[0] for cells in left_out] == kinds
    assert [cells[1] for cells in left_out] == [f"{audio}/list.tsv line {number}" for number in range(2, 10)]
    assert left_out[-1][2].endswith(": 100 frames for 179 characters, 20 doubled")
    assert f"list.tsv: 8 of 9 left out, see {tmp_path / LEFT_OUT}: 2 not 16 kHz mono (first" in caplog.text
    assert "1 missing audio (first" in caplog.text
    found.left_out.clear()
    report_left_out([found], tmp_path)
    assert not (tmp_path / LEFT_OUT).exists()


def test_ctc_needs_a_frame_per_character_and_one_between_equal_ones():
    def found(text: str, frames: int) -> str:
        return shortages([Utterance(Path("x"), frames, text)], torch.clone)[0]

    assert found("ABAB", 4) == found("AAB", 4) == found("A  A", 5) == ""
    assert found("ABAB", 3) == "3 frames for 4 characters"
    assert found("AAAB", 5) == "5 frames for 4 characters, 2 doubled"


def test_impossible_transcripts_are_refused(audio):
    source = write(audio, f"a.wav\t{'the quick brown fox jumps over the lazy dog and ' * 6}\n")
    (found,) = read_sets([source])
    with pytest.raises(UserError, match=r"none of its 1 utterances can be used: 1 longer than .* 49 frames for 287"):
        learnable(found, lambda samples: (samples - 80) // 320)
