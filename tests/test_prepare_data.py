import json
import logging
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import prepare_data
from distillation.data import corpus
from distillation.data.conversion import COPIES
from distillation.data.manifest import read_tsv
from distillation.data.preparation import KEPT, Survey, survey

SCRIPT = Path(__file__).parents[1] / "prepare_data.py"


@pytest.fixture
def run(monkeypatch, capsys, caplog):
    """Run the script in this process: what it printed, or with ``code`` 2 its single error line."""
    caplog.set_level(logging.INFO)

    def run_main(*args, code=0):
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, args)])
        caplog.clear()
        if code == 0:
            prepare_data.main()
            return capsys.readouterr().out
        with pytest.raises(SystemExit) as stop:
            prepare_data.main()
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if line.startswith("error: ")]
        assert stop.value.code == code and len(errors) == 1 and captured.err.endswith(f"{errors[0]}\n")
        return captured.out + errors[0]

    return run_main


def write(path, num_frames=4000, rate=16000, channels=1, scale=0.3):
    path.parent.mkdir(parents=True, exist_ok=True)
    sound = scale * np.sin(np.arange(num_frames) / 5)
    soundfile.write(path, np.stack([sound] * channels, 1), rate)


def files(out):
    """All but what is kept for the next try where no list was written."""
    return sorted(path.name for path in out.iterdir() if path.name != KEPT) if out.exists() else []


def read_kept(out):
    return [json.loads(line)["key"] for line in (out / KEPT).read_text().splitlines()[1:]]


@pytest.fixture
def librispeech(tmp_path):
    """A corpus whose root has a misleading name, inside a folder of another misleading name."""
    root = tmp_path / "train-clean-100" / "dev-train"
    parts = ("train-clean-100", "train-clean-360", "train-other-500", "dev-clean", "dev-other", "test-clean")
    for k, part in enumerate(parts):
        for chapter in (2, 1):
            write(root / part / "7" / f"{chapter}" / f"7-{chapter}-dev-clean.flac", 4000 + 100 * k + chapter)
        (root / part / "7" / "1" / "7-1.trans.txt").write_text("train")
        (root / part / "7" / "1" / "._7-1.flac").write_text("not audio")
    return root


def test_librispeech_lists(run, librispeech, tmp_path):
    out = tmp_path / "out"
    run("--data", librispeech, "--out", out)
    assert files(out) == ["train100.tsv", "train960.tsv", "valid.tsv"]
    lists = {name: read_tsv(out / name) for name in files(out)}
    assert all(manifest.root == librispeech for manifest in lists.values())
    assert lists["train100.tsv"].paths == [f"train-clean-100/7/{c}/7-{c}-dev-clean.flac" for c in (1, 2)]
    assert lists["train100.tsv"].num_frames.tolist() == [4001, 4002]
    assert [name.split("/")[0] for name in lists["train960.tsv"].paths] == [
        part for part in ("train-clean-100", "train-clean-360", "train-other-500") for _ in range(2)
    ]
    assert lists["train960.tsv"].num_frames.tolist() == [4001, 4002, 4101, 4102, 4201, 4202]
    assert [name.split("/")[0] for name in lists["valid.tsv"].paths] == ["dev-clean"] * 2 + ["dev-other"] * 2


def test_parent_of_librispeech_with_parts_missing(run, caplog, librispeech, tmp_path):
    parent = tmp_path / "corpora"
    (parent / "LibriSpeech").mkdir(parents=True)
    for part in ("train-clean-100", "dev-other"):
        (parent / "LibriSpeech" / part).symlink_to(librispeech / part)
    (librispeech / "train-clean-100" / "loop").symlink_to(parent / "LibriSpeech" / "train-clean-100")
    run("--data", parent, "--out", tmp_path / "out")
    assert files(tmp_path / "out") == ["train100.tsv", "valid.tsv"]
    assert "train960.tsv is not written" in caplog.text and "no train-clean-360, train-other-500" in caplog.text
    assert len(read_tsv(tmp_path / "out" / "train100.tsv")) == 2
    manifest = read_tsv(tmp_path / "out" / "valid.tsv")
    assert manifest.root == parent / "LibriSpeech" and len(manifest) == 2


