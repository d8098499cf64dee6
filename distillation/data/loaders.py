"""From utterance lists to batches of waveforms: reading in worker processes, and the loaders.

A file that cannot be read never raises in a worker: its row is left out and the reason travels with the batch, where
the trainer decides.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from distillation.data.audio import AudioError, level_of, read_crop
from distillation.data.batching import BatchStream, MicroBatch, ValidationBatches, select_utterances
from distillation.data.config import DataConfig
from distillation.data.manifest import Manifest
from distillation.data.noise import Noise
from distillation.recognition.labels import Labels, Speller

logger = logging.getLogger(__name__)

# One core decodes FLAC several hundred times faster than real time; more readers than this only cost memory.
MAX_AUTO_WORKERS = 8
# A reader that gives nothing for so long waits for a file system that is gone.
READ_TIMEOUT_SECONDS = 900.0


@dataclass
class Batch:
    """Waveforms of one forward pass. B is 0 when no file of the batch could be read."""

    waveforms: Tensor
    """[B, N] float32, full scale 1, zero after the end of a row."""
    lengths: Tensor | None
    """[B] int64, samples per row; None when every row is full."""
    number: int
    """Number of the micro-batch over all epochs and ranks."""
    files: list[str]
    """Path of each row."""
    errors: dict[str, str]
    """Path of each file that was left out, and why."""
    seconds: float
    """Seconds of audio, without padding."""
    read_seconds: float
    """Time that one worker took to read the batch, for the loader's share of the step."""
    silent: list[str] = field(default_factory=list)
    """Paths of the rows without sound."""
    clipped: list[str] = field(default_factory=list)
    """Paths of the rows that are distorted by full scale."""
    heard: Tensor | None = None
    """[B, N] float32, what the student hears instead; None for the same."""
    noise_errors: dict[str, str] = field(default_factory=dict)
    """Path of each noise recording that cannot be decoded, and why."""
    labels: Labels | None = None
    """What is said; None where that is not known."""

    def pin_memory(self) -> Batch:
        """Copy in page-locked memory; called by the loader."""
        return self._moved(lambda part: part.pin_memory())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Copy on another device."""
        return self._moved(lambda part: part.to(device, non_blocking=non_blocking))

    def _moved(self, move: Callable[[Any], Any]) -> Batch:
        parts = {name: getattr(self, name) for name in ("waveforms", "lengths", "heard", "labels")}
        return replace(self, **{name: move(part) for name, part in parts.items() if part is not None})


class AudioDataset(Dataset[Batch]):
    """Reads micro-batches of one manifest: ``dataset[MicroBatch(number, crops)]`` is a `Batch`.

    Args:
        manifest: what there is.
        sample_rate: of all files.
        speller: writes what is said in them as labels.
        noise: disturbs what the student hears.
    """

    def __init__(
        self, manifest: Manifest, sample_rate: int, speller: Speller | None = None, noise: Noise | None = None
    ) -> None:
        self.manifest, self.sample_rate, self.speller, self.noise = manifest, sample_rate, speller, noise

    def __getitem__(self, item: MicroBatch) -> Batch:
        begin = time.perf_counter()
        rows: list[np.ndarray] = []
        files: list[str] = []
        texts: list[str] = []
        errors: dict[str, str] = {}
        levels: dict[str | None, list[str]] = {"silent": [], "clipped": []}
        for crop in item.crops:
            path, starts = self.manifest.file(crop.index), self.manifest.starts
            start = crop.start + (0 if starts is None else int(starts[crop.index]))
            try:
                waveform = read_crop(path, start, crop.num_frames, self.sample_rate)
            except AudioError as error:
                errors[str(path)] = error.reason
                continue
            rows.append(waveform)
            files.append(str(path))
            if self.manifest.texts is not None:
                texts.append(self.manifest.texts[crop.index])
            levels.setdefault(level_of(waveform), []).append(str(path))
        waveforms, lengths = _pad(rows)
        heard, noise_errors = (None, {}) if self.noise is None else self.noise(rows, item.number)
        padded = None if heard is None else _pad(heard)[0]
        labels = None if self.speller is None else self.speller(texts)
        return Batch(
            waveforms,
            lengths,
            item.number,
            files,
            errors,
            seconds=sum(map(len, rows)) / self.sample_rate,
            read_seconds=time.perf_counter() - begin,
            silent=levels["silent"],
            clipped=levels["clipped"],
            heard=padded,
            noise_errors=noise_errors,
            labels=labels,
        )


@dataclass(frozen=True)
class Place:
    """Where batches are read and used; by default a process alone."""

    rank: int = 0
    """This process, from 0."""
    world_size: int = 1
    """Number of processes."""
    ranks_per_node: int = 1
    """Processes that share this machine's cores."""
    pin_memory: bool = False
    """Deliver batches in page-locked memory, for a GPU."""
    worker_init_fn: Callable[[int], None] | None = None
    """Called in every reading process with its number."""


