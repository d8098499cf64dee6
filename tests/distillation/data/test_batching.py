"""Batches: what is selected, one epoch's plan, the stream over epochs and ranks, and the settings."""

import itertools
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distillation.data import batching
from distillation.data.batching import BatchStream, Epoch, ValidationBatches, select_utterances
from distillation.data.config import DataConfig
from distillation.data.manifest import Manifest, read_tsv, write_tsv
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
    "long cropped": DataConfig(long="crop", seconds_per_batch=40),
    "long cropped, padded": DataConfig(long="crop", crop=False, seconds_per_batch=15.625, num_buckets=10),
}


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def take(stream, count):
    return list(itertools.islice(iter(stream), count))


@pytest.fixture
def packed(monkeypatch):
    """Numbers of the epochs that streams pack from now on."""
    epochs = []
    monkeypatch.setattr(batching, "Epoch", lambda *args: epochs.append(args[-1]) or Epoch(*args))
    return epochs


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


@pytest.mark.parametrize("padded", [True, False])
def test_long_utterances_are_cropped_anywhere_and_anew(padded):
    """Where a stretch of a long one starts is drawn from the first to the last that fits, in every epoch."""
    config = DataConfig(long="crop", min_frames=400, max_frames=800, utterances_per_batch=3, crop=not padded)
    frames = [399, 400, 700, 800, 803, 5000]
    selection = select_utterances(manifest_of(frames), config)
    assert selection.index.tolist() == [1, 2, 3, 4, 5] and selection.spare.tolist() == [0, 0, 0, 3, 4200]
    starts = {i: set() for i in selection.index.tolist()}
    for epoch in range(200):
        for crop in itertools.chain(*Epoch(selection, config, seed=0, epoch=epoch)):
            assert crop.num_frames == min(frames[crop.index], 800) if padded else crop.num_frames <= 800
            assert crop.start >= 0 and crop.start + crop.num_frames <= frames[crop.index]
            starts[crop.index].add(crop.start)
    if padded:
        assert starts[4] == {0, 1, 2, 3} and all(starts[i] == {0} for i in (1, 2, 3))
    assert len(starts[5]) > 150 and min(starts[5]) < 100 and max(starts[5]) > 4100
    (batch,) = ValidationBatches(selection, config)
    assert all(crop.start == 0 and crop.num_frames <= 800 for crop in batch.crops)
    assert selection.summary.endswith("longer cropped 2 (0.00 h)")


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
    plan = Epoch(selection, config, seed=3, epoch=1)
    crops = [crop for batch in plan for crop in batch]
    pieces = {}  # (utterance, start of its piece): length
    lengths = (selection.num_frames + selection.spare).tolist()
    for i, start, length in zip(selection.index.tolist(), selection.start.tolist(), lengths):
        pieces.setdefault(i, []).append((start, length))
    assert Counter(crop.index for crop in crops) == Counter(selection.index.tolist())
    used = set()
    for crop in crops:
        inside = [p for p in pieces[crop.index] if p[0] <= crop.start and crop.start + crop.num_frames <= sum(p)]
        assert len(inside) == 1 and (crop.index, inside[0]) not in used
        used.add((crop.index, inside[0]))
        if not config.crop and config.long != "crop":
            assert (crop.start, crop.num_frames) == inside[0]
    assert len(used) == len(selection.index)


def plan_step_by_step(selection, config, seed, epoch):
    """What `Epoch` must give, one utterance after the other."""
    random = np.random.default_rng((seed, 0 if config.reshuffle == "once" else epoch))
    lengths = selection.num_frames
    bucket = (lengths - lengths.min()) * config.num_buckets // (lengths.max() - lengths.min() + 1)
    order = np.lexsort((random.random(len(lengths)), bucket)).tolist()
    batches = [[]]
    for i in order:
        grown = [*lengths[batches[-1]].tolist(), int(lengths[i])]
        if config.utterances_per_batch:
            full = len(grown) > config.utterances_per_batch
        else:
            full = (sum(grown) if config.crop else max(grown) * len(grown)) > config.seconds_per_batch * 16000
        batches[-1:] = [batches[-1], [i]] if full else [[*batches[-1], i]]
    start, kept = selection.start[order], lengths[order]
    if selection.spare.any():
        start = start + random.integers(0, selection.spare[order], endpoint=True)
    if config.crop:
        kept = np.concatenate([np.full(len(batch), lengths[batch].min()) for batch in batches])
        start = start + random.integers(0, lengths[order] - kept, endpoint=True)
    crops = zip(selection.index[order].tolist(), start.tolist(), kept.tolist())
    batches = [list(itertools.islice(crops, len(batch))) for batch in batches]
    return [batches[i] for i in random.permutation(len(batches))]