def test_librispeech_of_training_parts_alone(run, caplog, tmp_path):
    """Speakers are held out; test parts are never looked at."""
    for part in ("train-clean-100", "test-other"):
        for speaker in range(10):
            for k in range(2):
                write(tmp_path / "data" / part / f"{speaker}" / "1" / f"{k}.flac", 4000 + k)
    write(tmp_path / "data" / "test-other" / "stereo.flac", channels=2)
    args = ("--data", tmp_path / "data", "--valid_fraction", 0.2, "--out")
    run(*args, tmp_path / "out")
    assert files(tmp_path / "out") == list(corpus.layout_of(tmp_path / "data").lists) == ["train100.tsv", "valid.tsv"]
    train, valid = (read_tsv(tmp_path / "out" / name).paths for name in ("train100.tsv", "valid.tsv"))
    speakers = [{name.rsplit("/", 2)[0] for name in names} for names in (train, valid)]
    assert len(train) + len(valid) == 20 and not speakers[0] & speakers[1] and len(speakers[1]) == 2
    assert "held out for validation: 2 of 10 speakers of train-clean-100, as there is no dev-clean or" in caplog.text
    (tmp_path / "data" / "train-clean-100").rename(tmp_path / "data" / "train-other-500")
    run(*args, tmp_path / "other")
    assert files(tmp_path / "other") == list(corpus.layout_of(tmp_path / "data").lists) == ["train.tsv", "valid.tsv"]
    missing = "holds no train-clean-100, train-clean-360"
    assert f"train.tsv is of train-other-500: {tmp_path / 'data'} {missing}" in caplog.text
    (tmp_path / "data" / "train-clean-360").mkdir()
    assert "train-clean-360 holds no audio of its own" in run(*args, tmp_path / "none", code=2)


def test_speakers_are_held_out_whole(run, tmp_path):
    for speaker in range(25):
        for k in range(3):
            write(tmp_path / "data" / "wavs" / f"s{speaker}" / f"{k}.wav", 4000 + 10 * speaker + k)
    for seed in (0, 0, 1):
        run("--data", tmp_path / "data", "--out", tmp_path / f"out{seed}", "--valid_fraction", 0.1, "--seed", seed)
    lists = {
        seed: [read_tsv(tmp_path / f"out{seed}" / f"{name}.tsv") for name in ("train", "valid")] for seed in (0, 1)
    }
    for train, valid in lists.values():
        assert len(train) + len(valid) == 75 and not set(train.paths) & set(valid.paths)
        speakers = [{name.split("/")[1] for name in manifest.paths} for manifest in (train, valid)]
        assert not speakers[0] & speakers[1] and len(speakers[1]) == 2
        assert train.paths == sorted(train.paths)
    assert lists[0][1].paths != lists[1][1].paths


@pytest.mark.parametrize("layout", ["flat", "one folder", "two large folders"])
def test_files_are_held_out_where_folders_cannot(run, tmp_path, layout):
    folders = {"flat": ["."], "one folder": ["a"], "two large folders": ["a", "b"]}[layout]
    for folder in folders:
        for k in range(20):
            write(tmp_path / "data" / folder / f"{k}.wav")
    run("--data", tmp_path / "data", "--out", tmp_path / "out", "--valid_fraction", 0.1)
    train, valid = (read_tsv(tmp_path / "out" / f"{name}.tsv") for name in ("train", "valid"))
    assert len(valid) == 2 * len(folders)
    assert len(train) == 18 * len(folders) and not set(train.paths) & set(valid.paths)


def test_own_validation_folder_and_other_formats(run, tmp_path):
    write(tmp_path / "data" / "a.ogg", 16000)
    write(tmp_path / "data" / "b.FLAC", 5000)
    write(tmp_path / "valid" / "c.wav", 6000)
    run("--data", tmp_path / "data", "--valid", tmp_path / "valid", "--out", tmp_path / "out")
    train, valid = (read_tsv(tmp_path / "out" / f"{name}.tsv") for name in ("train", "valid"))
    assert (train.paths, train.num_frames.tolist()) == (["a.ogg", "b.FLAC"], [16000, 5000])
    assert (valid.root, valid.paths) == (tmp_path / "valid", ["c.wav"])


def test_validation_audio_is_never_trained_on(run, caplog, tmp_path):
    write(tmp_path / "data" / "a.flac")
    write(tmp_path / "data" / "valid" / "b.flac")
    (tmp_path / "data" / "link.flac").symlink_to(tmp_path / "data" / "valid" / "b.flac")
    run("--data", tmp_path / "data", "--valid", tmp_path / "data" / "valid", "--out", tmp_path / "out")
    train, valid = (read_tsv(tmp_path / "out" / f"{name}.tsv") for name in ("train", "valid"))
    assert (train.paths, valid.paths) == (["a.flac"], ["b.flac"]) and "1 files of --data are in --valid" in caplog.text
    args = ("--data", tmp_path / "data", "--valid", tmp_path / "data", "--out", tmp_path / "same")
    assert "train.tsv would be empty" in run(*args, code=2)


