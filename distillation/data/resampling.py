"""Audio files of any rate and number of channels, read piece by piece as one channel at 16 kHz."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import soundfile
import torch
import torchaudio
from torch import Tensor

from distillation.errors import UserError
from wav2vec2.feature_extractor import SAMPLE_RATE

logger = logging.getLogger(__name__)
# torchaudio's filter has as many values as the product of both rates over their common divisor squared
MAX_FILTER = 10_000_000


@dataclass
class AudioFile:
    """A file, read as one channel at 16 kHz."""

    path: Path
    file: soundfile.SoundFile

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        try:
            self.path, self.file = path, soundfile.SoundFile(str(path))
        except (OSError, soundfile.SoundFileError):
            raise UserError(f"{path}: cannot be opened as audio") from None
        divisor = math.gcd(self.file.samplerate, SAMPLE_RATE)
        if self.file.samplerate * SAMPLE_RATE // divisor**2 > MAX_FILTER:
            raise UserError(f"{path}: cannot be resampled from {self.file.samplerate} Hz here; use another program")

    @property
    def num_samples(self) -> int:
        """At 16 kHz."""
        return math.ceil(self.file.frames * SAMPLE_RATE / self.file.samplerate)

    def notice(self) -> None:
        """Say what is changed."""
        changes = []
        if self.file.samplerate != SAMPLE_RATE:
            changes.append(f"resampled from {self.file.samplerate} Hz")
        if self.file.channels > 1:
            changes.append(f"its {self.file.channels} channels averaged")
        if changes:
            logger.info("%s: %s", self.path, ", ".join(changes))

    def read(self, begin: int, end: int) -> Tensor:
        """Samples [begin, end) at 16 kHz; ``begin`` at a whole second.

        Raises:
            UserError: the file is corrupt, or has samples that are not finite.
        """
        rate, total = self.file.samplerate, self.file.frames
        start = begin // SAMPLE_RATE * rate
        stop = min(math.ceil(end * rate / SAMPLE_RATE), total)
        # a second more on each side: the filter sees what it sees in the whole file
        margin = 0 if rate == SAMPLE_RATE else rate
        first, last = max(start - margin, 0), min(stop + margin, total)
        try:
            self.file.seek(first)
            block = torch.from_numpy(self.file.read(last - first, dtype="float32", always_2d=True))
        except (OSError, soundfile.SoundFileError):
            raise UserError(f"{self.path}: cannot be decoded at {first / rate:.1f} s") from None
        if len(block) != last - first:
            raise UserError(f"{self.path}: ends at {(first + len(block)) / rate:.1f} s, its header promises more")
        if not block.isfinite().all():
            raise UserError(f"{self.path}: NaN or infinite samples after {first / rate:.1f} s")
        waveform = block.mean(1)
        if rate == SAMPLE_RATE:
            return waveform
        skip = (start - first) // rate * SAMPLE_RATE
        return torchaudio.functional.resample(waveform, rate, SAMPLE_RATE)[skip : skip + end - begin]
