"""Which samples make up which micro-batch: a pure function of the seed, the epoch and the position in the epoch.

Nothing here has a state to save. Micro-batches are numbered 0, 1, 2, ... through all epochs and over all ranks, so a
run resumes exactly from the count of those it has used, and one process with accumulation over two sees what two
processes see.
"""

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from torch.utils.data import Sampler

from distillation.data.manifest import MAX_FRAMES, Manifest
from distillation.errors import UserError, require
from wav2vec2.feature_extractor import SAMPLE_RATE

# The convolutions of wav2vec 2.0 turn this many samples into their first frame.
MIN_INPUT_FRAMES = 400


@dataclass
class DataConfig:
    """Audio data and how it is batched. The defaults are the published ones of DPHuBERT."""

    tsv_dir: Path = Path("data")
    """Folder of the utterance lists that prepare_data.py writes."""
    train: str = "train960.tsv"
    """Training list, relative to tsv_dir."""
    valid: str = "valid.tsv"
    """Validation list, relative to tsv_dir."""
    sample_rate: int = SAMPLE_RATE
    """Samples per second of every file; another rate is an error, nothing is resampled."""
    min_frames: int = 32000
    """Shortest utterance used, in samples; shorter ones are dropped."""
    max_frames: int = 250000
    """Longest utterance used as it is, in samples."""
    long: Literal["drop", "split", "crop"] = "drop"
    """What happens to utterances over max_frames: dropped as published, split into equal pieces, or cropped to
    max_frames at a random place in every epoch (DistilHuBERT)."""
    num_buckets: int = 1000
    """Utterances are sorted into this many equally wide ranges of length and shuffled inside each."""
    seconds_per_batch: float = 160.0
    """Most seconds of audio in one micro-batch of one process, padding included."""
    utterances_per_batch: int | None = None
    """Fixed number of utterances in a micro-batch; seconds_per_batch is then not used."""
    crop: bool = True
    """Crop a micro-batch at random offsets to its shortest utterance; if false, pad it to its longest."""
    reshuffle: Literal["every_epoch", "once"] = "every_epoch"
    """A new order and new crops every epoch, or those of the first epoch again and again as in the released system."""
    num_workers: int | Literal["auto"] = "auto"
    """Processes per rank that read the training audio; 0 reads in the training process; auto asks the machine."""
    valid_seconds_per_batch: float = 160.0
    """Most seconds of audio in one validation batch, padding included."""
    max_bad_share: float = 0.001
    """Share of the files of a list that may turn out unreadable; they are left out, more of them end the run."""

    @property
    def max_seconds(self) -> float:
        """Length of the longest utterances that are kept."""
        return self.max_frames / self.sample_rate

    def __post_init__(self) -> None:
        least, most = self.min_frames, MAX_FRAMES / self.sample_rate if self.sample_rate else 0
        require(self, "data.", "be at least 1", lambda value: value >= 1, "sample_rate", "num_buckets")
        require(self, "data.", "be at least 1, or null", lambda value: value >= 1, "utterances_per_batch")
        require(self, "data.", "be 'auto' or at least 0", lambda value: value == "auto" or value >= 0, "num_workers")
        seconds = ("seconds_per_batch", "valid_seconds_per_batch")
        require(self, "data.", "be a positive number of seconds", lambda value: 0 < value <= most, *seconds)
        require(self, "data.", "lie in [0, 1]", lambda value: 0 <= value <= 1, "max_bad_share")
        must = f"be at least {MIN_INPUT_FRAMES}, the samples that the models need"
        require(self, "data.", must, lambda value: value >= MIN_INPUT_FRAMES, "min_frames")
        must = f"be at least min_frames, {least}"
        require(self, "data.", must, lambda value: least <= value <= MAX_FRAMES, "max_frames")
        if self.long == "split":
            must = f"be at least twice min_frames, {least}, with data.long=split, or halves would be too short"
            require(self, "data.", must, lambda value: value >= 2 * least, "max_frames")


class Crop(NamedTuple):
    """``num_frames`` samples of utterance ``index``, the first of them at ``start``."""

    index: int  # type: ignore[assignment]  # tuple.index is not used
    start: int
    num_frames: int


class MicroBatch(NamedTuple):
    """What one forward pass of one rank reads. ``number`` counts over all epochs and ranks."""

    number: int
    crops: list[Crop]


