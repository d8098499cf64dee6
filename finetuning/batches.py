"""Padded batches of transcribed utterances, of similar length and in a new order every epoch.

Shapes: B batch, N samples at 16 kHz, S characters.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from distillation.data.audio import AudioError, read_crop
from finetuning.transcripts import DAMAGED, SPACE, LeftOut, Utterance
from wav2vec2.feature_extractor import SAMPLE_RATE


@dataclass
class Batch:
    """Padded utterances; B is 0 where none of a batch could be decoded."""

    waveforms: Tensor  # [B, N]
    lengths: Tensor  # [B] samples
    labels: Tensor  # [sum of S] characters of one utterance after the other
    label_lengths: Tensor  # [B]
    texts: list[str]
    left_out: list[LeftOut] = field(default_factory=list)
    """What could not be decoded."""

    def to(self, device: torch.device) -> Batch:
        """Copy to a device."""
        names = ("waveforms", "lengths", "labels", "label_lengths")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})


class SpeechDataset(Dataset):
    """Reads whole batches: an index is a list of positions.

    Args:
        utterances: what can be read.
        vocabulary: characters outside it are left out of the labels, not of the text.
    """

    def __init__(self, utterances: Sequence[Utterance], vocabulary: Sequence[str]) -> None:
        self.utterances = utterances
        self.ids = {" " if token == SPACE else token: i for i, token in enumerate(vocabulary)}

    def __getitem__(self, positions: list[int]) -> Batch:
        rows: list[Tensor] = []
        chosen: list[Utterance] = []
        left_out: list[LeftOut] = []
        for utterance in (self.utterances[position] for position in positions):
            path, num_frames, _, start, place = utterance
            try:
                rows.append(torch.from_numpy(read_crop(path, start, num_frames, SAMPLE_RATE)))
                chosen.append(utterance)
            except AudioError as error:
                left_out.append(LeftOut(path, place, DAMAGED, error.reason))
        labels = [[self.ids[character] for character in u.text if character in self.ids] for u in chosen]
        return Batch(
            torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 0),
            torch.tensor([len(row) for row in rows]),
            torch.tensor([i for row in labels for i in row], dtype=torch.long),
            torch.tensor([len(row) for row in labels]),
            [u.text for u in chosen],
            left_out,
        )


class LengthBatches(Sampler[list[int]]):
    """Batches of similar length, padded to at most ``seconds`` together; new and in a new order in every epoch.

    Args:
        utterances: what to draw from.
        seconds: one utterance that is longer makes a batch alone.
        seed: endless, epoch after epoch; None for always the same batches, once, in order of length.
        start: batches that have been used before.
    """

    def __init__(self, utterances: Sequence[Utterance], seconds: float, seed: int | None, start: int = 0) -> None:
        self.num_frames = torch.tensor([u.num_frames for u in utterances])
        self.budget, self.seed, self.start = seconds * SAMPLE_RATE, seed, start

    def epoch(self, number: int) -> list[list[int]]:
        """The batches of epoch 0, 1, ..."""
        generator = torch.Generator().manual_seed((self.seed or 0) * 1_000_003 + number)
        # lengths a tenth apart count as equal, so that the neighbours of an utterance change from epoch to epoch
        jitter = 1 + 0.1 * torch.rand(len(self.num_frames), generator=generator) if self.seed is not None else 1.0
        batches: list[list[int]] = []
        longest = 0
        for position in (self.num_frames * jitter).argsort(stable=True).tolist():
            longest = max(longest, int(self.num_frames[position])) if batches else 0
            if batches and longest * (len(batches[-1]) + 1) <= self.budget:
                batches[-1].append(position)
            else:
                batches.append([position])
                longest = int(self.num_frames[position])
        order = torch.randperm(len(batches), generator=generator) if self.seed is not None else range(len(batches))
        return [batches[int(i)] for i in order]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.epoch(0)) if self.seed is None else self._endless()

    def _endless(self) -> Iterator[list[int]]:
        used = self.start
        for number in itertools.count():
            batches = self.epoch(number)
            yield from batches[used:]
            used = max(0, used - len(batches))
