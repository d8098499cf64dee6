"""Audio files of any rate and number of channels, read piece by piece as one channel at 16 kHz."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import soxr
import torch
from torch import Tensor

from distillation.data.audio import AudioError, AudioReader, read_header
from distillation.data.kaldi import OVERSHOOT
from wav2vec2.feature_extractor import SAMPLE_RATE
from wav2vec2.resampling import resampled_length

QUALITY = "HQ"  # of soxr: 20 bits


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


def stretch(path: Path, num_samples: int, start: float, end: float | None) -> int:
    """Samples at 16 kHz from ``start`` to ``end``, in seconds, of so many; None is their end.

    Raises:
        AudioError: the stretch is not within them; half a second behind their end is cut off.
    """
    last = num_samples if end is None else round(end * SAMPLE_RATE)
    first = round(start * SAMPLE_RATE)
    if first > num_samples or last > num_samples + OVERSHOOT * SAMPLE_RATE:
        raise AudioError(path, f"holds {num_samples / SAMPLE_RATE:.2f} s, wanted {start:g} to {last / SAMPLE_RATE:g} s")
    return min(last, num_samples) - first


class AudioFile:
    """A file or a stretch of it, read as one channel at 16 kHz; close it, or use it in a ``with``.

    Attributes:
        num_samples: at 16 kHz.
        changes: what is done to the audio, in words.

    Args:
        path: of the file.
        start: seconds of the file that are left out.
        end: where the stretch ends, in seconds of the file; None where the file does.

    Raises:
        AudioError: the file is missing or cannot be opened, is no audio, is shorter than its header promises, or ends
            before the stretch does.
    """

    def __init__(self, path: Path, start: float = 0.0, end: float | None = None) -> None:
        self.path = path
        self._total = read_header(path).num_frames
        self._reader = AudioReader(path)
        rate, channels = self._reader.sample_rate, self._reader.num_channels
        self._kept = np.empty((0, channels), np.float32)
        self._start = round(start * SAMPLE_RATE)
        try:
            self.num_samples = stretch(path, resampled_length(self._total, rate), start, end)
        except AudioError:
            self._reader.close()
            raise
        self.changes = [
            *([f"resampled from {rate} Hz"] if rate != SAMPLE_RATE else []),
            *([f"{channels} channels averaged"] if channels > 1 else []),
        ]

    def __enter__(self) -> "AudioFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.close()

    def read(self, begin: int, end: int) -> Tensor:
        """Samples [begin, end) at 16 kHz, the same as in the whole.

        Raises:
            AudioError: the file is corrupt, or has samples that are not finite.
        """
        rate = self._reader.sample_rate
        begin, end = begin + self._start, end + self._start
        if rate == SAMPLE_RATE:
            first, last, skip = begin, end, 0
        else:
            # samples of both rates meet at whole seconds, and the filter sees what it sees in the whole file
            second = max(begin // SAMPLE_RATE - 1, 0)
            skip = begin - second * SAMPLE_RATE
            first, last = second * rate, min(math.ceil(end * rate / SAMPLE_RATE) + rate, self._total)
        block = self._samples(first, last)
        if len(block) != last - first:
            raise AudioError(self.path, f"decoding stops at sample {first + len(block)} of {self._total}")
        if not np.isfinite(block).all():
            raise AudioError(self.path, f"NaN or infinite samples after {first / rate:.1f} s")
        waveform = torch.from_numpy(block).mean(1)
        if rate == SAMPLE_RATE:
            return waveform
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
