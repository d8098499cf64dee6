"""Waveforms of any lengths as batches for a model: their checks, batches of similar length, padding.

Shapes: B batch, N samples at 16 kHz.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .feature_extractor import SAMPLE_RATE

MAX_BATCH_SECONDS = 160.0  # padding included; bounds the memory of a long list


def check_waveforms(waveforms: Tensor | Sequence[Tensor]) -> list[Tensor]:
    """One waveform [N], a list of them or [B, N] as a list of waveforms.

    Raises:
        ValueError: a waveform that is no finite float tensor [N].
    """
    rows = [waveforms] if isinstance(waveforms, Tensor) and waveforms.dim() == 1 else list(waveforms)
    for i, row in enumerate(rows):
        if not isinstance(row, Tensor) or row.dim() != 1 or not row.is_floating_point():
            found = f"{row.dtype} {list(row.shape)}" if isinstance(row, Tensor) else type(row).__name__
            raise ValueError(f"waveform {i} must be a float tensor [samples] with full scale 1, got {found}")
        if not row.isfinite().all():
            raise ValueError(f"waveform {i} has NaN or infinite samples")
    return rows


def batches_by_length(lengths: list[int], shortest: int) -> list[list[int]]:
    """Positions of waveforms of similar length, together at most MAX_BATCH_SECONDS unless one alone is longer."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        padded = max(lengths[i], shortest) * (len(batches[-1]) + 1) if batches else 0
        if batches and padded <= MAX_BATCH_SECONDS * SAMPLE_RATE:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def pad(rows: Sequence[Tensor], shortest: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N] of at least ``shortest`` samples with device and type of ``like``, and the valid lengths [B]."""
    padded = like.new_zeros(len(rows), max(shortest, *(len(row) for row in rows)))
    for target, row in zip(padded, rows):
        target[: len(row)] = row
    return padded, torch.tensor([len(row) for row in rows], device=like.device)
