"""Transcripts as the symbols of an output layer, and the vocabulary that these come from.

Shapes: B rows, S symbols of a row, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wav2vec2.vocabulary import BLANK, SPACE, written

TRIAL_RATE = 12.0  # symbols per second of fast speech, where only time and memory are measured

NEVER = 2**40  # more frames than there are


@dataclass
class Labels:
    """What is said in the rows of a batch."""

    symbols: Tensor  # int64 [sum of S], of one row after the other
    counts: Tensor  # int64 [B], S
    # int64 [B], frames that CTC needs: one for each symbol, and one for a blank between two equal ones; NEVER where the
    # vocabulary has no character of a text
    needed: Tensor
    texts: list[str]  # as they are to be written, with what the vocabulary lacks

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Labels:
        """Copy on another device."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Labels:
        """Copy in page-locked memory."""
        return self._moved(Tensor.pin_memory)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Labels:
        return Labels(move(self.symbols), move(self.counts), move(self.needed), self.texts)


class Speller:
    """Writes texts in the symbols of a vocabulary; characters that it lacks are left out of these, not of the texts."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        self.ids = {written(symbol): i for i, symbol in enumerate(vocabulary) if i and written(symbol)}

    def __call__(self, texts: Sequence[str]) -> Labels:
        """Labels of the rows of a batch."""
        rows = [[self.ids[character] for character in text if character in self.ids] for text in texts]
        doubled = [sum(a == b for a, b in itertools.pairwise(row)) for row in rows]
        counts = torch.tensor([len(row) for row in rows], dtype=torch.long)
        unwritable = [not row and bool(text) for row, text in zip(rows, texts, strict=True)]
        doubled = [NEVER if never else count for never, count in zip(unwritable, doubled, strict=True)]
        symbols = torch.tensor([symbol for row in rows for symbol in row], dtype=torch.long)
        return Labels(symbols, counts, counts + torch.tensor(doubled, dtype=torch.long), list(texts))

    def unknown(self, texts: Iterable[str]) -> list[str]:
        """Characters that the vocabulary lacks, in order."""
        return sorted({character for text in texts for character in text} - self.ids.keys() - {" "})


def make_vocabulary(texts: Iterable[str]) -> list[str]:
    """Blank, space, and the characters of the transcripts in order."""
    return [BLANK, SPACE, *sorted({character for text in texts for character in text} - {" "})]


def trial_labels(waveforms: Tensor, num_symbols: int, sample_rate: int) -> Labels:
    """Labels for waveforms [B, N] of which only time and memory count."""
    each = max(1, int(TRIAL_RATE * waveforms.shape[1] / sample_rate))
    counts = torch.full((len(waveforms),), each, device=waveforms.device)
    symbols = 1 + torch.arange(each, device=waveforms.device) % (num_symbols - 1)
    return Labels(symbols.repeat(len(waveforms)), counts, 2 * counts, [""] * len(waveforms))