@pytest.mark.parametrize(
    "changes", [{}, {"num_buckets": 1}, {"num_buckets": 100_000}, {"reshuffle": "once"}], ids=lambda c: "".join(c)
)
def test_plan_is_that_of_packing_step_by_step(manifest, config, changes):
    config = replace(config, **changes)
    selection = select_utterances(manifest, config)
    assert list(Epoch(selection, config, 5, 3)) == plan_step_by_step(selection, config, 5, 3)


def test_equal_draws_keep_their_order():
    draws = np.random.default_rng(0).integers(0, 50, 2000) / 50
    for values in (draws, draws[:1], np.unique(draws)[::-1]):
        assert batching._stable_argsort(values).tolist() == sorted(range(len(values)), key=lambda i: values[i])


def test_plan_holds_the_budget_and_fills_it(manifest, config):
    selection = select_utterances(manifest, config)
    plan = Epoch(selection, config, seed=3, epoch=1)
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
    for batch in Epoch(select_utterances(manifest, config), config, seed=0, epoch=0):
        assert batch[0].num_frames == min(manifest.num_frames[crop.index] for crop in batch)


def test_every_legal_offset_is_drawn_and_no_other():
    config = DataConfig(min_frames=400, max_frames=500, seconds_per_batch=1)
    selection = select_utterances(manifest_of([400, 403]), config)
    offsets = Counter()
    for epoch in range(400):
        (batch,) = Epoch(selection, config, seed=0, epoch=epoch)
        offsets.update(crop.start for crop in batch if crop.index == 1)
    assert set(offsets) == {0, 1, 2, 3}
    assert min(offsets.values()) > 60  # 100 expected, standard deviation 9


def test_more_buckets_waste_less(manifest):
    def kept(num_buckets):
        config = DataConfig(num_buckets=num_buckets)
        plan = Epoch(select_utterances(manifest, config), config, seed=0, epoch=0)
        return sum(crop.num_frames for batch in plan for crop in batch)

    total = select_utterances(manifest, DataConfig()).num_frames.sum()
    assert kept(1) < 0.5 * total < 0.85 * total < kept(10) < kept(1000)


def test_epochs_and_seeds_differ_and_repeat_exactly(manifest, config):
    selection = select_utterances(manifest, config)

    def plan(seed, epoch, **changes):
        return list(Epoch(selection, replace(config, **changes), seed, epoch))

    assert plan(0, 0) == plan(0, 0)
    assert plan(0, 0) != plan(0, 1)
    assert plan(0, 0) != plan(1, 0)
    assert plan(0, 0, reshuffle="once") == plan(0, 7, reshuffle="once") == plan(0, 0)
    # Not only the order of the batches: who is together changes too.
    assert {frozenset(c.index for c in b) for b in plan(0, 0)} != {frozenset(c.index for c in b) for b in plan(0, 1)}


def test_batches_are_not_in_order_of_length(manifest):
    config = DataConfig(seconds_per_batch=16)
    lengths = [b[0].num_frames for b in Epoch(select_utterances(manifest, config), config, seed=0, epoch=0)]
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
    plans = [Epoch(selection, config, seed=0, epoch=epoch) for epoch in range(4)]
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


def test_stream_packs_each_epoch_once(manifest, packed):
    config = DataConfig()
    selection = select_utterances(manifest, config)
    num_batches = [len(Epoch(selection, config, 0, epoch)) for epoch in range(3)]
    take(BatchStream(selection, config, seed=0), sum(num_batches))
    assert packed == [0, 1, 2]


