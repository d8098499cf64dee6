"""Mono FLAC copies: what is copied, what is linked, what the copies hold, and what is not made again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import struct
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from distillation.data import conversion
from distillation.data.conversion import COPIES, Copying, convert, copies_of, copy_names, fitting
from distillation.data.corpus import find, read_headers
from distillation.data.manifest import Manifest
from distillation.errors import UserError
from distillation.stopping import Signalled, Stopped
from distillation.training.lock import run_lock

RATE = 16000
FFMPEG = r"""#!/bin/sh
# stands in for ffmpeg: "decodes" x.m4a to x.au, and complains of what is in x.said
for last; do :; done
[ "$1 $2 $3 $4 $last" = "-nostdin -v error -i pipe:1" ] || exit 9
case " $* " in *" -map 0:a:0 -c:a pcm_f32be -f au "*) ;; *) exit 9 ;; esac
[ -z "$(head -c 1)" ] || exit 9
file=${5#file:}
stem=${file%.*}
[ ! -f "$stem.said" ] || cat "$stem.said" >&2
[ -f "$stem.au" ] || exit 183
cat "$stem.au"
exit "$(cat "$stem.code" 2>/dev/null || echo 0)"
"""


@pytest.fixture
def ffmpeg(tmp_path, monkeypatch) -> None:
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text(FFMPEG)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")


def tone(seconds: float = 0.5, rate: int = RATE, frequency: float = 440, level: float = 0.3) -> np.ndarray:
    return (level * np.sin(2 * np.pi * frequency * np.arange(int(seconds * rate)) / rate)).astype(np.float32)


def write(path: Path, *channels: np.ndarray, rate: int = RATE, **options: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.stack(channels, 1), rate, **options)
    return path


def run(data: Path, out: Path, channel: str = "mix", problems: list | None = None) -> Manifest:
    found = find(data, ["."])
    files = read_headers(found.root, found.names, 1, None, [])
    return convert(files, found.foreign, Copying(out, channel, RATE, 2), [] if problems is None else problems)


def read(path: Path) -> np.ndarray:
    info = soundfile.info(str(path))
    assert (info.format, info.subtype, info.samplerate, info.channels) == ("FLAC", "PCM_16", RATE, 1)
    return soundfile.read(path, dtype="float32")[0]


def test_what_fits_is_linked_and_everything_else_copied(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    for name in ("a/1.flac", "a/2.wav", "3.aiff", "4.au", "5.w64", "6.caf"):
        write(data / name, tone())
    write(data / "a" / "44k.mp3", tone(rate=44100), tone(rate=44100), rate=44100)
    write(data / "8k.wav", tone(rate=8000), rate=8000)
    write(data / "16k.ogg", tone())
    write(data / "16k.opus", tone(), format="OGG", subtype="OPUS")
    write(data / "six.flac", *[tone(rate=48000)] * 6, rate=48000)
    before = {path: path.read_bytes() for path in data.rglob("*.*")}
    listed = run(data, out)
    linked = ["3.aiff", "4.au", "5.w64", "6.caf", "a/1.flac", "a/2.wav"]
    assert listed.root == out
    assert listed.paths == sorted([*linked, "16k.ogg.flac", "16k.opus.flac", "8k.flac", "a/44k.flac", "six.flac"])
    for name, frames in zip(listed.paths, listed.num_frames.tolist(), strict=True):
        path = out / name
        assert path.is_symlink() == (name in linked) and soundfile.info(str(path)).frames == frames == RATE // 2
        if not path.is_symlink():
            middle = slice(2000, 6000)  # MP3 and Vorbis are off at their ends
            assert np.abs(read(path) - tone())[middle].max() < 0.02
    assert (out / "a" / "1.flac").readlink() == data / "a" / "1.flac"
    assert {path: path.read_bytes() for path in data.rglob("*.*")} == before


def test_channels(tmp_path):
    """Averaged, or one of them bit for bit."""
    left, right = (np.random.default_rng(0).integers(-32768, 32768, (2, RATE)) / 32768).astype(np.float32)
    write(tmp_path / "data" / "x.wav", left, right)
    run(tmp_path / "data", tmp_path / "mix")
    assert np.abs(read(tmp_path / "mix" / "x.flac") - (left + right) / 2).max() <= 0.5 / 32768
    for channel, expected in (("0", left), ("1", right)):
        run(tmp_path / "data", tmp_path / channel, channel)
        assert np.array_equal(read(tmp_path / channel / "x.flac"), expected)
    write(tmp_path / "data" / "y.wav", left)
    with pytest.raises(UserError, match=r"--channel 1: .*y\.wav has 1 channel"):
        run(tmp_path / "data", tmp_path / "out", "1")


def test_what_is_louder_than_full_scale_is_clipped(tmp_path, caplog):
    caplog.set_level("INFO")
    write(tmp_path / "data" / "loud.wav", tone(level=3, rate=8000), rate=8000, subtype="FLOAT")
    write(tmp_path / "data" / "full.wav", tone(level=0.99, rate=8000), rate=8000, subtype="FLOAT")
    run(tmp_path / "data", tmp_path / "out")
    loud = read(tmp_path / "out" / "loud.flac")
    assert (loud.max(), loud.min()) == (32767 / 32768, -1) and (loud[:9] >= 0).all()  # it never wraps around
    assert "1 copies, first" in caplog.text and "loud.flac" in caplog.text


def test_names_of_copies():
    names = ["s/a.mp3", "s/a.wav", "s/b.ogg", "s/c.mp3", "t/a.mp3", "s/d.mp3", "s/d.ogg"]
    expected = {"s/a.mp3": "s/a.mp3.flac", "s/a.wav": "s/a.wav.flac", "s/b.ogg": "s/b.flac", "s/c.mp3": "s/c.mp3.flac"}
    expected |= {"t/a.mp3": "t/a.flac", "s/d.mp3": "s/d.mp3.flac.flac", "s/d.ogg": "s/d.ogg.flac"}
    for order in (names, names[::-1]):
        assert copy_names(order, ["s/c.flac", "s/d.mp3.flac"]) == expected


def test_names_that_are_taken():
    """By a folder; or by one that differs in case or in how its letters are composed, as some file systems see it."""
    assert copy_names(["z.wav", "z.flac/a.wav"], []) == {"z.wav": "z.wav.flac", "z.flac/a.wav": "z.flac/a.flac"}
    assert copy_names(["z.wav"], ["z.flac/d/a.wav"]) == {"z.wav": "z.wav.flac"}
    assert copy_names(["A.WAV", "a.mp3"], []) == {"A.WAV": "A.WAV.flac", "a.mp3": "a.mp3.flac"}
    assert copy_names(["\u00e9.wav"], ["e\u0301.flac"]) == {"\u00e9.wav": "\u00e9.wav.flac"}


def test_long_names(tmp_path):
    long = "n" * 247
    write(tmp_path / "data" / f"{long}.wav", tone(rate=8000), rate=8000)
    write(tmp_path / "data" / f"{long}.au", tone())
    assert run(tmp_path / "data", tmp_path / "out").paths == [f"{long}.au", f"{long}.flac"]
    write(tmp_path / "data" / f"{long}.mp3", tone())
    with pytest.raises(UserError, match=r"mp3\.flac: a copy's name is longer than 255 bytes: rename the original"):
        run(tmp_path / "data", tmp_path / "out")


def test_long_files_without_length_are_copied(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "LONG_SECONDS", 0.2)
    whole, streamed = (write(tmp_path / f"{name}.flac", tone()) for name in ("whole", "streamed"))
    content = bytearray(streamed.read_bytes())
    content[21:26] = bytes([content[21] & 0xF0, 0, 0, 0, 0])  # the 36 bits of STREAMINFO that say the length
    streamed.write_bytes(content)
    files = read_headers(tmp_path, ["streamed.flac", "whole.flac"], 1, None, [])
    assert [header.num_frames for header in files.headers] == [RATE // 2] * 2
    assert whole.is_file() and fitting(files, RATE) == [False, True]


def test_finished_copies_are_not_made_again(tmp_path, monkeypatch):
    data, out = tmp_path / "data", tmp_path / "out"
    for k in range(4):
        write(data / f"{k}.wav", tone(0.5 + k / 10, rate=8000), rate=8000)
    (data / "4.flac").write_bytes(write(tmp_path / "whole.flac", tone(3, 8000), rate=8000).read_bytes()[:5000])
    first: list = []
    listed = run(data, out, problems=first)
    assert [problem.file for problem in first] == [data / "4.flac"] and listed.paths == [f"{k}.flac" for k in range(4)]
    assert sorted(path.name for path in out.iterdir()) == [COPIES, *listed.paths]

    decoded = []
    decode = conversion.decode
    monkeypatch.setattr(conversion, "decode", lambda path: (decoded.append(path.name), decode(path))[1])
    again: list = []
    assert run(data, out, problems=again).paths == listed.paths and again == first and decoded == ["4.flac"]
    decoded.clear()
    write(data / "1.wav", tone(1, rate=8000), rate=8000)
    (out / "2.flac").unlink()
    (out / "3.flac").write_bytes(b"cut")
    (data / "0.wav").unlink()
    listed = run(data, out, problems=[])
    assert sorted(decoded) == ["1.wav", "2.wav", "3.wav", "4.flac"]
    assert dict(zip(listed.paths, listed.num_frames.tolist())) == {"1.flac": 16000, "2.flac": 11200, "3.flac": 12800}
    with pytest.raises(UserError, match=r'holds copies with other settings \(channel "mix" -> "0"\): name another'):
        run(data, out, "0")
    journal = out / COPIES
    journal.write_text(journal.read_text().replace('"version": 2, ', "", 1))  # keys were whole paths
    with pytest.raises(UserError, match=r"\(version null -> 2\)"):
        run(data, out)


def test_copies_that_nothing_is_the_original_of_are_removed(tmp_path, caplog):
    caplog.set_level("INFO")
    data, out = tmp_path / "data", tmp_path / "out"
    for name in ("broken", "fits", "gone", "named", "stays"):
        write(data / f"{name}.wav", tone(2, rate=8000), rate=8000)
    run(data, out)
    (out / "mine.flac").write_bytes(b"precious")
    (data / "gone.wav").unlink()
    (data / "broken.wav").write_bytes(b"RIFF")
    write(data / "fits.wav", tone())
    write(data / "named.mp3", tone())
    listed = ["fits.wav", "named.mp3.flac", "named.wav.flac", "stays.flac"]
    assert run(data, out).paths == listed
    assert sorted(path.name for path in out.iterdir()) == sorted([COPIES, "mine.flac", *listed])
    assert "4 copies removed" in caplog.text and "going on after 5 copies" in caplog.text
    named = {f"{name}": f"{name}.flac" for name in ("named.mp3", "named.wav")}
    assert copies_of(out) == (data, {**named, "stays.wav": "stays.flac"}) and copies_of(data) is None
    changed = write(data / "stays.wav", tone(3, rate=8000), rate=8000, format="FLAC").read_bytes()
    (data / "stays.wav").write_bytes(changed[: len(changed) // 2])
    assert run(data, out).paths == listed[:-1] and not (out / "stays.flac").exists()


def test_nothing_else_is_overwritten(tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    write(data / "us.a" / "z.wav", tone(rate=8000), rate=8000)
    write(data / "us.a" / "y.wav", tone())
    for name, made in (("z.flac", "file"), ("y.wav", "file"), ("z.flac", "folder"), ("y.wav", "link")):
        path = out / "us.a" / name
        path.parent.mkdir(parents=True)
        if made == "file":
            path.write_text("precious")
        elif made == "folder":
            path.mkdir()
        else:
            path.symlink_to(tmp_path)
        with pytest.raises(UserError, match=f"us.a/{name} was not made by --convert and would be overwritten"):
            run(data, out)
        assert path.is_dir() if made != "file" else path.read_text() == "precious"
        shutil.rmtree(out)
    (out / "us.a").mkdir(parents=True)
    (out / "us.a" / "y.wav").symlink_to("/former/place/us.a/y.wav")
    assert len(run(data, out).paths) == 2


def test_what_a_kill_leaves_behind(tmp_path, monkeypatch):
    """Half-made files go; copies that no line tells of yet are made again."""
    data, out = tmp_path / "data", tmp_path / "out"
    write(data / "sub" / "a.wav", tone(rate=8000), rate=8000)
    with monkeypatch.context() as patch, pytest.raises(KeyError):
        patch.setattr(conversion, "_copies", lambda *_: {}[""])
        run(data, out)
    (out / "sub").mkdir()
    (out / "sub" / "a.flac").write_bytes(b"whole, perhaps")
    (out / "sub" / ".a.flac.4711.tmp").write_bytes(b"half")
    assert copies_of(out) == (data, {})
    assert run(data, out).paths == ["sub/a.flac"] and len(read(out / "sub" / "a.flac")) == RATE // 2
    assert [path.name for path in (out / "sub").iterdir()] == ["a.flac"]
    with run_lock(out, owner=True), pytest.raises(UserError, match="out is in use by process"):
        run(data, out)


def test_audio_that_was_moved(tmp_path, monkeypatch):
    data, out = tmp_path / "data", tmp_path / "out"
    write(data / "a.wav", tone(rate=8000), rate=8000)
    write(data / "b.wav", tone())
    run(data, out)
    moved = data.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r'data .* -> .*write the place as "data" in the first line'):
        run(moved, out)
    journal = out / COPIES
    journal.write_text(journal.read_text().replace(json.dumps(str(data)), json.dumps(str(moved)), 1))
    monkeypatch.setattr(conversion, "decode", None)
    assert run(moved, out).paths == ["a.flac", "b.wav"] and (out / "b.wav").readlink() == moved / "b.wav"


def test_originals_that_cannot_be_decoded(tmp_path):
    data = tmp_path / "data"
    nan = tone(rate=8000)
    nan[1000] = np.nan
    write(data / "nan.wav", nan, rate=8000, subtype="FLOAT")
    write(data / "good.wav", tone(rate=8000), rate=8000)
    good = write(tmp_path / "whole.flac", tone(2, rate=8000), rate=8000).read_bytes()
    (data / "cut.flac").write_bytes(good[: len(good) // 2])
    problems: list = []
    assert run(data, tmp_path / "out", problems=problems).paths == ["good.flac"]
    assert [problem.file.name for problem in problems] == ["cut.flac", "nan.wav"]
    assert problems[1].finding == ("unreadable", "NaN or infinite samples", False)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [COPIES, "good.flac"]


@pytest.mark.parametrize("when", ["linking is not supported", "always"])
def test_links_and_what_replaces_them(tmp_path, monkeypatch, when):
    data, out = tmp_path / "data", tmp_path / "out"
    write(data / "a.wav", tone())
    write(data / "b.wav", tone(rate=8000), rate=8000)

    def refuse(*_: object) -> None:
        raise PermissionError

    if when != "always":
        monkeypatch.setattr(Path, "symlink_to", refuse)
    run(data, out)
    assert (out / "a.wav").is_symlink() == (when == "always") != (out / "a.flac").is_file()
    copies = {"b.wav": "b.flac"} if when == "always" else {"a.wav": "a.flac", "b.wav": "b.flac"}
    assert copies_of(out) == (data, copies)
    original = write(data / "a.wav", tone(rate=8000), rate=8000).read_bytes()
    (data / "b.wav").unlink()
    write(data / "a.flac", tone())
    names = ["a.flac" if when == "always" else "a.flac.flac", "a.wav.flac"]
    assert run(data, out).paths == names
    assert sorted(path.name for path in out.iterdir() if path.suffix == ".flac") == names
    assert (data / "a.wav").read_bytes() == original


def test_too_little_room(tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "GIGABYTES_PER_HOUR", 3600 * 0.07)
    write(tmp_path / "data" / "a.wav", tone(1, rate=8000), rate=8000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=20_000_000))
    with pytest.raises(UserError, match=r"take about 0\.07 GB, and the disk has 0\.02 GB left"):
        run(tmp_path / "data", tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=50_000_000))
    assert run(tmp_path / "data", tmp_path / "out").paths == ["a.flac"]  # pauses take less


def test_a_full_disk_is_named_by_its_own_error(tmp_path, monkeypatch):
    write(tmp_path / "data" / "a.wav", tone(2, rate=8000), rate=8000)
    written = []

    class Full:
        """Takes half of the second piece, as a disk does."""

        def __init__(self, file) -> None:
            self.tell, self.seek, self.file = file.tell, file.seek, file

        def write(self, data) -> int:
            written.append(len(data))
            if len(written) > 2:
                raise OSError(28, "No space left on device")
            return self.file.write(data[: len(data) // 2 if len(written) == 2 else None])

    sink = conversion._Sink
    monkeypatch.setattr(conversion, "_Sink", lambda raw: sink(Full(raw)))
    with pytest.raises(OSError, match="No space left on device") as error:
        run(tmp_path / "data", tmp_path / "out")
    assert error.value.filename == str(tmp_path / "out" / "a.flac")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [COPIES]


def test_a_stop_ends_within_a_file(tmp_path, monkeypatch):
    """Finished copies are kept, also those that are waited for behind the file that is being converted."""
    data, out = tmp_path / "data", tmp_path / "out"
    for k in range(3):
        write(data / f"{k}.wav", tone(0.1 + k, rate=8000), rate=8000)
    decode, going = conversion.decode, threading.Event()

    def endless(path):
        while path.name == "2.wav":
            going.set()
            yield np.zeros((4000, 1), np.float32)
        yield from decode(path)

    def stopped(*arguments, **options):
        for found in remembered(*arguments, **options):
            yield found
            if found[0] == 2:  # the shortest comes last
                assert going.wait(10)
                raise Signalled(signal.SIGTERM)

    remembered = conversion.remembered
    monkeypatch.setattr(conversion, "decode", endless)
    with monkeypatch.context() as patch, pytest.raises(Stopped, match=f"the finished copies are in {out}"):
        patch.setattr(conversion, "remembered", stopped)
        run(data, out)
    assert sorted(path.name for path in out.iterdir()) == [COPIES, "0.flac", "1.flac"]
    assert copies_of(out) == (data, {"0.wav": "0.flac", "1.wav": "1.flac"})


def test_the_bar_is_drawn_by_one_thread(tmp_path, monkeypatch):
    """Stopped by a signal while it holds the bar's lock, it would wait for threads that wait for the lock."""
    drawn = []

    class Bar(conversion.tqdm):
        def update(self, n: float = 1) -> None:
            assert threading.current_thread() is threading.main_thread()
            drawn.append(n)

    monkeypatch.setattr(conversion, "tqdm", Bar)
    hours = 0.0
    for k in range(4):
        write(tmp_path / "data" / f"{k}.wav", tone(4 + k, 8000), rate=8000)
        hours += (4 + k) / 3600
    problems: list = []
    assert len(run(tmp_path / "data", tmp_path / "out", problems=problems).paths) == 4 and not problems
    assert sum(drawn) == pytest.approx(hours)


def test_other_formats_by_ffmpeg(tmp_path, ffmpeg):
    data = tmp_path / "data"
    data.mkdir()
    for name in ("good", "half", "none", "stopped", "text"):
        (data / f"{name}.m4a").write_bytes(bytes(1000))
    for name in ("good", "half"):
        write(data / f"{name}.au", tone(rate=44100), -tone(rate=44100) / 2, rate=44100, subtype="FLOAT")
    (data / "none.au").write_bytes(struct.pack(">4s5I", b".snd", 24, 0xFFFFFFFF, 6, 16000, 1))
    (data / "half.said").write_text("[aac @ 0x55] Input buffer exhausted\n[x @ 0x1] more\n")
    (data / "text.said").write_text("[in#0 @ 0x55] moov atom not found\n")
    (data / "stopped.au").write_bytes(b"")
    (data / "stopped.code").write_text("1")
    found = find(data, ["."])
    assert found.foreign == [f"{name}.m4a" for name in ("good", "half", "none", "stopped", "text")]
    problems: list = []
    copying = Copying(tmp_path / "out", "mix", RATE)
    files = read_headers(data, [], 1, None, [])
    assert convert(files, found.foreign, copying, problems).paths == ["good.flac"]
    assert np.abs(read(tmp_path / "out" / "good.flac") - tone() / 4)[100:-100].max() < 1e-3
    assert {problem.file.stem: problem.finding.detail for problem in problems} == {
        "half": "ffmpeg: Input buffer exhausted",
        "none": "holds no audio",
        "stopped": "ffmpeg: exit code 1",
        "text": "ffmpeg: moov atom not found",
    }
    (data / "half.said").unlink()
    (data / "stopped.code").write_text("255")
    problems.clear()
    assert convert(files, found.foreign, copying, problems).paths == ["good.flac", "half.flac"]
    assert "ffmpeg: exit code 255" in [problem.finding.detail for problem in problems]
    problems.clear()
    assert not convert(files, ["good.m4a"], Copying(tmp_path / "out2", "2", RATE), problems).paths
    assert problems[0].finding.detail == "2 channel(s), no --channel 2, counted from 0"
    program = tmp_path / "bin" / "ffmpeg"
    program.write_text("#!/bin/sh\nkill -9 $$\n")
    with pytest.raises(UserError, match=r"stopped\.m4a: a signal ended ffmpeg"):
        convert(files, ["stopped.m4a"], Copying(tmp_path / "out3", "mix", RATE), [])
