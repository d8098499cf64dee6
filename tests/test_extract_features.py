"""Features of files: batches and long ones, other rates and channels, both formats, stops, and what is refused."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import soundfile
import soxr
import torch

import extract_features
from distillation.data.audio import AudioError
from distillation.data.resampling import AudioFile
from distillation.errors import Incomplete, UserError
from exporting.extraction import Extraction
from exporting.features import FeatureOptions
from exporting.recordings import Recording
from wav2vec2 import Wav2Vec2Model, load_model, save_model, wav2vec2_model


@pytest.fixture(scope="module")
def local_path(tmp_path_factory, tiny_config) -> Path:
    """A model whose state 0 depends on the 400 samples around each frame alone, two frames merged above."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("local") / "model.pth"
    save_model(path, wav2vec2_model(**{**tiny_config, "extractor_mode": "layer_norm", "encoder_time_reduction": 2}))
    return path


def run(model: Path, audio: list[Path], out: Path, layers: str = "last", format: str = "npy", **options: float):
    extract_features.run(str(model), audio, out, FeatureOptions(layers, format, **options), "cpu")


def whole(model: Wav2Vec2Model, path: Path, layer: int) -> torch.Tensor:
    samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    return model.embed(torch.from_numpy(soxr.resample(samples.mean(1), rate, 16_000)), layer)[0]


@pytest.mark.parametrize(("seconds", "rate", "channels"), [(0.05, 16_000, 1), (1.3, 44_100, 2), (3.0, 8_000, 1)])
def test_short_files_are_run_whole(local_path, noise, tmp_path, caplog, seconds, rate, channels):
    caplog.set_level("INFO")
    path = noise(tmp_path / "a.wav", seconds, 0, rate, channels)
    run(local_path, [path], tmp_path / "out", "0,-1")
    features = np.load(tmp_path / "out" / "a.npy")
    model = load_model(local_path)
    for found, layer in zip(features, (0, -1), strict=True):
        np.testing.assert_allclose(found, whole(model, path, layer), atol=2e-5)
    assert ("1 files: resampled from" in caplog.text) == (rate != 16_000)
    assert ("1 files: 2 channels averaged" in caplog.text) == (channels == 2)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.npy", "features.jsonl"]


@pytest.mark.parametrize("rate", [16_000, 44_100, 11_025, 15_991])
@pytest.mark.parametrize("seconds", [5.01, 13.77])
def test_long_files_are_what_they_are_whole(teacher_path, noise, tmp_path, rate, seconds):
    """A model with statistics over time and attention: what is computed at once changes nothing."""
    path = noise(tmp_path / "a.flac", seconds, 1, rate)
    run(teacher_path, [path], tmp_path, "0,2,4", window=2.0)
    for layer, found in zip((0, 2, 4), np.load(tmp_path / "a.npy"), strict=True):
        np.testing.assert_allclose(found, whole(load_model(teacher_path), path, layer), atol=1e-4)


def test_spans_put_every_frame_in_its_place(local_path, noise, tmp_path):
    path = noise(tmp_path / "a.flac", 13.77, 1, 44_100)
    run(local_path, [path], tmp_path, "0", window=2.0, span=5.0, context=1.0)
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), whole(load_model(local_path), path, 0), atol=1e-4)


def test_batches_of_all_lengths(teacher_path, noise, tmp_path):
    durations = [0.05, 1.0, 0.02, 0.31, 2.5, 0.9, 0.05, 4.1, 0.024]
    paths = [noise(tmp_path / "audio" / f"{i}.wav", seconds, i) for i, seconds in enumerate(durations)]
    run(teacher_path, [tmp_path / "audio"], tmp_path / "out", window=3.0)
    model = load_model(teacher_path)
    for path in paths:
        found = np.load(tmp_path / "out" / f"{path.stem}.npy")
        np.testing.assert_allclose(found, whole(model, path, -1), atol=2e-5)