@pytest.mark.parametrize(("rate", "channels"), [(22050, 1), (16000, 2)])
def test_other_rates_and_stereo_are_refused(run, tmp_path, rate, channels):
    write(tmp_path / "data" / "a.flac")
    for name in ("c", "b"):
        write(tmp_path / "data" / f"{name}.flac", rate=rate, channels=channels)
    error = run("--data", tmp_path / "data", "--out", tmp_path / "out", "--skip_broken", code=2)
    assert f"{tmp_path / 'data' / 'b.flac'} has {rate} Hz and {channels} channel(s)" in error
    assert "2 of 3 files differ: prepare_data.py --convert FOLDER makes 16 kHz mono copies" in error
    assert files(tmp_path / "out") == []


def test_no_recording_is_in_two_lists(run, tmp_path):
    data = tmp_path / "data"
    for k in range(10):
        write(data / "all" / f"{k}.wav")
        write(data / ".snapshot" / "all" / f"{k}.wav")
    for folder in ("selected", "hard"):
        (data / folder).mkdir()
    (data / "selected" / "3.wav").symlink_to("../all/3.wav")
    (data / "hard" / "4.wav").hardlink_to(data / "all" / "4.wav")
    run("--data", data, "--out", tmp_path / "out", "--valid_fraction", 0.2)
    names = [name for list_ in ("train", "valid") for name in read_tsv(tmp_path / "out" / f"{list_}.tsv").paths]
    assert sorted(names) == [f"all/{k}.wav" for k in range(10)]
    run("--data", data, "--valid", data / "hard", "--out", tmp_path / "own")
    assert "all/4.wav" not in read_tsv(tmp_path / "own" / "train.tsv").paths


def test_copies_are_listed_in_place_of_what_does_not_fit(run, caplog, tmp_path):
    data, out, audio = tmp_path / "data", tmp_path / "out", tmp_path / "out" / "audio"
    for k in range(4):
        write(data / f"{k}.flac", 16000)
    args = ("--data", data, "--out", out, "--convert", audio)
    run(*args)
    assert "all 4 files are 16 kHz mono FLAC or WAV: nothing to convert" in caplog.text and not audio.exists()
    assert read_tsv(out / "train.tsv").root == data
    write(data / "4.wav", 44100 * 36, rate=44100, channels=2)
    assert survey(data) == Survey(5, pytest.approx(0.01 + 4 / 3600), 1, 0.01, 0, 0)
    planned = survey(data).lists
    run(*args)
    size = "1 of 5 files (0.01 of 0.01 h) are converted, copies of about 0.00 GB"
    assert size in caplog.text and f"{audio}: 1 copies of 0.01 h in 0.00 GB, 4 links" in caplog.text
    manifests = [read_tsv(out / f"{name}.tsv") for name in ("train", "valid")]
    assert {manifest.root for manifest in manifests} == {audio}
    for name, manifest in zip(("train.tsv", "valid.tsv"), manifests, strict=True):
        assert np.array_equal(planned[name].num_frames, manifest.num_frames)
    frames = {name: int(n) for manifest in manifests for name, n in zip(manifest.paths, manifest.num_frames)}
    assert frames == {**{f"{k}.flac": 16000 for k in range(4)}, "4.flac": 16000 * 36}
    for folder in (data / "audio", tmp_path, data):
        assert "are inside one another" in run("--data", data, "--out", out, "--convert", folder, code=2)
    assert "--channel left is neither" in run(*args, "--channel", "left", code=2)
    assert "--channel 0 says what copies hold" in run("--data", data, "--out", out, "--channel", 0, code=2)


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()}


@pytest.mark.parametrize("joined", ["an original folder is elsewhere", "a folder of copies is a link", "copies"])
def test_links_do_not_lead_copies_among_originals(run, tmp_path, joined):
    data, disk, audio = tmp_path / "data", tmp_path / "disk", tmp_path / "audio"
    args = ("--data", data, "--out", tmp_path / "out", "--convert", audio)
    for folder in (disk / "clips", data / "own"):
        write(folder / "hi.flac", rate=44100, channels=2)
        write(folder / "ok.flac")
        write(folder / "w.wav", rate=8000)
    if joined == "copies":
        run(*args)
        (data / "again").symlink_to(audio / "own")
    elif joined == "a folder of copies is a link":
        audio.mkdir()
        (audio / "own").symlink_to("../data/own")
    else:
        (data / "clips").symlink_to(disk / "clips")
        args = (*args[:-1], disk)
    before = content(tmp_path)
    assert "are inside one another: copies and originals are to be apart" in run(*args, code=2)
    assert {path: data for path, data in content(tmp_path).items() if path.name != KEPT} == before


