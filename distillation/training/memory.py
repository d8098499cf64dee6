"""How large a micro-batch fits on a GPU, in the recipe's terms: searched before a run, or told after it ran out."""

import gc
import hashlib
import json
import logging
import math
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from distillation.config import Recipe, TrainerConfig, flat_settings
from distillation.data.config import DataConfig
from distillation.errors import UserError, is_out_of_gpu_memory
from distillation.recognition.labels import trial_labels
from distillation.training.step import TrainingStep

BATCH = "batch.yaml"  # in the folder of a run: micro-batches that fit
PROBE_SECONDS = 8.0
USABLE = 0.9  # of the memory; the rest is lost to fragments and to steps that keep more units alive
logger = logging.getLogger(__name__)


def probe_lengths(waveforms: Tensor, data: DataConfig) -> Tensor | None:
    """Samples [B] in the rows of a batch [B, N] that is to need as much memory as those of ``data``.

    Where nothing is cropped a row is padded, as most batches then are: attention with a mask has other kernels.
    """
    if data.crop:
        return None
    lengths = torch.full((len(waveforms),), waveforms.shape[1], device=waveforms.device)
    lengths[-1] -= waveforms.shape[1] // 8
    return lengths


def probe_loss(step: TrainingStep, waveforms: Tensor, data: DataConfig, update: int) -> Tensor:
    """The loss of an update on waveforms [B, N] that takes the time and the memory of real ones, once all learn."""
    aux = step.student.aux
    labels = None
    if step.objectives.uses_labels and aux is not None:
        labels = trial_labels(waveforms, aux.out_features, data.sample_rate)
    update = max(update, step.optim.freeze_steps)
    return step.loss(waveforms, probe_lengths(waveforms, data), update, labels=labels).total


class TrialUpdates:
    """Updates that change nothing: all that takes memory.

    Args:
        step: its modules on the GPU.
        dtype: of the training step.
        data: how batches are made.
    """

    def __init__(self, step: TrainingStep, dtype: torch.dtype, data: DataConfig) -> None:
        self.step, self.dtype, self.data = step, dtype, data
        step.trained.train()
        self.optimizer = step.make_optimizer()
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0  # the masks stay where they start

    def __call__(self, waveforms: Tensor) -> None:
        """One update from waveforms [B, N]."""
        try:
            with torch.autocast(waveforms.device.type, self.dtype, enabled=self.dtype != torch.float32):
                loss = probe_loss(self.step, waveforms, self.data, 0)
            loss.backward()
            self.step.clip(self.optimizer)
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)


def largest_batch(has_room: Callable[[int], bool], most: int) -> int:
    """The largest number of utterances for which ``has_room`` is true, up to ``most``; 0 if not even for one.

    Doubles until it fails, then halves the interval: about 2 log2 tries.
    """
    low, high = 0, 1
    while high <= most and has_room(high):
        low, high = high, 2 * high
    high = min(high, most + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if has_room(middle):
            low = middle
        else:
            high = middle
    return low


def runs_in_memory(step: Callable[[], object]) -> bool:
    """Whether ``step`` runs within the GPU's memory, which is emptied of what it leaves in the cache."""
    try:
        step()
    except RuntimeError as error:
        if not is_out_of_gpu_memory(error):
            raise
        found = False
    else:
        found = True
    gc.collect()
    torch.cuda.empty_cache()
    return found


def search(step: Callable[[Tensor], None], data: DataConfig, most_seconds: float, device: torch.device) -> float:
    """Seconds of audio in the largest micro-batch that can be trained on, by trying.

    Args:
        step: one update from waveforms [B, N].
        data: its longest utterances are what is tried: attention makes them the most expensive.
        most_seconds: more is not tried.
        device: of the waveforms.

    Raises:
        UserError: not even one utterance fits.
    """
    longest = data.max_seconds

    def tried(count: int) -> bool:
        found = runs_in_memory(lambda: step(0.1 * torch.randn(count, data.max_frames, device=device)))
        logger.info("%d x %g s: %s", count, longest, "fits" if found else "out of memory")
        return found

    count = largest_batch(tried, max(1, int(most_seconds / longest)))
    if count == 0:
        raise UserError(
            f"not even one utterance of {longest:g} s fits: lower --data.max_frames (with --data.long split nothing is "
            "lost), try --trainer.recompute true, or use a GPU with more memory"
        )
    return max(longest, USABLE * count * longest)


def searched_for(recipe: Recipe) -> str:
    """A comment for a YAML: a digest of all that decides about the memory of a step, and the GPU where there is one."""
    machine = ("devices", "num_nodes", "precision", "teacher_precision", "recompute", "batches_per_update")
    decide = ("student.", "objective.", "pruning.units", "data.", *(f"trainer.{name}" for name in machine))
    used = {name: value for name, value in flat_settings(recipe).items() if name.startswith(decide)}
    models = [path for path in (recipe.teacher_ckpt, recipe.student_ckpt) if path is not None and path.exists()]
    digest = hashlib.sha256(json.dumps([used, [path.stat().st_size for path in models]]).encode()).hexdigest()
    return f"# {digest} {torch.cuda.get_device_name() if torch.cuda.is_available() else ''}".rstrip()


def is_current(path: Path, searched: str) -> bool:
    """Whether batch.yaml is of this search; on a machine without a GPU whichever it was made for."""
    first = path.read_text(encoding="utf-8", errors="replace").partition("\n")[0] if path.is_file() else ""
    return first == searched or (first.startswith(f"{searched} ") and not torch.cuda.is_available())


def same_update(data: DataConfig, trainer: TrainerConfig, world_size: int, seconds: float) -> tuple[str, float, int]:
    """Cut the recipe's update into as few micro-batches as fit.

    Args:
        data: as in the recipe.
        trainer: as in the recipe.
        world_size: processes, each of which must get as many micro-batches.
        seconds: of audio that fit in one.

    Returns:
        Which setting of ``data`` changes, its value, and the number of micro-batches.

    Raises:
        UserError: no way of cutting fits.
    """
    count, longest = trainer.batches_per_update, data.max_seconds
    if data.utterances_per_batch is not None:
        total = data.utterances_per_batch * count
        for parts in range(world_size, total + 1, world_size):
            if total % parts == 0 and total // parts * longest <= seconds:
                return "utterances_per_batch", total // parts, parts
        what = f"{total} utterances"
    else:
        total_seconds = data.seconds_per_batch * count
        parts = math.ceil(total_seconds / (seconds * world_size)) * world_size
        if total_seconds / parts >= longest:
            return "seconds_per_batch", total_seconds / parts, parts
        what = f"{total_seconds:g} s"
    raise UserError(
        f"an update of {what} cannot be cut into equal micro-batches of at most {seconds:g} s and at least one "
        f"utterance of {longest:g} s for {world_size} process(es): use another number of GPUs, or lower "
        "--data.max_frames"
    )


def advice(
    error: BaseException,
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
    try:
        seconds = seconds_that_fit(module, loss, data.sample_rate, has_optimizer_state)
    except RuntimeError as again:
        if not is_out_of_gpu_memory(again):
            raise
        seconds = math.nan
    longest = data.max_seconds
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