def test_a_file_without_length_is_read_to_its_end(local_path, noise, tmp_path):
    path = noise(tmp_path / "a.flac", 11.3, 1, 44_100)
    expected = whole(load_model(local_path), path, 0)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0  # RFC 9639: 36 bits of STREAMINFO, 0 is unknown
    content[22:26] = bytes(4)
    path.write_bytes(content)
    run(local_path, [path], tmp_path, "0", window=5.0)
    np.testing.assert_allclose(np.load(tmp_path / "a.npy"), expected, atol=1e-4)


def test_merged_frames_are_merged_as_in_the_whole_file(local_path, noise, tmp_path):
    path = noise(tmp_path / "a.wav", 11.3, 2)
    run(local_path, [path], tmp_path, "all", window=5.0, span=6.0, context=1.0)
    features = np.load(tmp_path / "a.npy")
    assert features.shape[0] == 5
    pairs = features[1:, : features.shape[1] // 2 * 2].reshape(4, -1, 2, 24)
    assert np.array_equal(pairs[:, :, 0], pairs[:, :, 1])


@pytest.mark.parametrize("seconds", [(70,), (3, 4, 5, 6, 7.5, 0.1)])
def test_memory_is_bounded_by_the_window(teacher_path, noise, tmp_path, monkeypatch, seconds):
    longest = []
    forward = Wav2Vec2Model.run

    def watch(self, waveforms, *args, **kwargs):
        longest.append(waveforms.numel())
        return forward(self, waveforms, *args, **kwargs)

    monkeypatch.setattr(Wav2Vec2Model, "run", watch)
    paths = [noise(tmp_path / f"{i}.flac", s, 3) for i, s in enumerate(seconds)]
    run(teacher_path, paths, tmp_path, window=8.0)
    assert len(longest) >= min(sum(seconds) / 8, 4) and max(longest) <= 8 * 16_000 + 80


def test_both_formats_hold_the_same(local_path, noise, tmp_path):
    path = noise(tmp_path / "a.wav", 2.0, 4)
    for format in ("npy", "safetensors"):
        run(local_path, [path], tmp_path / format, "all", format)
    tensors = safetensors.torch.load_file(tmp_path / "safetensors" / "a.safetensors")
    assert list(tensors) == [f"layer_{i}" for i in range(5)]
    assert np.array_equal(torch.stack(list(tensors.values())), np.load(tmp_path / "npy" / "a.npy"))


@pytest.mark.parametrize("format", ["npy", "safetensors"])
def test_too_short_for_a_frame(local_path, noise, tmp_path, format, caplog):
    run(local_path, [noise(tmp_path / "a.wav", 0.02, 5)], tmp_path, format=format)
    read = np.load if format == "npy" else lambda path: safetensors.torch.load_file(path)["layer_4"]
    assert read(tmp_path / f"a.{format}").shape == (0, 24)
    assert "too short for a single frame" in caplog.text


def test_the_command_line(local_path, noise, script, tmp_path):
    paths = [noise(tmp_path / f"{name}.flac", 1.0, 6) for name in "ab"]
    script("extract_features.py", local_path, *paths, "--out", tmp_path / "deep" / "out")
    a, b = (np.load(tmp_path / "deep" / "out" / f"{name}.npy") for name in "ab")
    assert a.shape == (49, 24) and np.array_equal(a, b)


def test_segments_of_a_kaldi_folder(teacher_path, noise, tmp_path):
    """Each is an utterance of its own, of the file's samples."""
    path = noise(tmp_path / "rec.flac", 9.0, 3, 44_100)
    (tmp_path / "wav.scp").write_text("rec rec.flac\n")
    (tmp_path / "segments").write_text("s1 rec 1.25 3.5\ns2 rec 2.0 -1\ns3 rec 8.9 9.3\ns4 rec 8.9 9.6\n")
    with pytest.raises(Incomplete, match="1 of 4 files could not be used"):
        run(teacher_path, [tmp_path], tmp_path / "out", window=3.0)
    (line,) = (tmp_path / "out" / "broken.tsv").read_text().splitlines()
    assert line == f"s4 ({path} from 8.9 s)\tholds 9.00 s, wanted 8.9 to 9.6 s"
    samples, rate = soundfile.read(path, dtype="float32")
    samples, model = torch.from_numpy(soxr.resample(samples, rate, 16_000)), load_model(teacher_path)
    for name, begin, end in (("s1", 20_000, 56_000), ("s2", 32_000, None), ("s3", 142_400, None)):
        found = np.load(tmp_path / "out" / f"{name}.npy")
        np.testing.assert_allclose(found, model.embed(samples[begin:end])[0], atol=1e-4)


def test_broken_files_are_left_out_and_listed(teacher_path, noise, tmp_path, caplog):
    """All others are done; mended, the same command does what is left."""
    audio, out = tmp_path / "audio", tmp_path / "out"
    for i in range(6):
        noise(audio / f"{i % 2}" / f"{i}.flac", 0.3, i)
    (audio / "text.wav").write_text("hello")
    cut = noise(audio / "1" / "cut.flac", 4.0, 7)
    content = cut.read_bytes()
    cut.write_bytes(content[: len(content) // 2])  # which only decoding finds
    soundfile.write(audio / "nan.wav", np.full(16_000, np.nan, np.float32), 16_000, "FLOAT")
    (audio / "0" / "phone.m4a").write_bytes(b"x")
    (audio / "0" / "gone.wav").symlink_to(tmp_path / "nowhere.wav")
    for window in (40.0, 2.0):  # in a batch, and as a long one
        folder = out / f"{window}"
        with pytest.raises(Incomplete) as caught:
            run(teacher_path, [audio], folder, window=window)
        assert str(caught.value) == (
            f"5 of 11 files could not be used, all others are done: see {folder / 'broken.tsv'}"
        )
        lines = dict(line.split("\t") for line in (folder / "broken.tsv").read_text().splitlines())
        reasons = {Path(name).name: reason for name, reason in lines.items()}
        assert reasons.keys() == {"text.wav", "cut.flac", "nan.wav", "phone.m4a", "gone.wav"}
        assert reasons["text.wav"] == "Format not recognised" and "lost sync" in reasons["cut.flac"]
        assert reasons["nan.wav"] == "NaN or infinite samples after 0.0 s"
        assert (
            "prepare_data.py --convert" in reasons["phone.m4a"] and reasons["gone.wav"] == "No such file or directory"
        )
        assert len(list(folder.rglob("*.npy"))) == 6
    for name in ("text.wav", "1/cut.flac", "nan.wav", "0/phone.m4a", "0/gone.wav"):
        (audio / name).unlink()
    caplog.set_level("INFO")
    run(teacher_path, [audio], out / "40.0")
    assert not (out / "40.0" / "broken.tsv").exists() and "6 of 6 files were finished before" in caplog.text


@pytest.mark.parametrize("window", [40.0, 1.0])
def test_audio_that_changes_or_goes_while_it_is_read(teacher_path, noise, tmp_path, monkeypatch, window):
    """Its features are not taken for those of what is there later; the other files are done."""
    changed, gone, _ = (noise(tmp_path / "audio" / f"{name}.flac", 2.0, 0) for name in ("changed", "gone", "sound"))
    read = AudioFile.read

    def disturbed(self, begin, end):
        samples = read(self, begin, end)
        if self.path == changed:
            noise(tmp_path / "new.flac", 2.5, 1).replace(changed)
        if self.path == gone:
            gone.unlink(missing_ok=True)
        return samples

    monkeypatch.setattr(AudioFile, "read", disturbed)
    with pytest.raises(Incomplete, match="2 of 3 files"):
        run(teacher_path, [tmp_path / "audio"], tmp_path / "out", window=window)
    assert [path.name for path in (tmp_path / "out").glob("*.npy")] == ["sound.npy"]
    listed = (tmp_path / "out" / "broken.tsv").read_text()
    assert "was changed while it was read" in listed and "No such file or directory" in listed
    monkeypatch.undo()
    run(teacher_path, [tmp_path / "audio"], tmp_path / "out", window=window)
    assert len(np.load(tmp_path / "out" / "changed.npy")) == 124


@pytest.mark.parametrize("window", [40.0, 0.1])
def test_a_name_that_cannot_be_written_is_one_file_s_matter(local_path, noise, tmp_path, window):
    noise(tmp_path / "audio" / "a.flac", 0.2, 0)
    noise(tmp_path / "audio" / f"{'b' * 250}.flac", 0.2, 0)
    (tmp_path / "out" / "c.safetensors").mkdir(parents=True)
    noise(tmp_path / "audio" / "c.flac", 0.2, 0)
    with pytest.raises(Incomplete, match="2 of 3 files"):
        run(local_path, [tmp_path / "audio"], tmp_path / "out", format="safetensors", window=window)
    assert (tmp_path / "out" / "a.safetensors").is_file()
    listed = (tmp_path / "out" / "broken.tsv").read_text()
    assert "File name too long" in listed and "Is a directory" in listed


def test_another_corpus_never_takes_the_place_of_one(local_path, noise, tmp_path):
    paths = [noise(tmp_path / folder / "a.flac", 0.2, i) for i, folder in enumerate(("one", "two"))]
    run(local_path, [tmp_path / "one"], tmp_path / "out")
    assert f"a.npy is of {paths[0]}, and {paths[1]} would take its place" in refusal(
        local_path, [tmp_path / "two"], tmp_path / "out"
    )
    paths[0].unlink()  # moved away: its features are out of date
    run(local_path, [tmp_path / "two"], tmp_path / "out")


def test_what_is_damaged_is_computed_again(local_path, noise, tmp_path):
    path, out = noise(tmp_path / "a.flac", 0.2, 0), tmp_path / "out"
    run(local_path, [path], out)
    good = (out / "a.npy").read_bytes()
    (out / "a.npy").write_bytes(b"")
    (out / ".a.npy.0123.tmp").write_bytes(b"left by a run that was killed")
    run(local_path, [path], out)
    assert (out / "a.npy").read_bytes() == good and not list(out.glob(".*"))
    journal = out / "features.jsonl"
    journal.write_text(journal.read_text().splitlines()[0] + '\n{"key": "a", "value": 5}\n')
    run(local_path, [path], out)
    assert (out / "a.npy").read_bytes() == good


def test_the_exit_code_says_that_files_are_missing(local_path, noise, server, tmp_path):
    paths = [noise(tmp_path / "a.flac", 0.2, 0), tmp_path / "b.wav"]
    paths[1].write_text("hello")
    process = server.run("extract_features.py", local_path, *paths, "--out", tmp_path / "out", code=1)
    assert "b.wav: Format not recognised" in process.stderr
    assert process.error.startswith("error: 1 of 2 files could not be used")


def test_what_the_system_refuses_is_named(local_path, noise, tmp_path):
    """Too few open files allowed is no fault of the audio's, and what cannot be written ends it."""
    path = noise(tmp_path / "a.flac", 0.2, 0)
    extraction = Extraction(load_model(local_path), tmp_path / "out", FeatureOptions(), print)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with path.open() as free:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free.fileno(), hard))
    try:
        with pytest.raises(AudioError) as caught:
            extraction._open(Recording(path))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.reason == "Too many open files"
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        run(local_path, [path], path)


# Stopped and run again


def test_what_is_finished_is_not_computed_again(local_path, noise, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    out, paths = tmp_path / "out", [noise(tmp_path / f"{name}.wav", 0.5, i) for i, name in enumerate("abcd")]
    run(local_path, paths[:3], out)
    first = {name: (out / f"{name}.npy").stat().st_mtime_ns for name in "abc"}
    (out / "b.npy").unlink()
    noise(paths[2], 0.6, 9)
    computed, write = [], Extraction._write
    monkeypatch.setattr(
        Extraction, "_write", lambda self, item, x: (computed.append(item.recording.name), write(self, item, x))[1]
    )
    caplog.clear()
    run(local_path, paths, out)
    assert sorted(computed) == ["b", "c", "d"] and caplog.text.count("1 of 4 files were finished before") == 1
    assert (out / "a.npy").stat().st_mtime_ns == first["a"]
    np.testing.assert_allclose(np.load(out / "c.npy"), whole(load_model(local_path), paths[2], -1), atol=2e-5)
    run(local_path, paths, out)
    assert len(computed) == 3


def test_one_folder_holds_one_kind_of_features(local_path, teacher_path, noise, tmp_path):
    path, other = (noise(tmp_path / f"{name}.wav", 0.5, 0) for name in "ab")
    out = tmp_path / "out"
    run(local_path, [path], out, "-1")  # nothing was there yet
    run(local_path, [other], out, "last")  # the same layer
    before = (out / "features.jsonl").read_bytes()
    for model, options, words in (
        (teacher_path, {}, 'model "'),
        (local_path, {"layers": "0"}, "layers [4] -> [0]"),
        (local_path, {"format": "safetensors"}, 'format "npy" -> "safetensors"'),
        (local_path, {"span": 900.0}, "span 1800.0 -> 900.0"),
    ):
        message = refusal(model, [path], out, **options)
        assert words in message and message.endswith("use another --out"), message
    assert (out / "features.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_stopped_run_goes_on(teacher_path, noise, server, tmp_path, name):
    paths = [noise(tmp_path / f"{i}.wav", 0.2, i) for i in range(8)] + [noise(tmp_path / "long.wav", 60, 9)]
    out, words = tmp_path / "out", ["extract_features.py", teacher_path, *paths, "--window", 1, "--out"]
    process = server.start(*words, out)
    process.until(lambda: list(out.glob(".long.*")))
    process.kill(getattr(signal, name))
    stopped = process.wait()
    assert stopped.code == 75
    assert stopped.error == f"stopped: {name}: the finished files are in {out}; the same command goes on"
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.npy")}
    assert len(kept) == 8 and not list(out.glob(".*"))
    assert "8 of 9 files were finished before" in server.run(*words, out).stderr
    run(teacher_path, paths, tmp_path / "whole", window=4.0)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    for path in paths:
        found, expected = (np.load(folder / f"{path.stem}.npy") for folder in (out, tmp_path / "whole"))
        np.testing.assert_allclose(found, expected, atol=2e-5)


def test_any_number_of_files(local_path, noise, tmp_path):
    """None of them is kept open."""
    paths = [noise(tmp_path / "audio" / f"{i}.wav", 0.03, i) for i in range(60)]
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 20, hard))
    try:
        run(local_path, paths, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(list((tmp_path / "out").glob("*.npy"))) == 60


# What is refused


def refusal(*args, **kwargs) -> str:
    with pytest.raises(UserError) as caught:
        run(*args, **kwargs)
    return str(caught.value)


def test_refusals(local_path, noise, tmp_path):
    path, out = noise(tmp_path / "a.wav", 1.0, 7), tmp_path / "out"
    assert refusal(local_path, [path, tmp_path / "no.wav"], out).endswith("no.wav: No such file or directory")
    assert "layers 0 (the Transformer's input) to 4" in refusal(local_path, [path], out, "5")
    assert "give all, last, or numbers" in refusal(local_path, [path], out, "first")
    assert "needs a context above 0 and a window of at least 3 s" in refusal(
        local_path, [path], out, span=2.0, context=1.0
    )
    with pytest.raises(UserError, match="--device: device 'gpu': no such device"):
        extract_features.run(str(local_path), [path], out, FeatureOptions(), "gpu")
    assert refusal(local_path, [path], out, window=0.0) == "--window 0: must be a number of seconds"
    assert not out.exists()