def test_names_that_no_list_can_hold(run, tmp_path):
    data, out, audio = tmp_path / "data", tmp_path / "out", tmp_path / "audio"
    for name in ("a.wav", "b.wav", "c\td.wav", "e\nf.wav", "g\udcff.wav"):
        write(data / "x.wav", rate=8000)
        (data / "x.wav").rename(data / name)
    (data / "h\ni.m4a").write_text("")
    args = ("--data", data, "--out", out, "--convert", audio)
    error = run(*args, code=2)
    assert f"{str(data / 'c') + chr(9) + 'd.wav'!r}: name, a tab or line end" in error and not audio.exists()
    assert "no UTF-8, cannot be listed" in error and "(4 such files)" in error and files(out) == []
    run(*args, "--skip_broken")
    assert sorted(path.name for path in audio.iterdir()) == [COPIES, "a.flac", "b.flac"]
    rows = [line.split("\t") for line in (out / "broken.tsv").read_text().splitlines()]
    assert [row[1] for row in rows] == ["name"] * 4 and rows[2][0].endswith(r"g\udcff.wav'")
    assert survey(data).num_unreadable == 4
    assert "--convert" in run(*args[:-1], tmp_path / "a\nb", code=2)


def test_channels_are_looked_for_before_anything_is_converted(run, tmp_path):
    write(tmp_path / "data" / "a.wav", rate=8000, channels=2)
    write(tmp_path / "valid" / "b.wav", rate=8000)
    audio = tmp_path / "audio"
    args = ("--data", tmp_path / "data", "--valid", tmp_path / "valid", "--out", tmp_path / "out", "--convert", audio)
    assert "--channel 1: " in (error := run(*args, "--channel", 1, code=2)) and "b.wav has 1 channel(s)" in error
    assert not audio.exists()
    run(*args, "--channel", 0)
    run(*args, "--channel", "00")


def test_copies_of_own_validation_folder(run, tmp_path):
    write(tmp_path / "data" / "a.wav", rate=8000)
    write(tmp_path / "valid" / "a.wav", rate=8000, channels=2)
    out, audio = tmp_path / "out", tmp_path / "audio"
    run("--data", tmp_path / "data", "--valid", tmp_path / "valid", "--out", out, "--convert", audio, "--channel", 0)
    for name in ("train", "valid"):
        manifest = read_tsv(out / f"{name}.tsv")
        assert (manifest.root, manifest.paths, manifest.num_frames.tolist()) == (audio / name, ["a.flac"], [8000])
    assert survey(tmp_path / "data", tmp_path / "valid").num_converted == 2


