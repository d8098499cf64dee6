"""Features of files: long ones in windows, other rates and channels, both formats, and what is refused."""

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
from distillation.errors import UserError
from exporting.features import FeatureOptions
from wav2vec2 import Wav2Vec2Model, load_model, save_model, wav2vec2_model
from wav2vec2.windows import make_windows


@pytest.fixture(scope="module")
def local_path(tmp_path_factory, tiny_config) -> Path:
    """A model whose state 0 depends on the 400 samples around each frame alone, two frames merged above."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("local") / "model.pth"
    save_model(path, wav2vec2_model(**{**tiny_config, "extractor_mode": "layer_norm", "encoder_time_reduction": 2}))
    return path


def run(model: Path, audio: list[Path], out: Path, layers: str = "last", format: str = "npy", window: float = 40.0):
    extract_features.run(str(model), audio, out, FeatureOptions(layers, format, window, 1.0), "cpu")


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
    assert ("resampled from" in caplog.text) == (rate != 16_000)
    assert ("2 channels averaged" in caplog.text) == (channels == 2)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["a.npy", "features.jsonl"]


@pytest.mark.parametrize("rate", [16_000, 44_100, 11_025, 15_991])
@pytest.mark.parametrize("seconds", [5.01, 9.0, 13.77])
def test_windows_put_every_frame_in_its_place(local_path, noise, tmp_path, rate, seconds):
    path = noise(tmp_path / "a.flac", seconds, 1, rate)
    run(local_path, [path], tmp_path, "0", window=5.0)
    features, expected = np.load(tmp_path / "a.npy"), whole(load_model(local_path), path, 0)
    assert features.shape == tuple(expected.shape)
    np.testing.assert_allclose(features, expected, atol=1e-4)


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
    run(local_path, [path], tmp_path, "all", window=5.0)
    features = np.load(tmp_path / "a.npy")
    assert features.shape[0] == 5
    pairs = features[1:, : features.shape[1] // 2 * 2].reshape(4, -1, 2, 24)
    assert np.array_equal(pairs[:, :, 0], pairs[:, :, 1])


@pytest.mark.parametrize("seconds", [4.9, 5.1, 40.0, 61.234, 600.0])
@pytest.mark.parametrize("reduction", [1, 2, 3])
def test_windows_cover_every_frame_once_with_context(tiny_config, seconds, reduction):
    model = wav2vec2_model(**{**tiny_config, "encoder_time_reduction": reduction})
    num_samples = int(seconds * 16_000)
    windows = make_windows(model, num_samples, 12.0, 1.0)
    num_frames = int(model.output_length(torch.tensor([num_samples])))
    kept = [frame for window in windows for frame in range(window.first, window.last)]
    assert kept == list(range(num_frames))
    for window in windows:
        assert window.end - window.begin <= 12 * 16_000
        assert window.begin == 0 or window.first * 320 - window.begin >= 16_000
        assert window.end == num_samples or window.end - window.last * 320 >= 16_000
        assert window.begin % 16_000 == 0 and window.begin % (320 * reduction) == 0


def test_memory_is_bounded_by_the_window(local_path, noise, tmp_path, monkeypatch):
    longest = []
    extract = Wav2Vec2Model.extract_features

    def watch(self, waveforms, *args, **kwargs):
        longest.append(waveforms.numel())
        return extract(self, waveforms, *args, **kwargs)

    monkeypatch.setattr(Wav2Vec2Model, "extract_features", watch)
    run(local_path, [noise(tmp_path / "a.flac", 70, 3)], tmp_path, window=8.0)
    assert len(longest) >= 11 and max(longest) <= 8 * 16_000


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


# Stopped and run again


def test_what_is_finished_is_not_computed_again(local_path, noise, tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    out, paths = tmp_path / "out", [noise(tmp_path / f"{name}.wav", 0.5, i) for i, name in enumerate("abcd")]
    run(local_path, paths[:3], out)
    first = {name: (out / f"{name}.npy").stat().st_mtime_ns for name in "abc"}
    (out / "b.npy").unlink()
    noise(paths[2], 0.6, 9)
    computed, write = [], extract_features.write_features
    monkeypatch.setattr(
        extract_features, "write_features", lambda *args: (computed.append(args[2].name), write(*args))[1]
    )
    caplog.clear()
    run(local_path, paths, out)
    assert computed == ["b.npy", "c.npy", "d.npy"] and caplog.text.count("1 of 4 files were finished before") == 1
    assert (out / "a.npy").stat().st_mtime_ns == first["a"]
    np.testing.assert_allclose(np.load(out / "c.npy"), whole(load_model(local_path), paths[2], -1), atol=2e-5)
    run(local_path, paths, out)
    assert len(computed) == 3


def test_one_folder_holds_one_kind_of_features(local_path, teacher_path, noise, tmp_path):
    path, other = (noise(tmp_path / f"{name}.wav", 0.5, 0) for name in "ab")
    out = tmp_path / "out"
    assert refusal(local_path, [path, tmp_path / "no.wav"], out).endswith("No such file or directory")
    run(local_path, [path], out, "-1")  # nothing was there yet
    run(local_path, [other], out, "last")  # the same layer
    before = (out / "features.jsonl").read_bytes()
    for model, options, words in (
        (teacher_path, {}, 'model "'),
        (local_path, {"layers": "0"}, "layers [4] -> [0]"),
        (local_path, {"format": "safetensors"}, 'format "npy" -> "safetensors"'),
        (local_path, {"window": 30.0}, "window 40.0 -> 30.0"),
    ):
        message = refusal(model, [path], out, **options)
        assert words in message and message.endswith("use another --out"), message
    assert (out / "features.jsonl").read_bytes() == before


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_stopped_run_goes_on(local_path, noise, server, tmp_path, name):
    paths = [noise(tmp_path / f"{i}.wav", 0.2, i) for i in range(8)] + [noise(tmp_path / "long.wav", 60, 9)]
    out, words = tmp_path / "out", ["extract_features.py", local_path, *paths, "--window", 4, "--context", 1, "--out"]
    process = server.start(*words, out)
    process.until(lambda: list(out.glob(".long.*")))
    process.kill(getattr(signal, name))
    stopped = process.wait()
    assert stopped.code == 75
    assert stopped.error == f"stopped: {name}: the finished files are in {out}; the same command goes on"
    kept = {path.name: path.stat().st_mtime_ns for path in out.glob("*.npy")}
    assert len(kept) == 8 and not list(out.glob(".*"))
    assert "8 of 9 files were finished before" in server.run(*words, out).stderr
    run(local_path, paths, tmp_path / "whole", window=4.0)
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == kept
    for path in paths:
        assert (out / f"{path.stem}.npy").read_bytes() == (tmp_path / "whole" / f"{path.stem}.npy").read_bytes()


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
    path = noise(tmp_path / "a.wav", 1.0, 7)
    out = tmp_path / "out"
    (tmp_path / "text.wav").write_text("hello")
    assert refusal(local_path, [tmp_path / "no.wav"], out).endswith("no.wav: No such file or directory")
    assert refusal(local_path, [path, tmp_path / "text.wav"], out).endswith("text.wav: Format not recognised")
    other = noise(tmp_path / "other" / "a.flac", 1.0, 7)
    assert "would both become" in refusal(local_path, [path, other], out)
    assert "layers 0 (the Transformer's input) to 4" in refusal(local_path, [path], out, "5")
    assert "give all, last, or numbers" in refusal(local_path, [path], out, "first")
    long = noise(tmp_path / "long.wav", 4.0, 8)
    assert "needs a context above 0 and a window of at least 3 s" in refusal(local_path, [path, long], out, window=2.0)
    assert not list(out.glob("*.npy"))
    nan = tmp_path / "nan.wav"
    soundfile.write(nan, np.full(16_000, np.nan, np.float32), 16_000, "FLOAT")
    assert refusal(local_path, [nan], out).endswith("nan.wav: NaN or infinite samples after 0.0 s")
    assert [path.name for path in out.iterdir()] == ["features.jsonl"]