@dataclass(frozen=True)
class Selection:
    """Utterances within the length limits, or pieces of them: arrays ``[N]``, times in samples."""

    index: np.ndarray
    start: np.ndarray
    num_frames: np.ndarray
    spare: np.ndarray  # samples by which a piece may start later
    summary: str


def select_utterances(manifest: Manifest, config: DataConfig) -> Selection:
    """Apply the length limits of ``config``; the summary tells how many utterances and hours are kept and dropped.

    Raises:
        UserError: no utterance is left.
    """
    frames = manifest.num_frames
    short, long = frames < config.min_frames, frames > config.max_frames
    used = ~short & ~long if config.long == "drop" else ~short
    pieces = np.where(used, -(-frames // config.max_frames) if config.long == "split" else 1, 0)
    index = np.repeat(np.arange(len(frames)), pieces)
    # Piece k of n runs from floor(k * frames / n): equal to within one sample, without gap or overlap.
    k = np.arange(len(index)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = k * frames[index] // pieces[index]
    end = (k + 1) * frames[index] // pieces[index]

    def amount(chosen: np.ndarray) -> str:
        return f"{int(chosen.sum())} ({frames[chosen].sum() / config.sample_rate / 3600:.2f} h)"

    limits = f"{config.min_frames / config.sample_rate:g} to {config.max_seconds:g} s"
    if not len(index):
        seconds = f"{frames.min() / config.sample_rate:.2f} to {frames.max() / config.sample_rate:.2f} s"
        raise UserError(
            f"none of the {len(frames)} utterances under {manifest.root} is {limits} long (they are {seconds}): "
            "set --data.min_frames, --data.max_frames or --data.long"
        )
    fates = {"drop": "dropped", "split": f"split into {int(pieces[long].sum())} pieces", "crop": "cropped"}
    summary = (
        f"utterances of {limits}: kept {amount(used & ~long)}, shorter dropped {amount(short)}, "
        f"longer {fates[config.long]} {amount(long)}"
    )
    num_frames = np.minimum(end - start, config.max_frames)
    return Selection(index, start, num_frames, end - start - num_frames, summary)


def plan_epoch(selection: Selection, config: DataConfig, seed: int, epoch: int) -> list[list[Crop]]:
    """All micro-batches of one training epoch, in the order in which they are used.

    Utterances are sorted into length buckets, shuffled inside each, packed in that order until a batch is full, and the
    batches are shuffled (DPHuBERT, section 3.1 and its released code). With ``config.crop`` each row of a batch is a
    random stretch as long as the shortest utterance of the batch.

    Raises:
        UserError: an utterance is longer than a whole batch.
    """
    order, bounds, random = _pack_epoch(selection, config, seed, epoch)
    frames, start = selection.num_frames[order], selection.start[order]
    if selection.spare.any():
        start = start + random.integers(0, selection.spare[order], endpoint=True)
    if config.crop:
        kept = np.repeat(np.minimum.reduceat(frames, bounds[:-1]), np.diff(bounds))
        start = start + random.integers(0, frames - kept, endpoint=True)
        frames = kept
    crops = _crops(selection.index[order], start, frames)
    return [crops[bounds[i] : bounds[i + 1]] for i in random.permutation(len(bounds) - 1).tolist()]


class BatchStream(Sampler[MicroBatch]):
    """The endless stream of micro-batches of one rank: epoch follows epoch, nothing is repeated or left out.

    Rank r of ``world_size`` yields the micro-batches whose number j is r modulo ``world_size``, from j >= ``start`` on.

    Args:
        selection: what `select_utterances` left.
        config: how to batch it.
        seed: of the order and the crops, the same on every rank.
        rank: this process, from 0.
        world_size: number of processes.
        start: micro-batches that all ranks together have used before, 0 for a new run.
    """

    def __init__(
        self, selection: Selection, config: DataConfig, *, seed: int, rank: int = 0, world_size: int = 1, start: int = 0
    ) -> None:
        if seed < 0:
            raise UserError(f"seed is {seed}: it must not be negative")
        assert 0 <= rank < world_size and start >= 0, (rank, world_size, start)
        self.selection, self.config, self.seed = selection, config, seed
        self.rank, self.world_size, self.start = rank, world_size, start
        self._ends: list[int] = []  # number of the first micro-batch after epoch 0, 1, ...
        self._plan: list[list[Crop]] = []
        self._plan_epoch = -1
        self.epoch_of(start)  # a batch budget that is too small is reported here, not from the middle of a loop

    def epoch_of(self, number: int) -> int:
        """The epoch that micro-batch ``number`` belongs to. Packing is random, so epochs differ in their count."""
        while not self._ends or number >= self._ends[-1]:
            _, bounds, _ = _pack_epoch(self.selection, self.config, self.seed, len(self._ends))
            self._ends.append(len(bounds) - 1 + (self._ends[-1] if self._ends else 0))
        return bisect_right(self._ends, number)

    def first_of(self, epoch: int) -> int:
        """Number of the first micro-batch of an epoch: how many the epochs before it hold."""
        while len(self._ends) < epoch:
            self.epoch_of(self._ends[-1])
        return self._ends[epoch - 1] if epoch else 0

    def __iter__(self) -> Iterator[MicroBatch]:
        number = self.start + (self.rank - self.start) % self.world_size
        while True:
            epoch = self.epoch_of(number)
            if epoch != self._plan_epoch:
                self._plan = plan_epoch(self.selection, self.config, self.seed, epoch)
                self._plan_epoch = epoch
            yield MicroBatch(number, self._plan[number - self.first_of(epoch)])
            number += self.world_size


class ValidationBatches(Sampler[MicroBatch]):
    """One rank's share of a fixed validation pass: the longest batches first, every utterance on one rank only.

    Nothing is random, rows are cropped at their start. Ranks may get different counts; one that would get nothing gets
    one batch without rows, so that every rank runs its validation hooks.
    """

    def __init__(self, selection: Selection, config: DataConfig, *, rank: int = 0, world_size: int = 1) -> None:
        order = np.argsort(selection.num_frames, kind="stable")
        frames = selection.num_frames[order]
        bounds = _pack_seconds(frames, config, "valid_seconds_per_batch")
        reduce = np.minimum if config.crop else np.maximum
        costs = reduce.reduceat(frames, bounds[:-1]) * np.diff(bounds)
        if config.crop:
            frames = np.repeat(np.minimum.reduceat(frames, bounds[:-1]), np.diff(bounds))
        crops = _crops(selection.index[order], selection.start[order], frames)
        self.batches: list[MicroBatch] = []
        loads = [0] * world_size
        for number, i in enumerate(np.argsort(-costs, kind="stable").tolist()):
            lightest = loads.index(min(loads))
            loads[lightest] += int(costs[i])
            if lightest == rank:
                self.batches.append(MicroBatch(number, crops[bounds[i] : bounds[i + 1]]))
        if not self.batches:
            self.batches.append(MicroBatch(len(costs) + rank, []))

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        return iter(self.batches)


def _pack_epoch(
    selection: Selection, config: DataConfig, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray, np.random.Generator]:
    """Order of the utterances, bounds of the batches in it, and the generator for whatever is drawn next."""
    random = np.random.default_rng((seed, 0 if config.reshuffle == "once" else epoch))
    frames = selection.num_frames
    shortest, longest = frames.min(), frames.max()
    bucket = (frames - shortest) * config.num_buckets // (longest - shortest + 1)
    order = np.lexsort((random.random(len(frames)), bucket))
    if config.utterances_per_batch is not None:
        bounds = np.append(np.arange(0, len(order), config.utterances_per_batch), len(order))
    else:
        bounds = _pack_seconds(frames[order], config, "seconds_per_batch")
    return order, bounds, random


def _pack_seconds(num_frames: np.ndarray, config: DataConfig, flag: str) -> np.ndarray:
    """Fill batches in the given order up to a budget in seconds: the first index of each batch, then the total."""
    budget = int(getattr(config, flag) * config.sample_rate)
    longest = int(num_frames.max())
    if longest > budget:
        raise UserError(
            f"--data.{flag} {getattr(config, flag):g} is less than the longest utterance used, "
            f"{longest / config.sample_rate:.2f} s: raise it, or lower --data.max_frames"
        )
    bounds, total, widest = [0], 0, 0
    for i, frames in enumerate(num_frames.tolist()):
        total += frames
        widest = max(widest, frames)
        # Rows to be cropped count with their whole length, as published; padded rows with their padding.
        if (total if config.crop else widest * (i + 1 - bounds[-1])) > budget:
            bounds.append(i)
            total = widest = frames
    return np.array([*bounds, len(num_frames)])


def _crops(index: np.ndarray, start: np.ndarray, num_frames: np.ndarray) -> list[Crop]:
    return list(map(Crop, index.tolist(), start.tolist(), num_frames.tolist()))