def test_broken_originals_are_in_the_table(run, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    for k in range(3):
        write(data / f"{k}.flac", 40000, rate=8000)
    content = (data / "0.flac").read_bytes()
    (data / "1.flac").write_bytes(content[: len(content) // 2])
    args = ("--data", data, "--out", out, "--convert", tmp_path / "audio")
    error = run(*args, code=2)
    assert f"{data / '1.flac'}: unreadable" in error and "--skip_broken" in error and files(out) == []
    printed = run(*args, "--skip_broken")
    assert printed.splitlines()[1].split()[:3] == ["unreadable", "1", "yes"]
    assert files(out) == ["broken.tsv", "train.tsv", "valid.tsv"]
    (data / "1.flac").write_bytes(b"no header")
    (tmp_path / "audio" / "2.flac").unlink()
    run(*args, code=2)
    assert not (tmp_path / "audio" / "2.flac").exists(), "what headers show is said before hours of work"


def test_formats_that_only_ffmpeg_reads_are_named(run, caplog, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    data, out = tmp_path / "data", tmp_path / "out"
    for name in ("b.m4a", "c.wma", "a.m4a"):
        (data / name).parent.mkdir(exist_ok=True)
        (data / name).write_text("")
    kinds = f"3 files are in formats that only ffmpeg reads (2 .m4a, 1 .wma; first {data / 'a.m4a'})"
    error = run("--data", data, "--out", out, code=2)
    assert f"{data} holds nothing else: {kinds}: with ffmpeg installed --convert FOLDER makes copies" in error
    for k in range(2):
        write(data / f"{k}.flac")
    run("--data", data, "--out", out)
    assert f"left out: {kinds}: with ffmpeg" in caplog.text and files(out) == ["train.tsv", "valid.tsv"]
    run("--data", data, "--out", out, "--convert", tmp_path / "audio")
    assert "install ffmpeg and run again" in caplog.text and "nothing to convert" in caplog.text
    assert survey(data).num_foreign == 3


def test_a_stopped_conversion_goes_on(server, tmp_path):
    data, audio = tmp_path / "data", tmp_path / "audio"
    for k in range(2):
        write(data / f"{k}.wav", 8000 * (2 + 60 * k), rate=8000)
    write(data / "long.wav", 44100 * 500, rate=44100)
    words = ["prepare_data.py", "--data", data, "--num_threads", 2, "--out", tmp_path / "out", "--convert", audio]
    process = server.start(*words)
    process.until(lambda: (audio / "1.flac").exists())
    process.kill(signal.SIGTERM)
    stopped = process.wait()
    assert stopped.error == f"stopped: SIGTERM: the finished copies are in {audio}; the same command goes on"
    assert stopped.code == 75 and {"1.flac"} <= {path.name for path in audio.iterdir()} <= {COPIES, "0.flac", "1.flac"}
    made = (audio / "1.flac").stat().st_mtime_ns
    server.run(*words)
    assert (audio / "1.flac").stat().st_mtime_ns == made
    assert sorted(path.name for path in audio.iterdir()) == [COPIES, "0.flac", "1.flac", "long.flac"]


def test_unreadable_files(run, tmp_path):
    for k in range(4):
        write(tmp_path / "data" / f"{k}.flac")
    (tmp_path / "data" / "2.flac").write_text("no audio")
    error = run("--data", tmp_path / "data", "--out", tmp_path / "out", code=2)
    assert f"{tmp_path / 'data' / '2.flac'}: unreadable" in error and "(1 such files)" in error
    assert files(tmp_path / "out") == []
    run("--data", tmp_path / "data", "--out", tmp_path / "out", "--skip_broken")
    listed = [name for list_ in ("train", "valid") for name in read_tsv(tmp_path / "out" / f"{list_}.tsv").paths]
    assert sorted(listed) == ["0.flac", "1.flac", "3.flac"]


def test_check_reports_and_skips_what_cannot_be_used(run, tmp_path):
    data, out = tmp_path / "data", tmp_path / "out"
    for k in range(6):
        write(data / f"{k}.flac", 20000)
    write(data / "silent.flac", scale=0)
    write(data / "clipped.flac", scale=3)
    good = (data / "0.flac").read_bytes()
    (data / "cut.flac").write_bytes(good[: len(good) // 2])
    (data / "text.flac").write_text("no audio")
    soundfile.write(data / "nan.wav", np.full(4000, np.nan, dtype=np.float32), 16000, subtype="FLOAT")
    run("--data", data, "--out", tmp_path / "unchecked", "--skip_broken")  # headers alone do not show it
    assert "cut.flac" in (tmp_path / "unchecked" / "train.tsv").read_text()

    printed = run("--data", data, "--out", out, "--check", code=2)
    assert "5 files have problems" in printed and "the 3 unusable ones" in printed
    assert files(out) == ["broken.tsv"]
    rows = dict(line.split("\t")[:2] for line in (out / "broken.tsv").read_text().splitlines())
    assert rows == {
        f"{data / name}": kind
        for name, kind in {
            "text.flac": "unreadable",
            "clipped.flac": "clipped",
            "cut.flac": "unreadable",
            "nan.wav": "NaN or infinite",
            "silent.flac": "silent",
        }.items()
    }
    table = [line.split()[:2] for line in printed.splitlines()]
    assert ["unreadable", "2"] in table and ["silent", "1"] in table

    kept = read_kept(out)
    assert len(kept) == 9  # what failed is looked at again
    run("--data", data, "--out", out, "--check", "--skip_broken")
    assert not (out / KEPT).exists()
    listed = [name for list_ in ("train", "valid") for name in read_tsv(out / f"{list_}.tsv").paths]
    assert sorted(listed) == [*(f"{k}.flac" for k in range(6)), "clipped.flac", "silent.flac"]
    for name in ("silent.flac", "clipped.flac", "cut.flac", "text.flac", "nan.wav"):
        (data / name).unlink()
    run("--data", data, "--out", out, "--check")
    assert files(out) == ["train.tsv", "valid.tsv"]


def test_what_was_found_is_not_looked_for_again(run, tmp_path, monkeypatch):
    data, out = tmp_path / "data", tmp_path / "out"
    for k in range(4):
        write(data / f"{k}.wav", 20000 + k)
    write(data / "silent.wav", scale=0)
    run("--data", data, "--out", out, "--check", code=2)
    write(data / "1.wav", 30000)
    (data / "2.wav").unlink()
    looked = []
    for name in ("probe", "check_audio"):
        original = getattr(corpus, name)
        monkeypatch.setattr(
            corpus, name, lambda path, *rest, f=original: (looked.append((f.__name__, path.name)), f(path, *rest))[1]
        )
    args = ("--data", data, "--out", out, "--check", "--skip_broken")
    run(*args)
    headers = [("probe", f"{name}.wav") for name in ("0", "1", "3", "silent")]
    assert sorted(looked) == [("check_audio", "1.wav"), *headers]
    manifests = [read_tsv(out / f"{name}.tsv") for name in ("train", "valid")]
    frames = {name: int(n) for manifest in manifests for name, n in zip(manifest.paths, manifest.num_frames)}
    assert frames == {"0.wav": 20000, "1.wav": 30000, "3.wav": 20003, "silent.wav": 4000}
    assert (out / "broken.tsv").read_text().count("\n") == 1 and not (out / KEPT).exists()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_stopped_check_goes_on(server, tmp_path, name):
    data, out = tmp_path / "data", tmp_path / "out"
    write(data / "0.flac", 16000 * 60)
    for k in range(1, 60):
        shutil.copyfile(data / "0.flac", data / f"{k}.flac")
    words = ["prepare_data.py", "--data", data, "--check", "--num_threads", 2, "--out"]
    process = server.start(*words, out)
    process.until(lambda: (out / KEPT).exists())
    process.kill(getattr(signal, name))
    stopped = process.wait()
    kept = f"what was found in the files so far is in {out / KEPT}"
    assert (stopped.code, stopped.error) == (75, f"stopped: {name}: {kept}; the same command goes on")
    assert files(out) == []
    before = read_kept(out)
    assert f"going on after {len(before)} findings" in server.run(*words, out).stderr or not before
    server.run(*words, tmp_path / "whole")
    for name in files(tmp_path / "whole"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert files(out) == ["train.tsv", "valid.tsv"] and not (out / KEPT).exists()


def test_command_line_mistakes(run, tmp_path):
    write(tmp_path / "data" / "a.flac")
    (tmp_path / "none").mkdir()
    data, out = ("--data", tmp_path / "data"), ("--out", tmp_path / "out")
    assert "unrecognized arguments: --bogus" in run(*data, *out, "--bogus", 1, code=2)
    assert "required: out" in run(*data, code=2)
    assert "gone is not a folder" in run("--data", tmp_path / "gone", *out, code=2)
    assert "--valid" in run(*data, *out, "--valid", tmp_path / "gone", code=2)
    assert "holds no audio files" in run("--data", tmp_path / "none", *out, code=2)
    assert "--valid_fraction 1.5" in run(*data, *out, "--valid_fraction", 1.5, code=2)
    assert "use --valid" in run(*data, *out, code=2)
    for rate in (0, -5, 1, 700_000):
        assert f"--sample_rate {rate} is not between" in run(*data, *out, "--sample_rate", rate, code=2)
    assert files(tmp_path / "out") == []
    path = tmp_path / "data" / "a.flac"
    write(tmp_path / "other" / "b.flac")
    assert f"{path}: File exists; this is a file where a folder" in run(
        *data, "--valid", tmp_path / "other", "--out", path, code=2
    )


@pytest.mark.slow
def test_as_a_program(tmp_path):
    for k in range(3):
        write(tmp_path / "data" / f"{k}.flac")
    command = [sys.executable, SCRIPT, "--data", tmp_path / "data", "--out"]
    done = subprocess.run([*command, tmp_path / "out"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and files(tmp_path / "out") == ["train.tsv", "valid.tsv"]
    write(tmp_path / "data" / "stereo.flac", channels=2)
    failed = subprocess.run([*command, tmp_path / "out2"], capture_output=True, text=True, timeout=100)
    assert failed.returncode == 2 and failed.stdout == "" and files(tmp_path / "out2") == []
    assert failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
