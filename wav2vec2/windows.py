"""Windows of audio that is too long for all of its frames to attend to each other.

They overlap, and every frame is taken from the window in which it has audio on both sides. They start at whole seconds,
so that frames and resampled samples fall exactly where they do in the whole.
"""

import math
from typing import NamedTuple

import torch

from .feature_extractor import SAMPLE_RATE
from .model import Wav2Vec2Model


class Window(NamedTuple):
    """Samples [begin, end) to run, at 16 kHz, and the frames [first, last) of the whole to keep of them."""

    begin: int
    end: int
    first: int
    last: int


def alignment(model: Wav2Vec2Model, seconds: float = 0.0) -> int:
    """Samples in whole seconds, frames, and groups of merged frames: the most in ``seconds``, but for one such unit."""
    unit = math.lcm(SAMPLE_RATE, model.feature_extractor.frame_shift * model.encoder.transformer.reduction)
    return max(math.floor(seconds * SAMPLE_RATE / unit), 1) * unit


def make_windows(model: Wav2Vec2Model, num_samples: int, seconds: float, context: float) -> list[Window]:
    """Windows that give every frame once; a single one where the audio is not longer.

    Args:
        model: gives the frames.
        num_samples: of the audio at 16 kHz.
        seconds: longest window.
        context: seconds on either side of the frames that are kept, except at the ends of the audio.

    Raises:
        ValueError: no frame would be kept, or these are no lengths.
    """
    if not (0 < seconds < math.inf and 0 <= context < math.inf):
        raise ValueError("the window and its context must be numbers of seconds")
    num_frames = int(model.output_length(torch.tensor([num_samples])))
    if num_samples <= seconds * SAMPLE_RATE:
        return [Window(0, num_samples, 0, num_frames)]
    shift, unit = model.feature_extractor.frame_shift, alignment(model)
    margin = math.ceil(context * SAMPLE_RATE / unit) * unit
    step = math.floor((seconds * SAMPLE_RATE - 2 * margin) / unit) * unit
    if step < unit or margin < model.feature_extractor.receptive_field:
        least = 2 * max(margin, unit) + unit
        raise ValueError(
            "nothing is left between the contexts; this model needs a context above 0 and a window of at least "
            f"{least / SAMPLE_RATE:g} s"
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
