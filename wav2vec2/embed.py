"""Waveforms of any lengths as batches for a model: their checks, batches of similar length, padding.

Shapes: B batch, N samples at 16 kHz.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .feature_extractor import SAMPLE_RATE
from .inputs import describe

MAX_BATCH_SECONDS = 160.0  # padding included; bounds the memory of a long list
MAX_CHANNELS = 32  # of a recording: so few samples are no waveform


def check_waveforms(waveforms: object) -> list[Tensor]:
    """One waveform [N], several of them or [B, N], tensors or numpy arrays, as a list of tensors.

    Raises:
        ValueError: a waveform that is not [N], finite and float; or [N, channels], as soundfile reads.
    """
    waveforms = from_numpy(waveforms)
    if isinstance(waveforms, Tensor):
        if waveforms.dim() == 2 and waveforms.shape[1] <= MAX_CHANNELS < len(waveforms):
            raise ValueError(f"waveforms {list(waveforms.shape)} look like [samples, channels]: average the channels")
        rows = [waveforms] if waveforms.dim() < 2 else list(waveforms)
    elif isinstance(waveforms, Iterable) and not hasattr(waveforms, "__array_interface__"):
        rows = [from_numpy(row) for row in waveforms]
    else:
        raise ValueError(f"waveforms must be float tensors or numpy arrays, got {describe(waveforms)}")
    for i, row in enumerate(rows):
        if not isinstance(row, Tensor) or row.dim() != 1 or not row.is_floating_point():
            raise ValueError(
                f"waveform {i} must be a float tensor [samples] with full scale 1 (int16 / 32768), got {describe(row)}"
            )
        if not row.isfinite().all():
            raise ValueError(f"waveform {i} has NaN or infinite samples")
    return rows


def from_numpy(value: Any) -> Any:
    """A numpy array as a tensor, anything else as it is; works where numpy is not installed."""
    if isinstance(value, Tensor) or not hasattr(value, "__array_interface__"):
        return value
    try:  # a copy: torch does not share what is read-only, reversed or of another byte order
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C"))
    except TypeError:  # no type of torch's, such as text
        return value


def batches_by_length(lengths: Sequence[int], shortest: int, max_seconds: float = MAX_BATCH_SECONDS) -> list[list[int]]:
    """Positions of waveforms of similar length, padded at most ``max_seconds`` unless one alone is longer."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        padded = max(lengths[i], shortest) * (len(batches[-1]) + 1) if batches else 0
        if batches and padded <= max_seconds * SAMPLE_RATE:
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