def test_epochs_of_one_length_are_not_packed_to_be_counted(manifest, packed):
    config = DataConfig(utterances_per_batch=7)
    selection = select_utterances(manifest, config)
    stream = BatchStream(selection, config, seed=0)
    assert stream.first_of(50) == 50 * len(Epoch(selection, config, 0, 9)) and packed == []
    config = DataConfig(seconds_per_batch=16, num_buckets=3, reshuffle="once")
    stream = BatchStream(selection, config, seed=0)
    assert stream.first_of(50) == 50 * len(Epoch(selection, config, 0, 9)) and packed == [0]


@pytest.mark.parametrize("reshuffle", ["every_epoch", "once"])
@pytest.mark.parametrize("world_size", [1, 3])
def test_resume_with_recorded_ends_packs_no_earlier_epoch(manifest, config, reshuffle, world_size, packed):
    config = replace(config, reshuffle=reshuffle)
    selection = select_utterances(manifest, config)
    lengths = [len(Epoch(selection, config, 1, epoch)) for epoch in range(6)]
    ends = np.cumsum(lengths).tolist()
    whole = take(BatchStream(selection, config, seed=1), ends[-1])
    recorder = BatchStream(selection, config, seed=1, world_size=world_size)
    for start in (0, 1, ends[0] - 1, ends[0], ends[0] + 1, ends[3] - 1, ends[3], ends[3] + 1, ends[4]):
        record = recorder.ends_before(start)
        assert record == [end for end in ends if end <= start]
        for rank in range(world_size):
            expected = [item for item in whole[start:] if item.number % world_size == rank][: lengths[-1]]
            packed.clear()
            stream = BatchStream(selection, config, seed=1, rank=rank, world_size=world_size, start=start, ends=record)
            assert take(stream, len(expected)) == expected
            assert min(packed) >= (len(record) if reshuffle == "every_epoch" else 0)
            # What is recorded next does not depend on the resumption.
            assert stream.ends_before(ends[-1]) == ends


def test_recorded_ends_do_not_depend_on_how_far_the_stream_was_read(manifest, config):
    selection = select_utterances(manifest, config)
    far = BatchStream(selection, config, seed=0)
    take(far, 200)
    for number in range(0, 150, 7):
        near = BatchStream(selection, config, seed=0)
        assert near.ends_before(number) == far.ends_before(number)
        # A record is part of a checkpoint: plain, and the stream's own list stays as it is.
        assert all(type(end) is int for end in near.ends_before(number))
        near.ends_before(number).append(-1)
        assert near.ends_before(number) == far.ends_before(number)


@pytest.mark.parametrize(
    "ends", [[0], [-3], [5, 5], [30, 20], [True], [20.0], ["20"], [None], [np.int64(20)], [20, 10**9]], ids=repr
)
def test_damaged_record_of_ends_costs_time_only(manifest, caplog, ends):
    config = DataConfig(seconds_per_batch=80)
    selection = select_utterances(manifest, config)
    stream = BatchStream(selection, config, seed=1, start=70, ends=ends)
    assert "the recorded ends of epochs are damaged" in caplog.text and repr(ends[-1]) in caplog.text
    assert take(stream, 5) == take(BatchStream(selection, config, seed=1, start=70), 5)
    assert stream.ends_before(70) == BatchStream(selection, config, seed=1).ends_before(70)


@pytest.mark.parametrize("crop", [True, False])
def test_long_lists_resume_at_once(tmp_path, crop):
    """A tenth of the largest corpora after 20 epochs; a Python step per utterance and epoch takes ten times as long."""
    frames = np.random.default_rng(0).integers(32000, 250000, 300_000)
    write_tsv(tmp_path / "long.tsv", Manifest(tmp_path, [f"folder/speaker/{i}.flac" for i in range(300_000)], frames))
    begin = time.process_time()
    config = DataConfig(crop=crop)
    selection = select_utterances(read_tsv(tmp_path / "long.tsv"), config)
    count = len(Epoch(selection, config, 0, 0))
    ends = list(range(count, 20 * count + 1, count))
    item = next(iter(BatchStream(selection, config, seed=0, start=20 * count, ends=ends)))
    assert item.number == 20 * count and len(item.crops) > 5
    assert time.process_time() - begin < 2.5


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


# Settings


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
