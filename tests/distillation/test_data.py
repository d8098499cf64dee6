import itertools
import logging
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from distillation.audio import AudioError, check_audio, read_header
from distillation.data import (
    AudioDataset,
    BatchStream,
    Crop,
    DataConfig,
    Manifest,
    MicroBatch,
    ValidationBatches,
    make_train_loader,
    make_valid_loader,
    plan_epoch,
    select_utterances,
)
from distillation.errors import UserError


def manifest_of(num_frames):
    return Manifest(
        Path("/nowhere"), [f"{i}.flac" for i in range(len(num_frames))], np.array(num_frames, dtype=np.int64)
    )


@pytest.fixture(scope="module")
def manifest():
    """400 utterances of 1 to 20 s, among them the exact limits of the published window."""
    frames = np.random.default_rng(0).integers(16000, 320000, 400)
    frames[:4] = (32000, 31999, 250000, 250001)
    return manifest_of(frames)


CONFIGS = {
    "published": DataConfig(),
    "small batches": DataConfig(seconds_per_batch=16, num_buckets=10),
    "padded": DataConfig(crop=False, seconds_per_batch=40),
    "fixed count": DataConfig(crop=False, utterances_per_batch=7),
    "fixed count, cropped": DataConfig(utterances_per_batch=7),
    "split": DataConfig(long="split", seconds_per_batch=40),
    "split, padded": DataConfig(long="split", crop=False, seconds_per_batch=40),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def take(stream, count):
    return list(itertools.islice(iter(stream), count))


# Selection


def test_limits_are_inclusive(manifest):
    chosen = set(select_utterances(manifest, DataConfig()).index.tolist())
    assert {0, 2} <= chosen and not {1, 3} & chosen
    assert chosen == {i for i, n in enumerate(manifest.num_frames.tolist()) if 32000 <= n <= 250000}


def test_split_covers_every_sample_once_within_the_limits():
    config = DataConfig(long="split", min_frames=400, max_frames=800)
    frames = np.arange(390, 8100)
    selection = select_utterances(manifest_of(frames), config)
    assert selection.num_frames.min() >= 400 and selection.num_frames.max() <= 800
    for index in (10, 410, 411, 412, 1211, 7709):
        rows = selection.index == index
        starts, lengths = selection.start[rows], selection.num_frames[rows]
        assert starts.tolist() == [0, *np.cumsum(lengths)[:-1]]
        assert lengths.sum() == frames[index]
        assert np.ptp(lengths) <= 1
        assert len(lengths) == -(-frames[index] // 800)
    assert np.bincount(selection.index, selection.num_frames)[10:].tolist() == frames[10:].tolist()
    assert not (selection.index < 10).any()


def test_summary_counts_by_hand():
    frames = [16000, 32000, 240000, 320000, 640000]
    summary = select_utterances(manifest_of(frames), DataConfig()).summary
    assert summary == (
        "utterances of 2 to 15.625 s: kept 2 (0.00 h), shorter dropped 1 (0.00 h), longer dropped 2 (0.02 h)"
    )
    summary = select_utterances(manifest_of(frames), DataConfig(long="split")).summary
    assert summary.endswith("longer split into 5 pieces 2 (0.02 h)")


def test_nothing_in_range():
    with pytest.raises(UserError, match=r"none of the 2 utterances .*0\.50 to 20\.00 s.*--data\.min_frames"):
        select_utterances(manifest_of([8000, 320000]), DataConfig())


@pytest.mark.parametrize("flag", ["seconds_per_batch", "valid_seconds_per_batch"])
@pytest.mark.parametrize("crop", [True, False])
def test_batch_shorter_than_an_utterance(manifest, flag, crop):
    config = DataConfig(**{flag: 15.6}, crop=crop)
    with pytest.raises(UserError, match=rf"--data\.{flag} 15\.6 is less than .* 15\.62 s"):
        if flag == "seconds_per_batch":
            BatchStream(select_utterances(manifest, config), config, seed=0)
        else:
            ValidationBatches(select_utterances(manifest, config), config)
    exact = replace(config, **{flag: 15.625})
    BatchStream(select_utterances(manifest, exact), exact, seed=0)


# One epoch


def test_plan_loses_nothing_repeats_nothing_and_stays_inside(manifest, config):
    selection = select_utterances(manifest, config)
    plan = plan_epoch(selection, config, seed=3, epoch=1)
    crops = [crop for batch in plan for crop in batch]
    pieces = {}  # (utterance, start of its piece): length
    for i, start, length in zip(selection.index.tolist(), selection.start.tolist(), selection.num_frames.tolist()):
        pieces.setdefault(i, []).append((start, length))
    assert Counter(crop.index for crop in crops) == Counter(selection.index.tolist())
    used = set()
    for crop in crops:
        inside = [p for p in pieces[crop.index] if p[0] <= crop.start and crop.start + crop.num_frames <= sum(p)]
        assert len(inside) == 1 and (crop.index, inside[0]) not in used
        used.add((crop.index, inside[0]))
        if not config.crop:
            assert (crop.start, crop.num_frames) == inside[0]
    assert len(used) == len(selection.index)


def test_plan_holds_the_budget_and_fills_it(manifest, config):
    selection = select_utterances(manifest, config)
    plan = plan_epoch(selection, config, seed=3, epoch=1)
    sizes = [len(batch) for batch in plan]
    if config.crop:
        assert all(len({crop.num_frames for crop in batch}) == 1 for batch in plan)
    if config.utterances_per_batch:
        assert sorted(sizes)[1:] == [7] * (len(sizes) - 1)
        assert sum(sizes) == len(selection.index)
    else:
        budget = config.seconds_per_batch * 16000
        areas = [len(batch) * max(crop.num_frames for crop in batch) for batch in plan]
        assert max(areas) <= budget
        # Greedy: only the last packed batch may leave room for one more of the longest utterance.
        assert sum(area + 250000 <= budget * 0.9 for area in areas) <= 1


def test_cropped_rows_are_as_long_as_the_shortest_of_their_batch(manifest):
    config = DataConfig()
    for batch in plan_epoch(select_utterances(manifest, config), config, seed=0, epoch=0):
        assert batch[0].num_frames == min(manifest.num_frames[crop.index] for crop in batch)


def test_every_legal_offset_is_drawn_and_no_other():
    config = DataConfig(min_frames=400, max_frames=500, seconds_per_batch=1)
    selection = select_utterances(manifest_of([400, 403]), config)
    offsets = Counter()
    for epoch in range(400):
        (batch,) = plan_epoch(selection, config, seed=0, epoch=epoch)
        offsets.update(crop.start for crop in batch if crop.index == 1)
    assert set(offsets) == {0, 1, 2, 3}
    assert min(offsets.values()) > 60  # 100 expected, standard deviation 9


def test_more_buckets_waste_less(manifest):
    def kept(num_buckets):
        config = DataConfig(num_buckets=num_buckets)
        plan = plan_epoch(select_utterances(manifest, config), config, seed=0, epoch=0)
        return sum(crop.num_frames for batch in plan for crop in batch)

    total = select_utterances(manifest, DataConfig()).num_frames.sum()
    assert kept(1) < 0.5 * total < 0.85 * total < kept(10) < kept(1000)


def test_epochs_and_seeds_differ_and_repeat_exactly(manifest, config):
    selection = select_utterances(manifest, config)

    def plan(seed, epoch, **changes):
        return plan_epoch(selection, replace(config, **changes), seed, epoch)

    assert plan(0, 0) == plan(0, 0)
    assert plan(0, 0) != plan(0, 1)
    assert plan(0, 0) != plan(1, 0)
    assert plan(0, 0, reshuffle="once") == plan(0, 7, reshuffle="once") == plan(0, 0)
    # Not only the order of the batches: who is together changes too.
    assert {frozenset(c.index for c in b) for b in plan(0, 0)} != {frozenset(c.index for c in b) for b in plan(0, 1)}


def test_batches_are_not_in_order_of_length(manifest):
    config = DataConfig(seconds_per_batch=16)
    lengths = [b[0].num_frames for b in plan_epoch(select_utterances(manifest, config), config, seed=0, epoch=0)]
    assert abs(np.corrcoef(lengths, np.arange(len(lengths)))[0, 1]) < 0.3


# The stream


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_ranks_share_one_numbered_stream(manifest, config, world_size):
    selection = select_utterances(manifest, config)
    whole = take(BatchStream(selection, config, seed=5), 200)
    assert [item.number for item in whole] == list(range(200))
    shares = [
        take(BatchStream(selection, config, seed=5, rank=rank, world_size=world_size), 200 // world_size)
        for rank in range(world_size)
    ]
    assert [item for items in zip(*shares) for item in items] == whole


def test_epoch_follows_epoch_without_padding_or_loss(manifest):
    config = DataConfig(seconds_per_batch=16, num_buckets=3)  # few buckets: epochs differ in their number of batches
    selection = select_utterances(manifest, config)
    plans = [plan_epoch(selection, config, seed=0, epoch=epoch) for epoch in range(4)]
    assert len({len(plan) for plan in plans}) > 1
    expected = [(epoch, batch) for epoch, plan in enumerate(plans) for batch in plan]
    stream = BatchStream(selection, config, seed=0)
    items = take(stream, len(expected))
    assert [(stream.epoch_of(item.number), item.crops) for item in items] == expected


@pytest.mark.parametrize("reshuffle", ["every_epoch", "once"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_resume_anywhere_equals_the_tail(manifest, reshuffle, world_size):
    config = DataConfig(seconds_per_batch=80, reshuffle=reshuffle)
    selection = select_utterances(manifest, config)
    whole = take(BatchStream(selection, config, seed=1), 150)
    for start in (0, 1, 5, 23, 24, 25, 77, 120):
        for rank in range(world_size):
            stream = BatchStream(selection, config, seed=1, rank=rank, world_size=world_size, start=start)
            expected = [item for item in whole[start:] if item.number % world_size == rank]
            assert take(stream, len(expected)) == expected


def test_one_batch_on_four_ranks():
    config = DataConfig()
    selection = select_utterances(manifest_of([40000, 41000, 42000]), config)
    streams = [BatchStream(selection, config, seed=0, rank=rank, world_size=4) for rank in range(4)]
    for rank, stream in enumerate(streams):
        items = take(stream, 3)
        assert [item.number for item in items] == [rank, rank + 4, rank + 8]
        assert [stream.epoch_of(item.number) for item in items] == [rank, rank + 4, rank + 8]
        assert all({crop.index for crop in item.crops} == {0, 1, 2} for item in items)


def test_stream_plans_each_epoch_once(manifest, monkeypatch):
    import distillation.batching as batching

    calls = []
    plan = batching.plan_epoch
    monkeypatch.setattr(batching, "plan_epoch", lambda *args: calls.append(args[-1]) or plan(*args))
    config = DataConfig()
    selection = select_utterances(manifest, config)
    num_batches = [len(plan(selection, config, 0, epoch)) for epoch in range(3)]
    take(BatchStream(selection, config, seed=0), sum(num_batches))
    assert calls == [0, 1, 2]


def test_negative_seed(manifest):
    with pytest.raises(UserError, match="seed is -1"):
        BatchStream(select_utterances(manifest, DataConfig()), DataConfig(), seed=-1)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("crop", [True, False])
def test_validation_is_spread_without_duplicates(manifest, world_size, crop):
    config = DataConfig(valid_seconds_per_batch=20, crop=crop)
    selection = select_utterances(manifest, config)
    shares = [ValidationBatches(selection, config, rank=rank, world_size=world_size) for rank in range(world_size)]
    items = [item for share in shares for item in share]
    assert sorted(crop.index for item in items for crop in item.crops) == sorted(selection.index.tolist())
    assert sorted(item.number for item in items) == list(range(len(items)))

    def cost(item):
        return len(item.crops) * max(crop.num_frames for crop in item.crops)

    for share in shares:
        costs = [cost(item) for item in share]
        assert costs == sorted(costs, reverse=True) and costs[0] <= 20 * 16000
        assert list(share) == list(share) and len(share) == len(costs)
    loads = [sum(map(cost, share)) for share in shares]
    assert max(loads) - min(loads) <= 20 * 16000
    if crop:
        assert all(crop.start == 0 for item in items for crop in item.crops)


def test_validation_with_fewer_batches_than_ranks():
    config = DataConfig()
    selection = select_utterances(manifest_of([40000, 41000]), config)
    shares = [list(ValidationBatches(selection, config, rank=rank, world_size=3)) for rank in range(3)]
    assert [len(share) for share in shares] == [1, 1, 1]
    assert [len(share[0].crops) for share in shares] == [2, 0, 0]


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
    flac = bytearray((tmp_path / "x.flac").read_bytes())
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)  # a stream of unknown length
    (tmp_path / "stream.flac").write_bytes(flac)
    (tmp_path / "cut.flac").write_bytes(flac[:30])
    os.mkfifo(tmp_path / "pipe.flac")
    for name, reason in (
        ("stream.flac", "no length"),
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
    expected = take(BatchStream(selection, config, seed=2), 12)
    random_state = torch.get_rng_state()
    for rank, start in ((0, 0), (1, 5)):
        loader = make_train_loader(corpus, config, seed=2, rank=rank, world_size=2, start=start)
        share = [item for item in expected[start:] if item.number % 2 == rank]
        for item, batch in zip(share, loader):
            assert batch.number == item.number
            assert torch.equal(batch.waveforms, torch.stack([expected_crop(crop) for crop in item.crops]))
        with pytest.raises(TypeError):
            len(loader)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_valid_loader_gives_the_same_pass_again(corpus):
    config = DataConfig(valid_seconds_per_batch=5, num_workers=1, crop=False)
    loaders = [make_valid_loader(corpus, config, rank=rank, world_size=2) for rank in range(2)]
    first, second = ([batch.files for loader in loaders for batch in loader] for _ in range(2))
    assert first == second
    assert sorted(itertools.chain(*first)) == [str(corpus.file(k)) for k in range(6)]
    assert sorted(len(loader) for loader in loaders) == [1, 2]


def test_loader_tells_once_what_it_keeps(corpus, caplog):
    caplog.set_level(logging.INFO)
    for rank in range(2):
        make_train_loader(corpus, DataConfig(), seed=0, rank=rank, world_size=2)
    selection = select_utterances(corpus, DataConfig())
    assert [record.message for record in caplog.records] == [f"training data, {selection.summary}"]


def test_auto_workers(corpus, monkeypatch):
    def auto(cores, ranks_per_node=None, world_size=1):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
        return make_train_loader(
            corpus, DataConfig(), seed=0, world_size=world_size, ranks_per_node=ranks_per_node
        ).num_workers

    assert [auto(1), auto(2), auto(6), auto(64)] == [1, 1, 5, 8]
    assert auto(16, world_size=4) == 3
    assert auto(16, world_size=32, ranks_per_node=4) == 3
    assert auto(4, world_size=32) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"min_frames": 399}, "min_frames is 399"),
        ({"max_frames": 31999}, "max_frames is 31999"),
        ({"max_frames": 2**33}, "max_frames is"),
        ({"long": "split", "max_frames": 63999}, "twice min_frames"),
        ({"num_buckets": 0}, "num_buckets is 0"),
        ({"sample_rate": 0}, "sample_rate is 0"),
        ({"seconds_per_batch": 0}, "seconds_per_batch is 0"),
        ({"seconds_per_batch": float("nan")}, "seconds_per_batch is nan"),
        ({"seconds_per_batch": float("inf")}, "seconds_per_batch is inf"),
        ({"valid_seconds_per_batch": -1}, "valid_seconds_per_batch is -1"),
        ({"utterances_per_batch": 0}, "utterances_per_batch is 0"),
        ({"num_workers": -1}, "num_workers is -1"),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(UserError, match=message):
        DataConfig(**changes)
