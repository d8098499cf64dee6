"""Audio files of any rate and number of channels, read piece by piece as one channel at 16 kHz."""

import logging
import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import soxr
import torch
from torch import Tensor

from distillation.data.audio import AudioError, AudioReader, read_header
from distillation.errors import UserError
from wav2vec2.feature_extractor import SAMPLE_RATE

logger = logging.getLogger(__name__)
QUALITY = "HQ"  # of soxr: 20 bits


def resampled_length(num_frames: int, rate: int, to: int = SAMPLE_RATE) -> int:
    """Samples at ``to`` Hz that so many at ``rate`` Hz become: rounded, a half up."""
    return (2 * num_frames * to + rate) // (2 * rate)


def resampled(blocks: Iterable[np.ndarray], rate: int, to: int = SAMPLE_RATE) -> Iterator[np.ndarray]:
    """Resample one channel as it comes.

    Args:
        blocks: float32 ``[n]`` at ``rate`` Hz, of any length.
        rate: in Hz.
        to: in Hz.

    Returns:
        float32 blocks ``[m]`` at ``to`` Hz, some empty, `resampled_length` samples in all.
    """
    if rate == to:
        yield from blocks
        return
    stream = soxr.ResampleStream(rate, to, 1, dtype="float32", quality=QUALITY)
    for block in blocks:
        yield stream.resample_chunk(block)
    yield stream.resample_chunk(np.empty(0, np.float32), last=True)


class AudioFile:
    """A file, read as one channel at 16 kHz; close it, or use it in a ``with``.

    Attributes:
        num_samples: at 16 kHz.

    Raises:
        UserError: the file is missing or cannot be opened, is no audio, or is shorter than its header promises.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._total = read_header(path).num_frames
            self._reader = AudioReader(path)
        except AudioError as error:
            raise UserError(str(error)) from None
        self._kept = np.empty((0, self._reader.num_channels), np.float32)
        self.num_samples = resampled_length(self._total, self._reader.sample_rate)

    def __enter__(self) -> "AudioFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def notice(self) -> None:
        """Say what is changed."""
        changes = []
        if self._reader.sample_rate != SAMPLE_RATE:
            changes.append(f"resampled from {self._reader.sample_rate} Hz")
        if self._reader.num_channels > 1:
            changes.append(f"its {self._reader.num_channels} channels averaged")
        if changes:
            logger.info("%s: %s", self.path, ", ".join(changes))

    def read(self, begin: int, end: int) -> Tensor:
        """Samples [begin, end) at 16 kHz; ``begin`` at a whole second.

        Raises:
            UserError: the file is corrupt, or has samples that are not finite.
        """
        rate = self._reader.sample_rate
        start = begin // SAMPLE_RATE * rate
        stop = math.ceil(end * rate / SAMPLE_RATE)
        # a second more on each side: the filter sees what it sees in the whole file
        margin = 0 if rate == SAMPLE_RATE else rate
        first, last = max(start - margin, 0), min(stop + margin, self._total)
        try:
            block = self._samples(first, last)
        except AudioError as error:
            raise UserError(str(error)) from None
        if len(block) != last - first:
            raise UserError(f"{self.path}: decoding stops at sample {first + len(block)} of {self._total}")
        if not np.isfinite(block).all():
            raise UserError(f"{self.path}: NaN or infinite samples after {first / rate:.1f} s")
        waveform = torch.from_numpy(block).mean(1)
        if rate == SAMPLE_RATE:
            return waveform
        skip = (start - first) // rate * SAMPLE_RATE
        return torch.from_numpy(soxr.resample(waveform.numpy(), rate, SAMPLE_RATE, QUALITY))[skip : skip + end - begin]

    def _samples(self, first: int, last: int) -> np.ndarray:
        """Samples [first, last) of the file, ``[n, C]``.

        Pieces overlap, and not every format can go back: what the last one had is kept.
        """
        skip = len(self._kept) - (self._reader.position - first)
        if 0 <= skip <= len(self._kept):
            kept = self._kept[skip:]
        else:
            kept = self._kept[:0]
            self._reader.seek(first)
        self._kept = np.concatenate([kept, self._reader.read(max(last - first - len(kept), 0))])
        return self._kept[: last - first]
