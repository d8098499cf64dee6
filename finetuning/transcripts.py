"""Transcribed utterances: LibriSpeech folders and manifests, the characters in them, and padded batches.

Shapes: B batch, N samples at 16 kHz, S characters.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm

from distillation.data.audio import AudioError, read_crop, read_header
from distillation.data.batching import MIN_INPUT_FRAMES
from distillation.errors import UserError
from wav2vec2.feature_extractor import SAMPLE_RATE

logger = logging.getLogger(__name__)

BLANK, SPACE = "<pad>", "|"  # as transformers writes them


class Utterance(NamedTuple):
    """A file and what is said in it, in capitals with single spaces."""

    path: Path
    num_frames: int
    text: str


def read_transcripts(source: Path) -> list[Utterance]:
    """Utterances of a folder with LibriSpeech's .trans.txt files, or of a manifest.

    A manifest has a line per utterance, the path of the audio (relative to the manifest), a tab, the text.

    Raises:
        UserError: nothing there, a line without text, a missing or unreadable file, or audio that is not 16 kHz mono.
    """
    pairs = list(_librispeech(source) if source.is_dir() else _manifest(source))
    if not pairs:
        raise UserError(f"{source}: no transcribed utterance (*.trans.txt, or lines of path<TAB>text)")
    utterances = []
    for path, text in tqdm(pairs, f"reading headers of {source.name}", leave=False, disable=None):
        text = " ".join(text.upper().split())
        if not text or SPACE in text:
            raise UserError(f"{source}: the transcript of {path} is empty or holds {SPACE!r}")
        try:
            header = read_header(path)
        except AudioError as error:
            raise UserError(str(error)) from None
        if header.sample_rate != SAMPLE_RATE or header.num_channels != 1:
            raise UserError(f"{path}: {header.sample_rate} Hz, {header.num_channels} channels; wanted 16000 Hz mono")
        if header.num_frames < MIN_INPUT_FRAMES:
            logger.warning("%s: left out, %d samples are too few for a frame", path, header.num_frames)
            continue
        utterances.append(Utterance(path, header.num_frames, text))
    if not utterances:
        raise UserError(f"{source}: no utterance is long enough for a frame")
    return utterances


def _librispeech(folder: Path) -> Iterator[tuple[Path, str]]:
    for listing in sorted(folder.rglob("*.trans.txt")):
        for line in listing.read_text(encoding="utf-8").splitlines():
            name, _, text = line.partition(" ")
            if name:
                yield listing.parent / f"{name}.flac", text


def _manifest(path: Path) -> Iterator[tuple[Path, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{path}: neither a folder nor a readable text file") from None
    for number, line in enumerate(lines, 1):
        name, tab, text = line.partition("\t")
        if line.strip() and not (name and tab):
            raise UserError(f"{path}: line {number} is not path<TAB>text")
        if line.strip():
            yield path.parent / name, text


def describe(utterances: Sequence[Utterance]) -> str:
    """How many there are and a digest of what is said in which file, wherever they lie."""
    digest = hashlib.sha256(repr([(u.path.name, u.num_frames, u.text) for u in utterances]).encode())
    hours = sum(u.num_frames for u in utterances) / SAMPLE_RATE / 3600
    return f"{len(utterances)} utterances of {hours:.2f} h, {digest.hexdigest()}"


def make_vocabulary(utterances: Sequence[Utterance]) -> list[str]:
    """Blank, space, and the characters of the transcripts in order."""
    return [BLANK, SPACE, *sorted({character for u in utterances for character in u.text} - {" "})]


@dataclass
class Batch:
    """Padded utterances."""

    waveforms: Tensor  # [B, N]
    lengths: Tensor  # [B] samples
    labels: Tensor  # [sum of S] characters of one utterance after the other
    label_lengths: Tensor  # [B]
    texts: list[str]

    def to(self, device: torch.device) -> Batch:
        """Copy to a device."""
        waveforms, lengths, labels, label_lengths = (
            tensor.to(device) for tensor in (self.waveforms, self.lengths, self.labels, self.label_lengths)
        )
        return Batch(waveforms, lengths, labels, label_lengths, self.texts)


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
        chosen = [self.utterances[position] for position in positions]
        try:
            rows = [torch.from_numpy(read_crop(u.path, 0, u.num_frames, SAMPLE_RATE)) for u in chosen]
        except AudioError as error:
            raise UserError(str(error)) from None
        labels = [[self.ids[character] for character in u.text if character in self.ids] for u in chosen]
        return Batch(
            torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
            torch.tensor([len(row) for row in rows]),
            torch.tensor([i for row in labels for i in row], dtype=torch.long),
            torch.tensor([len(row) for row in labels]),
            [u.text for u in chosen],
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
