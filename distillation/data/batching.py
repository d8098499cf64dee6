"""Which samples make up which micro-batch: a pure function of the seed, the epoch and the position in the epoch.

Nothing here has a state that must be saved. Micro-batches are numbered 0, 1, 2, ... through all epochs and over all
ranks, so a run resumes exactly from the count of those it has used, and one process with accumulation over two sees
what two processes see. A record of where the epochs ended only saves the time to count them again.

Lists may be of millions of utterances: they stay arrays until one micro-batch is asked for.
"""

import logging
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from distillation.data.config import DataConfig
from distillation.data.manifest import Manifest
from distillation.errors import UserError

logger = logging.getLogger(__name__)


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


class _Cut:
    """Rows of arrays ``[N]``, times in samples, cut into batches; their crops are made when a batch is asked for."""

    def __init__(self, index: np.ndarray, start: np.ndarray, num_frames: np.ndarray, bounds: np.ndarray) -> None:
        self.columns = index, start, num_frames
        self.bounds = bounds

    def __getitem__(self, batch: int) -> list[Crop]:
        rows = slice(self.bounds[batch], self.bounds[batch + 1])
        return list(map(Crop, *(column[rows].tolist() for column in self.columns)))


class Epoch:
    """The micro-batches of one training epoch, in the order in which they are used: ``epoch[i]`` is a list of crops.

    Utterances are sorted into length buckets, shuffled inside each, packed in that order until a batch is full, and the
    batches are shuffled (DPHuBERT, section 3.1 and its released code). With ``config.crop`` each row of a batch is a
    random stretch as long as the shortest utterance of the batch.

    Args:
        selection: what `select_utterances` left.
        config: how to batch it.
        seed: of the order and the crops.
        epoch: its number, from 0.

    Raises:
        UserError: an utterance is longer than a whole batch.
    """

    def __init__(self, selection: Selection, config: DataConfig, seed: int, epoch: int) -> None:
        self.selection, self.config = selection, config
        self._random = np.random.default_rng((seed, 0 if config.reshuffle == "once" else epoch))
        frames = selection.num_frames
        shortest, longest = frames.min(), frames.max()
        bucket = (frames - shortest) * config.num_buckets // (longest - shortest + 1)
        # By bucket, then by draw, as np.lexsort in a third of its time: small integers are sorted by counting.
        order = _stable_argsort(self._random.random(len(frames)))
        bucket = bucket[order].astype(np.min_scalar_type(config.num_buckets))
        self._order = order[np.argsort(bucket, kind="stable")]
        if config.utterances_per_batch is not None:
            self._bounds = np.append(np.arange(0, len(order), config.utterances_per_batch), len(order))
        else:
            self._bounds = _pack_seconds(frames[self._order], config, "seconds_per_batch")

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, i: int) -> list[Crop]:
        batches, order = self._drawn
        return batches[order[i]]

    @cached_property
    def _drawn(self) -> tuple[_Cut, np.ndarray]:
        """The batches and their order; apart, as an epoch that is only counted needs no crops."""
        random, order, bounds = self._random, self._order, self._bounds
        frames, start = self.selection.num_frames[order], self.selection.start[order]
        if self.selection.spare.any():
            start = start + random.integers(0, self.selection.spare[order], endpoint=True)
        if self.config.crop:
            kept = np.repeat(np.minimum.reduceat(frames, bounds[:-1]), np.diff(bounds))
            start = start + random.integers(0, frames - kept, endpoint=True)
            frames = kept
        return _Cut(self.selection.index[order], start, frames, bounds), random.permutation(len(self))


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
        ends: what `ends_before` told with the same selection, batching and seed: a long run that resumes then need not
            pack the epochs before ``start`` again to count their batches. A damaged record is left aside with a
            warning.

    Raises:
        UserError: the seed is negative, or an utterance is longer than a whole batch.
    """

    def __init__(
        self,
        selection: Selection,
        config: DataConfig,
        *,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        ends: Sequence[int] = (),
    ) -> None:
        if seed < 0:
            raise UserError(f"seed is {seed}: it must not be negative")
        assert 0 <= rank < world_size and start >= 0, (rank, world_size, start)
        if config.utterances_per_batch is None:
            _budget(selection.num_frames, config, "seconds_per_batch")  # reported here, not from the middle of a loop
        self.selection, self.config, self.seed = selection, config, seed
        self.rank, self.world_size, self.start = rank, world_size, start
        self._ends = self._checked(ends)  # number of the first micro-batch after epoch 0, 1, ...
        self._latest: tuple[int, Epoch] | None = None

    def epoch_of(self, number: int) -> int:
        """The epoch that micro-batch ``number`` belongs to. Packing is random, so epochs differ in their count."""
        while not self._ends or number >= self._ends[-1]:
            self._count_next()
        return bisect_right(self._ends, number)

    def first_of(self, epoch: int) -> int:
        """Number of the first micro-batch of an epoch: how many the epochs before it hold."""
        while len(self._ends) < epoch:
            self._count_next()
        return self._ends[epoch - 1] if epoch else 0

    def ends_before(self, number: int) -> list[int]:
        """Ends of the epochs that are complete before micro-batch ``number``, to resume there with.

        Each is the number of the first micro-batch after its epoch; how far the stream has been read does not matter.
        """
        while number > (self._ends[-1] if self._ends else 0):
            self._count_next()
        return self._ends[: bisect_right(self._ends, number)]

    def __iter__(self) -> Iterator[MicroBatch]:
        number = self.start + (self.rank - self.start) % self.world_size
        while True:
            epoch = self.epoch_of(number)
            yield MicroBatch(number, self._plan(epoch)[number - self.first_of(epoch)])
            number += self.world_size

    def _plan(self, epoch: int) -> Epoch:
        if self.config.reshuffle == "once":
            epoch = 0
        if self._latest is None or self._latest[0] != epoch:
            self._latest = None  # its memory is free for the next
            self._latest = epoch, Epoch(self.selection, self.config, self.seed, epoch)
        return self._latest[1]

    def _count_next(self) -> None:
        """Find the end of one more epoch, without packing it where all epochs are of the same count."""
        utterances = self.config.utterances_per_batch
        if utterances is not None:
            count = -(-len(self.selection.index) // utterances)
        else:
            count = len(self._plan(len(self._ends)))
        self._ends.append(count + (self._ends[-1] if self._ends else 0))

    def _checked(self, ends: Sequence[int]) -> list[int]:
        begins = [0, *ends]
        for begin, end in zip(begins, ends):
            # No batch is empty, and none of an epoch's utterances is in two.
            if type(end) is not int or not 0 < end - begin <= len(self.selection.index):
                logger.warning("the recorded ends of epochs are damaged, at %.40r: counting them again", end)
                return []
        return list(ends)


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
        self._cut = _Cut(selection.index[order], selection.start[order], frames, bounds)
        self._batches: list[tuple[int, int | None]] = []  # number of each batch, and which one of the cut it is
        loads = [0] * world_size
        for number, i in enumerate(np.argsort(-costs, kind="stable").tolist()):
            lightest = loads.index(min(loads))
            loads[lightest] += int(costs[i])
            if lightest == rank:
                self._batches.append((number, i))
        if not self._batches:
            self._batches.append((len(costs) + rank, None))

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[MicroBatch]:
        for number, i in self._batches:
            yield MicroBatch(number, [] if i is None else self._cut[i])


def _stable_argsort(draws: np.ndarray) -> np.ndarray:
    """Faster than ``kind="stable"``: only equal draws, which are rare, leave other algorithms a choice."""
    order = np.argsort(draws)
    ascending = draws[order]
    return np.argsort(draws, kind="stable") if (ascending[1:] == ascending[:-1]).any() else order


def _budget(num_frames: np.ndarray, config: DataConfig, flag: str) -> int:
    """Most samples in a batch; a `UserError` if that is less than the longest utterance."""
    budget = int(getattr(config, flag) * config.sample_rate)
    longest = int(num_frames.max())
    if longest > budget:
        raise UserError(
            f"--data.{flag} {getattr(config, flag):g} is less than the longest utterance used, "
            f"{longest / config.sample_rate:.2f} s: raise it, or lower --data.max_frames"
        )
    return budget


def _pack_seconds(num_frames: np.ndarray, config: DataConfig, flag: str) -> np.ndarray:
    """Fill batches in the given order up to a budget in seconds: the first index of each batch, then the total.

    Rows to be cropped count with their whole length, as published; padded rows with their padding.
    """
    budget = _budget(num_frames, config, flag)
    bounds = [0]
    if config.crop:
        ends = np.cumsum(num_frames)
        # Where a batch that began with this utterance would end, for every utterance.
        after = np.searchsorted(ends, ends - num_frames + budget, side="right").data
        while bounds[-1] < len(num_frames):
            bounds.append(after[bounds[-1]])
        return np.array(bounds)
    widest = stop = 0
    for i, frames in enumerate(num_frames.data):
        if frames > widest:
            widest, stop = frames, bounds[-1] + budget // frames
        if i >= stop:
            bounds.append(i)
            widest, stop = frames, i + budget // frames
    return np.array([*bounds, len(num_frames)])
