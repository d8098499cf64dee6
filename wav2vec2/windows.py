"""Features of audio files of any length, rate and number of channels, in bounded memory.

A long file is cut into windows that overlap. Every frame is taken from the window in which it has audio on both sides,
and windows start at whole seconds, so that frames and resampled samples fall exactly where they do in the whole file.

Shapes: S states, T frames, D width.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import soundfile
import torch
import torchaudio
from torch import Tensor

from distillation.errors import UserError
from wav2vec2 import Wav2Vec2Model
from wav2vec2.embed import SAMPLE_RATE, frame_shift, receptive_field

logger = logging.getLogger(__name__)
# torchaudio's filter has as many values as the product of both rates over their common divisor squared
MAX_FILTER = 10_000_000


class Window(NamedTuple):
    """Samples [begin, end) to run, at 16 kHz, and the frames [first, last) of the file to keep of them."""

    begin: int
    end: int
    first: int
    last: int


def make_windows(model: Wav2Vec2Model, num_samples: int, seconds: float, context: float) -> list[Window]:
    """Windows that give every frame of a file once; a single one where the file is not longer.

    Args:
        model: gives the frames.
        num_samples: of the file at 16 kHz.
        seconds: longest window.
        context: seconds on either side of the frames that are kept, except at the ends of the file.

    Raises:
        UserError: no frame would be kept, or these are no lengths.
    """
    if not (0 < seconds < math.inf and 0 <= context < math.inf):
        raise UserError(f"--window {seconds} --context {context}: both are numbers of seconds")
    num_frames = int(model.output_length(torch.tensor([num_samples])))
    if num_samples <= seconds * SAMPLE_RATE:
        return [Window(0, num_samples, 0, num_frames)]
    shift = frame_shift(model)
    # whole seconds, whole frames, and whole groups of merged frames
    unit = math.lcm(SAMPLE_RATE, shift * model.encoder.transformer.reduction)
    margin = math.ceil(context * SAMPLE_RATE / unit) * unit
    step = math.floor((seconds * SAMPLE_RATE - 2 * margin) / unit) * unit
    if step < unit or margin < receptive_field(model):
        least = 2 * max(margin, unit) + unit
        raise UserError(
            f"--window {seconds:g} --context {context:g}: nothing is left between the contexts; this model needs a "
            f"--context above 0 and a --window of at least {least / SAMPLE_RATE:g} s"
        )
    windows = []
    for start in range(0, num_samples, step):
        first, last = start // shift, min((start + step) // shift, num_frames)
        begin, end = max(start - margin, 0), min(start + step + margin, num_samples)
        if end == num_samples:
            last = num_frames
        windows.append(Window(begin, end, first, last))
        if last == num_frames:
            break
    return windows


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


@torch.no_grad()
def extract(
    model: Wav2Vec2Model, audio: AudioFile, windows: Sequence[Window], layers: Sequence[int]
) -> Iterator[tuple[Window, Tensor]]:
    """Run the windows one after another.

    Args:
        model: in eval mode.
        audio: the file.
        windows: of :func:`make_windows`.
        layers: which of the L + 1 states.

    Yields:
        Each window and the frames kept of it, float32 [S, T, D] on the CPU.
    """
    shift, shortest = frame_shift(model), receptive_field(model)
    weight = model.feature_extractor.dummy_weight
    for window in windows:
        count, skip = window.last - window.first, window.first - window.begin // shift
        if window.end - window.begin < shortest:
            yield window, torch.empty(len(layers), 0, model.embed_dim)
            continue
        waveform = audio.read(window.begin, window.end).to(weight)
        states, _ = model.extract_features(waveform[None], num_layers=max(layers))
        chosen = torch.stack([states[layer][0, skip : skip + count] for layer in layers])
        yield window, chosen.float().cpu()
