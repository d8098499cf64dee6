"""Features of audio of any length, in bounded memory.

Long audio is cut into windows that overlap. Every frame is taken from the window in which it has audio on both sides,
and windows start at whole seconds, so that frames and resampled samples fall exactly where they do in the whole.

Shapes: S states, T frames, D width.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .feature_extractor import SAMPLE_RATE
from .model import Wav2Vec2Model


class Window(NamedTuple):
    """Samples [begin, end) to run, at 16 kHz, and the frames [first, last) of the whole to keep of them."""

    begin: int
    end: int
    first: int
    last: int


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
    shift = model.feature_extractor.frame_shift
    # whole seconds, whole frames, and whole groups of merged frames
    unit = math.lcm(SAMPLE_RATE, shift * model.encoder.transformer.reduction)
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


@torch.no_grad()
def extract(
    model: Wav2Vec2Model, read: Callable[[int, int], Tensor], windows: Sequence[Window], layers: Sequence[int]
) -> Iterator[tuple[Window, Tensor]]:
    """Run the windows one after another.

    Args:
        model: in eval mode.
        read: gives the samples [begin, end) at 16 kHz.
        windows: of :func:`make_windows`.
        layers: which of the L + 1 states.

    Yields:
        Each window and the frames kept of it, float32 [S, T, D] on the CPU.
    """
    shift, shortest = model.feature_extractor.frame_shift, model.feature_extractor.receptive_field
    weight = model.feature_extractor.dummy_weight
    for window in windows:
        count, skip = window.last - window.first, window.first - window.begin // shift
        if window.end - window.begin < shortest:
            yield window, torch.empty(len(layers), 0, model.embed_dim)
            continue
        waveform = read(window.begin, window.end).to(weight)
        states, _ = model.extract_features(waveform[None], num_layers=max(layers))
        chosen = torch.stack([states[layer][0, skip : skip + count] for layer in layers])
        yield window, chosen.float().cpu()