def make_train_loader(
    manifest: Manifest,
    config: DataConfig,
    seed: int,
    start: int = 0,
    place: Place | None = None,
    ends: Sequence[int] = (),
    speller: Speller | None = None,
    noise: Noise | None = None,
) -> DataLoader[Batch]:
    """Endless loader of one rank's training batches; its ``sampler`` is the `BatchStream`.

    Args:
        manifest: training utterances.
        config: how to choose and batch them.
        seed: of the order and the crops, the same on every rank.
        start: micro-batches that all ranks together have used before.
        place: which rank, on what machine.
        ends: of the epochs before ``start``, as `BatchStream.ends_before` told with the same list, batching and seed.
        speller: writes labels of what is said.
        noise: disturbs what the student hears.

    Raises:
        UserError: no utterance has a usable length, or one is longer than a batch.
    """
    place = place or Place()
    selection = select_utterances(manifest, config)
    if place.rank == 0:
        logger.info("training data, %s", selection.summary)
    stream = BatchStream(
        selection, config, seed=seed, rank=place.rank, world_size=place.world_size, start=start, ends=ends
    )
    dataset = AudioDataset(manifest, config.sample_rate, speller, noise)
    return _make_loader(dataset, stream, _num_workers(config, place), place)


def make_valid_loader(
    manifest: Manifest,
    config: DataConfig,
    place: Place | None = None,
    speller: Speller | None = None,
    noise: Noise | None = None,
) -> DataLoader[Batch]:
    """Loader of one rank's share of the validation data, the same in every pass. Arguments as `make_train_loader`."""
    place = place or Place()
    selection = select_utterances(manifest, config)
    if place.rank == 0:
        logger.info("validation data, %s", selection.summary)
    batches = ValidationBatches(selection, config, rank=place.rank, world_size=place.world_size)
    dataset = AudioDataset(manifest, config.sample_rate, speller, noise)
    return _make_loader(dataset, batches, min(_num_workers(config, place), len(batches)), place)


def _make_loader(
    dataset: AudioDataset, sampler: Sampler[MicroBatch], num_workers: int, place: Place
) -> DataLoader[Batch]:
    return DataLoader(
        dataset,
        sampler=sampler,
        batch_size=None,  # the sampler's items are whole batches
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        pin_memory=place.pin_memory,
        timeout=READ_TIMEOUT_SECONDS if num_workers else 0,
        worker_init_fn=place.worker_init_fn,
        # The loader draws a number for its workers, which ignore it: not from the generator that draws the masks.
        generator=torch.Generator(),
    )


def _num_workers(config: DataConfig, place: Place) -> int:
    if config.num_workers != "auto":
        return config.num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(MAX_AUTO_WORKERS, cores // place.ranks_per_node - 1))


def _pad(rows: list[np.ndarray]) -> tuple[Tensor, Tensor | None]:
    if not rows:
        return torch.zeros(0, 0), None
    lengths, tensors = torch.tensor([len(row) for row in rows]), list(map(torch.from_numpy, rows))
    if bool((lengths == lengths[0]).all()):
        return torch.stack(tensors), None
    return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True), lengths
