"""Waveforms in, features out: what a program that uses a model needs, padding and time stamps included.

Shapes: N samples at 16 kHz, T frames at 50 Hz, D Transformer width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .model import Wav2Vec2Model

SAMPLE_RATE = 16_000  # of every model of this family, in Hz
MAX_BATCH_SECONDS = 160.0  # padding included; bounds the memory of a long list


@torch.no_grad()
def embed(model: Wav2Vec2Model, waveforms: Tensor | Sequence[Tensor], layer: int = -1) -> list[Tensor]:
    """One layer's features [T, D] of each waveform [N]; see :meth:`Wav2Vec2Model.embed`.

    Raises:
        ValueError: no such layer, or a waveform that is no finite float tensor [N].
    """
    rows = [waveforms] if isinstance(waveforms, Tensor) and waveforms.dim() == 1 else list(waveforms)
    num_states = model.num_layers + 1
    if not -num_states <= layer < num_states:
        raise ValueError(f"layer {layer}: the model has states 0 (the Transformer's input) to {model.num_layers}")
    weight = model.feature_extractor.dummy_weight
    for i, row in enumerate(rows):
        if not isinstance(row, Tensor) or row.dim() != 1 or not row.is_floating_point():
            found = f"{row.dtype} {list(row.shape)}" if isinstance(row, Tensor) else type(row).__name__
            raise ValueError(f"waveform {i} must be a float tensor [samples] with full scale 1, got {found}")
        if not row.isfinite().all():
            raise ValueError(f"waveform {i} has NaN or infinite samples")
    training = model.training
    model.eval()
    try:
        features: list[Tensor] = [weight.new_empty(0)] * len(rows)
        for batch in _batches([len(row) for row in rows], receptive_field(model)):
            num_samples = max(receptive_field(model), *(len(rows[i]) for i in batch))
            padded = weight.new_zeros(len(batch), num_samples)
            for row, i in zip(padded, batch):
                row[: len(rows[i])] = rows[i]
            lengths = torch.tensor([len(rows[i]) for i in batch], device=weight.device)
            states, frames = model.extract_features(padded, lengths, num_layers=layer % num_states)
            assert frames is not None
            for i, state, count in zip(batch, states[-1], frames.tolist()):
                features[i] = state[:count].clone()
    finally:
        model.train(training)
    return features


def _batches(lengths: list[int], shortest: int) -> list[list[int]]:
    """Positions of waveforms of similar length, together at most MAX_BATCH_SECONDS unless one alone is longer."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        padded = max(lengths[i], shortest) * (len(batches[-1]) + 1) if batches else 0
        if batches and padded <= MAX_BATCH_SECONDS * SAMPLE_RATE:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def frame_shift(model: Wav2Vec2Model) -> int:
    """Samples from one frame to the next: 320 for every published model."""
    shift = 1
    for layer in model.feature_extractor.conv_layers:
        shift *= layer.conv.stride[0]
    return shift


def receptive_field(model: Wav2Vec2Model) -> int:
    """Samples that the convolutions of one frame see: 400 for every published model."""
    field, shift = 1, 1
    for layer in model.feature_extractor.conv_layers:
        field += (layer.conv.kernel_size[0] - 1) * shift
        shift *= layer.conv.stride[0]
    return field


def frame_times(model: Wav2Vec2Model, num_frames: int) -> Tensor:
    """Middle of each frame's receptive field in seconds from the start of the audio, float64 [T]."""
    start = receptive_field(model) / 2
    return (torch.arange(num_frames, dtype=torch.float64) * frame_shift(model) + start) / SAMPLE_RATE
