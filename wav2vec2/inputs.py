"""What a model refuses to run on, in one line that says what to do.

Nothing here waits for a GPU: what only the device knows stays unchecked.

Shapes: B batch, N samples at 16 kHz.
"""

import operator

import torch
from torch import Tensor


def describe(value: object) -> str:
    """Type and shape, for a message."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        kind = "" if isinstance(value, Tensor) else f"{type(value).__name__} of "
        return f"{kind}{value.dtype} {list(value.shape)}"
    return type(value).__name__


def check_index(name: str, value: object, low: int, high: float, range_of: str) -> int:
    """A whole number from ``low`` to ``high``; ``range_of`` says in words what these are.

    Raises:
        ValueError: anything else.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None
    if not low <= number <= high:
        raise ValueError(f"{name} {number}: {range_of}")
    return number


def check_batch(waveforms: Tensor, lengths: Tensor | None, weight: Tensor, shortest: int) -> None:
    """Look whether a batch is one that the model can run.

    Args:
        waveforms: [B, N] float, of the weights' type unless autocast converts it.
        lengths: [B] valid samples, int64 or int32 on the same device, 0 to N; None when nothing is padded.
        weight: of the layer that the waveforms go to.
        shortest: samples of one frame.

    Raises:
        ValueError: naming what is given and what to give instead.
    """
    if not isinstance(waveforms, Tensor):
        raise ValueError(
            f"waveforms must be a tensor [batch, samples], got {describe(waveforms)}: embed() takes others"
        )
    if not waveforms.is_floating_point():
        raise ValueError(
            f"waveforms must be floats with full scale 1, got {waveforms.dtype}: divide by full scale, 32768 for int16"
        )
    if waveforms.dim() != 2:
        raise ValueError(f"waveforms must be [batch, samples], got shape {tuple(waveforms.shape)}")
    num_rows, num_samples = waveforms.shape
    if not num_rows:
        raise ValueError("waveforms [0, samples]: an empty batch")
    if num_samples < shortest:
        raise ValueError(
            f"waveforms of {num_samples} samples give no frame, which takes {shortest}: pad them with zeros and say in "
            "lengths what is valid"
        )
    # layers that are offloaded have their weights on "meta" until they run
    if weight.device.type != "meta" and waveforms.device != weight.device:
        raise ValueError(f"waveforms are on {waveforms.device}, the model on {weight.device}: move one to the other")
    if waveforms.dtype != weight.dtype and not _autocast_converts(waveforms):
        raise ValueError(
            f"waveforms are {waveforms.dtype}, the model {weight.dtype}: give waveforms.to({weight.dtype})"
        )
    if lengths is None:
        return
    check_lengths(lengths)
    if lengths.shape != (num_rows,):
        raise ValueError(f"lengths must be [{num_rows}], got shape {tuple(lengths.shape)}")
    if lengths.device != waveforms.device:
        raise ValueError(f"lengths are on {lengths.device}, waveforms on {waveforms.device}: move one to the other")
    if lengths.device.type == "cpu" and ((lengths < 0) | (lengths > num_samples)).any():  # elsewhere it would wait
        if (lengths < 0).any():
            raise ValueError(f"lengths {lengths.tolist()} must not be negative")
        raise ValueError(f"lengths {lengths.tolist()} exceed the {num_samples} samples of the waveforms")


def check_lengths(lengths: Tensor) -> None:
    """Look whether lengths are whole numbers of samples; unsigned and shorter integers would overflow.

    Raises:
        ValueError: they are not.
    """
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"lengths must be an int64 tensor [batch] of samples, got {describe(lengths)}")


def _autocast_converts(waveforms: Tensor) -> bool:
    return waveforms.dtype != torch.float64 and torch.is_autocast_enabled(waveforms.device.type)
