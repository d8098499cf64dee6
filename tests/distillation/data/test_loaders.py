"""Files and loaders: what is read of which file, what is left out, and how a loader resumes."""

import itertools
import logging
import os

import numpy as np
import pytest
import soundfile
import torch

from distillation.data import batching
from distillation.data.audio import AudioError, check_audio, read_header
from distillation.data.batching import BatchStream, Crop, Epoch, MicroBatch, select_utterances
from distillation.data.config import DataConfig
from distillation.data.loaders import AudioDataset, Place, make_train_loader, make_valid_loader
from distillation.data.manifest import Manifest

# Files


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Six sound files of different lengths and formats; sample i of file k is (i % 1000 + k) / 2**15."""
    root = tmp_path_factory.mktemp("corpus")
    names = [f"{k}.{'flac' if k % 2 else 'wav'}" for k in range(6)]
    frames = [32000 + 1000 * k for k in range(6)]
    for k, (name, n) in enumerate(zip(names, frames)):
        soundfile.write(root / name, ((np.arange(n) % 1000 + k) * 3).astype(np.int16), 16000)
    return Manifest(root, names, np.array(frames, dtype=np.int64))


def expected_crop(crop):
    samples = np.arange(crop.start, crop.start + crop.num_frames) % 1000 + crop.index
    return torch.from_numpy(samples * 3 / 2**15).float()


def test_only_the_crop_is_read_exactly(corpus):
    crops = [Crop(k, 100 * k + 7, 5000) for k in range(6)]
    batch = AudioDataset(corpus, 16000)[MicroBatch(42, crops)]
    assert batch.waveforms.dtype == torch.float32 and batch.waveforms.shape == (6, 5000)
    assert torch.equal(batch.waveforms, torch.stack([expected_crop(crop) for crop in crops]))
    assert batch.lengths is None and batch.errors == {} and batch.number == 42
    assert batch.files == [str(corpus.file(k)) for k in range(6)]
    assert batch.seconds == 6 * 5000 / 16000
    assert batch.read_seconds > 0


def test_padded_batch(corpus):
    crops = [Crop(k, 0, int(corpus.num_frames[k])) for k in (2, 5, 0)]
    batch = AudioDataset(corpus, 16000)[MicroBatch(0, crops)]
    assert batch.waveforms.shape == (3, 37000)
    assert batch.lengths.dtype == torch.int64 and batch.lengths.tolist() == [34000, 37000, 32000]
    for row, crop in zip(batch.waveforms, crops):
        assert torch.equal(row[: crop.num_frames], expected_crop(crop))
        assert not row[crop.num_frames :].any()
    assert batch.seconds == (34000 + 37000 + 32000) / 16000
    moved = batch.to("cpu")
    assert torch.equal(moved.waveforms, batch.waveforms) and moved.files == batch.files


@pytest.fixture
def bad_files(tmp_path):
    """One good file and one of each kind that cannot be trained on, with the expected reason."""
    sound = (np.sin(np.arange(40000) / 7) * 9000).astype(np.int16)
    soundfile.write(tmp_path / "good.flac", sound, 16000)
    soundfile.write(tmp_path / "rate.flac", sound, 8000)
    soundfile.write(tmp_path / "stereo.flac", np.stack([sound, sound], 1), 16000)
    soundfile.write(tmp_path / "shorter.flac", sound[:30000], 16000)
    flac = bytearray((tmp_path / "good.flac").read_bytes())
    (tmp_path / "cut.flac").write_bytes(flac[: len(flac) // 2])
    flac[len(flac) // 2] ^= 4
    (tmp_path / "bit.flac").write_bytes(flac)
    (tmp_path / "text.flac").write_text("not audio at all\n" * 9)
    (tmp_path / "empty.flac").write_bytes(b"")
    (tmp_path / "folder.flac").mkdir()
    os.mkfifo(tmp_path / "pipe.flac")
    for name, value in (("nan", np.nan), ("inf", np.inf)):
        wave = (sound / 2**15).astype(np.float32)
        wave[20000] = value
        soundfile.write(tmp_path / f"{name}.wav", wave, 16000, subtype="FLOAT")
    reasons = {
        "good.flac": None,
        "rate.flac": "sample rate 8000 Hz, wanted 16000 Hz",
        "stereo.flac": "2 channels, wanted 1",
        "shorter.flac": "30000 samples, but the list of utterances says more",
        "cut.flac": "flac decoder",
        "bit.flac": "flac decoder",
        "text.flac": "",
        "empty.flac": "",
        "missing.flac": "No such file or directory",
        "folder.flac": "not a regular file",
        "pipe.flac": "not a regular file",
        "nan.wav": "NaN or infinite samples",
        "inf.wav": "NaN or infinite samples",
    }
    return tmp_path, reasons


def test_bad_files_are_left_out_and_named(bad_files):
    root, reasons = bad_files
    names = list(reasons)
    manifest = Manifest(root, names, np.full(len(names), 40000))
    batch = AudioDataset(manifest, 16000)[MicroBatch(0, [Crop(i, 0, 40000) for i in range(len(names))])]
    assert batch.files == [str(root / "good.flac")]
    assert batch.waveforms.shape == (1, 40000) and batch.lengths is None and batch.seconds == 2.5
    assert list(batch.errors) == [str(root / name) for name in names[1:]]
    for error, name in zip(batch.errors.values(), names[1:]):
        assert reasons[name] in error and "\n" not in error and len(error) > 5


def test_batch_without_a_readable_file(bad_files):
    root, _ = bad_files
    dataset = AudioDataset(Manifest(root, ["missing.flac"], np.array([40000])), 16000)
    batch = dataset[MicroBatch(0, [Crop(0, 0, 40000)])]
    assert batch.waveforms.shape == (0, 0) and batch.files == [] and batch.seconds == 0
    assert batch.errors == {str(root / "missing.flac"): "No such file or directory"}


def test_check_names_the_kind(bad_files):
    root, _ = bad_files
    sound = soundfile.read(root / "good.flac", dtype="float32")[0]
    soundfile.write(root / "silent.flac", sound * 1e-4, 16000)
    soundfile.write(root / "clipped.flac", np.clip(sound * 20, -1, 1), 16000)
    kinds = {
        "good.flac": None,
        "cut.flac": "unreadable",
        "bit.flac": "unreadable",
        "missing.flac": "unreadable",
        "pipe.flac": "unreadable",
        "shorter.flac": "length",
        "nan.wav": "NaN or infinite",
        "inf.wav": "NaN or infinite",
        "silent.flac": "silent",
        "clipped.flac": "clipped",
    }
    for name, kind in kinds.items():
        if kind == "unreadable":
            with pytest.raises(AudioError):
                check_audio(root / name, 40000)
            continue
        finding = check_audio(root / name, 40000)
        assert (finding and finding.kind) == kind, name
        assert finding is None or finding.usable == (kind in ("silent", "clipped"))


@pytest.mark.parametrize(("suffix", "rate", "channels"), [("flac", 16000, 1), ("flac", 44100, 2), ("wav", 8000, 2)])
def test_header_agrees_with_libsndfile(tmp_path, suffix, rate, channels):
    path = tmp_path / f"x.{suffix}"
    soundfile.write(path, np.zeros((12345, channels)), rate)
    assert read_header(path) == (12345, rate, channels)
    info = soundfile.info(str(path))
    assert read_header(path) == (info.frames, info.samplerate, info.channels)


def test_header_of_broken_files(tmp_path):
    soundfile.write(tmp_path / "x.flac", np.zeros(1000), 16000)
    soundfile.write(tmp_path / "nothing.wav", np.zeros(0), 16000)
    (tmp_path / "cut.flac").write_bytes((tmp_path / "x.flac").read_bytes()[:30])
    os.mkfifo(tmp_path / "pipe.flac")
    for name, reason in (
        ("nothing.wav", "no audio"),
        ("cut.flac", ""),
        ("gone.flac", "No such file"),
        ("pipe.flac", "not a regular file"),
    ):
        with pytest.raises(AudioError, match=rf"{name}: .*{reason}"):
            read_header(tmp_path / name)


# Loaders


@pytest.mark.parametrize("num_workers", [0, 2])
def test_train_loader_resumes_exactly_with_and_without_workers(corpus, num_workers):
    config = DataConfig(seconds_per_batch=5, num_workers=num_workers)
    selection = select_utterances(corpus, config)
    expected = list(itertools.islice(BatchStream(selection, config, seed=2), 12))
    random_state = torch.get_rng_state()
    for rank, start in ((0, 0), (1, 5)):
        loader = make_train_loader(corpus, config, 2, start, Place(rank, 2))
        share = [item for item in expected[start:] if item.number % 2 == rank]
        for item, batch in zip(share, loader):
            assert batch.number == item.number
            assert torch.equal(batch.waveforms, torch.stack([expected_crop(crop) for crop in item.crops]))
        with pytest.raises(TypeError):
            len(loader)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_record_of_a_loader_resumes_it(corpus, num_workers, monkeypatch):
    """Reading ahead makes no difference to what is recorded."""
    config = DataConfig(seconds_per_batch=5, num_workers=num_workers)
    loader = make_train_loader(corpus, config, 2)
    batches = list(itertools.islice(loader, 12))
    ends = loader.sampler.ends_before(8)
    assert ends and ends == BatchStream(select_utterances(corpus, config), config, seed=2).ends_before(8)
    packed = []
    monkeypatch.setattr(batching, "Epoch", lambda *args: packed.append(args[-1]) or Epoch(*args))
    resumed = make_train_loader(corpus, config, 2, 8, ends=ends)
    for batch, again in zip(batches[8:], resumed):
        assert again.number == batch.number and again.files == batch.files
        assert torch.equal(again.waveforms, batch.waveforms)
    assert packed[0] == len(ends)


def test_valid_loader_gives_the_same_pass_again(corpus):
    config = DataConfig(valid_seconds_per_batch=5, num_workers=1, crop=False)
    loaders = [make_valid_loader(corpus, config, Place(rank, 2)) for rank in range(2)]
    first, second = ([batch.files for loader in loaders for batch in loader] for _ in range(2))
    assert first == second
    assert sorted(itertools.chain(*first)) == [str(corpus.file(k)) for k in range(6)]
    assert sorted(len(loader) for loader in loaders) == [1, 2]


def test_loader_tells_once_what_it_keeps(corpus, caplog):
    caplog.set_level(logging.INFO)
    for rank in range(2):
        make_train_loader(corpus, DataConfig(), 0, place=Place(rank, 2))
    selection = select_utterances(corpus, DataConfig())
    assert [record.message for record in caplog.records] == [f"training data, {selection.summary}"]


def test_auto_workers(corpus, monkeypatch):
    def auto(cores, ranks_per_node=1, world_size=1):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
        place = Place(world_size=world_size, ranks_per_node=ranks_per_node)
        return make_train_loader(corpus, DataConfig(), 0, place=place).num_workers

    assert [auto(1), auto(2), auto(6), auto(64)] == [1, 1, 5, 8]
    assert auto(16, world_size=4, ranks_per_node=4) == 3
    assert auto(16, world_size=32, ranks_per_node=4) == 3
    assert auto(4, world_size=32, ranks_per_node=32) == 1
