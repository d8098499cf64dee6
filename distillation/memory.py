"""Out of GPU memory: measure what would have fitted, and say it in the recipe's terms."""

from __future__ import annotations

import contextlib
import gc
import math
import traceback
from collections.abc import Callable

import torch
from torch import Tensor, nn

from distillation.batching import DataConfig
from distillation.config import TrainerConfig

PROBE_SECONDS = 8.0
USABLE = 0.9  # of the memory; the rest is lost to fragments and to steps that keep more units alive


def advice(
    error: torch.OutOfMemoryError,
    module: nn.Module,
    loss: Callable[[Tensor], Tensor],
    data: DataConfig,
    trainer: TrainerConfig,
    has_optimizer_state: bool,
) -> str:
    """What to set instead, in one line; runs a small step to find out.

    Args:
        error: the allocation that failed; the tensors of its stack frames are freed.
        module: what is trained, still on the GPU.
        loss: of waveforms [B, N].
        data: how the failed batch was made.
        trainer: batches per update.
        has_optimizer_state: whether an update has been made before.
    """
    traceback.clear_frames(error.__traceback__)
    seconds = math.nan
    with contextlib.suppress(torch.OutOfMemoryError):
        seconds = seconds_that_fit(module, loss, data.sample_rate, has_optimizer_state)
    longest = data.max_frames / data.sample_rate
    if not seconds >= longest:
        found = "" if math.isnan(seconds) else f", about {seconds:.0f} s fit"
        return (
            f"out of GPU memory{found}, and utterances are up to {longest:g} s long: lower --data.max_frames "
            "(with --data.long split nothing is lost), or use a GPU with more memory"
        )
    if data.utterances_per_batch is not None:
        parts = math.ceil(data.utterances_per_batch * longest / seconds)
        smaller = f"--data.utterances_per_batch {max(1, data.utterances_per_batch // parts)}"
    else:
        parts = max(2, math.ceil(data.seconds_per_batch / seconds))
        smaller = f"--data.seconds_per_batch {max(longest, data.seconds_per_batch / parts):.4g}"
    return (
        f"out of GPU memory: batches of about {seconds:.0f} s fit; set {smaller} and "
        f"--trainer.batches_per_update {trainer.batches_per_update * parts} for the same update"
        + ("" if trainer.recompute else ", or try --trainer.recompute true")
    )


def seconds_that_fit(
    module: nn.Module, loss: Callable[[Tensor], Tensor], sample_rate: int, has_optimizer_state: bool
) -> float:
    """Seconds of audio in the largest batch that one GPU can train on, from the memory that a short one takes."""
    params = [p for p in module.parameters() if p.requires_grad]
    for p in params:
        p.grad = None
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    waveforms = 0.1 * torch.randn(1, int(PROBE_SECONDS * sample_rate), device=params[0].device)
    # not backward(): the other processes do not take part
    torch.autograd.grad(loss(waveforms), params, allow_unused=True)
    per_second = (torch.cuda.max_memory_allocated() - before) / PROBE_SECONDS
    gc.collect()
    torch.cuda.empty_cache()
    weights = sum(p.numel() * p.element_size() for p in params)
    kept = weights if has_optimizer_state else 3 * weights  # gradients, and the two moments of AdamW
    return (USABLE * torch.cuda.mem_get_info()[0] - kept) / per_second
