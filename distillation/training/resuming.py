"""Checkpoints of a run: whole or not there; what does not fit is refused in one line before anything is trained."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor

from distillation.errors import UserError
from distillation.training.lightning_internals import wrap_restoring
from wav2vec2 import CheckpointError
from wav2vec2.checkpoint import read_torch_file, write_torch_file

# what reading and fitting a checkpoint of the right kind with wrong content raises
UNREADABLE = (KeyError, TypeError, AttributeError, ValueError, IndexError, AssertionError)
AFRESH = "move it away to start afresh"


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint appears under its name when it is complete, never before; reading one executes nothing."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write to a temporary name, flush, rename."""
        write_torch_file(path, checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read tensors and plain types, to the CPU."""
        return read_torch_file(path)


def read_run(path: Path) -> dict[str, Any]:
    """Content of a checkpoint that Lightning has written; ``global_step`` says after how many updates.

    Raises:
        UserError: another kind of file.
        CheckpointError: a damaged one.
    """
    content = read_torch_file(path)
    step = content.get("global_step")
    if not isinstance(step, int) or step < 0 or "pytorch-lightning_version" not in content:
        raise UserError(f"{path}: not a checkpoint of a run: {AFRESH}")
    return content


def supervise_restoring(trainer: pl.Trainer, content: dict[str, Any], source: Path) -> None:
    """Let the trainer take a checkpoint so that all that its content makes fail is a UserError, and nothing else is.

    Args:
        trainer: about to fit from ``source``.
        content: of the checkpoint; emptied when it has been taken.
        source: its file.
    """
    step = content["global_step"]

    def wrap(what: str, restore: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            fitting = trainer.state.fn == "fit"  # a validation after the training restores nothing
            try:
                if fitting and what == "state":
                    _check_kinds(trainer, content)
                restore(*args, **kwargs)
                if fitting and what == "state":
                    _check_moments(trainer.optimizers[0])
            except UNREADABLE as error:
                if isinstance(error, UserError | CheckpointError):
                    raise
                reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
                raise UserError(f"{source}: cannot be continued ({reason}): {AFRESH}") from error
            if fitting and what == "state":
                content.clear()
                if trainer.global_step != step:
                    raise UserError(f"{source}: does not say where it stands in the data: {AFRESH}")

        return run

    wrap_restoring(trainer, wrap)


def _check_kinds(trainer: pl.Trainer, content: dict[str, Any]) -> None:
    """Wrong kinds of values would be taken, and fail in the updates that follow."""
    found: dict[str, tuple[Any, Any]] = {
        "optimizer": (
            content["optimizer_states"][0]["param_groups"],
            trainer.optimizers[0].state_dict()["param_groups"],
        ),
        "schedule": (content["lr_schedulers"][0], trainer.lr_scheduler_configs[0].scheduler.state_dict()),
    }
    if "loops" in content:
        found["loops"] = content["loops"]["fit_loop"], trainer.fit_loop.state_dict()
    for name, (ours, fresh) in found.items():
        if not _same_kind(ours, fresh):
            raise ValueError(f"its {name} holds other kinds of values")


def _same_kind(found: Any, fresh: Any) -> bool:
    """Whether a value is made as a fresh one: numbers where numbers are, under the names that both have."""
    if isinstance(fresh, dict):
        return isinstance(found, dict) and all(
            _same_kind(found[key], fresh[key]) for key in fresh.keys() & found.keys()
        )
    if isinstance(fresh, list | tuple):
        same_length = isinstance(found, list | tuple) and len(found) == len(fresh)
        return same_length and all(map(_same_kind, found, fresh))
    if isinstance(fresh, bool) or fresh is None:
        return isinstance(found, bool) or found is None
    if isinstance(fresh, int | float):
        return isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found)
    return type(found) is type(fresh)


def _check_moments(optimizer: torch.optim.Optimizer) -> None:
    """The fused update trusts the shapes of its state."""
    for p, state in optimizer.state.items():
        moments = [state.get("exp_avg"), state.get("exp_avg_sq")]
        fit = all(isinstance(m, Tensor) and m.shape == p.shape and m.dtype == p.dtype for m in moments)
        step = state.get("step")
        if not fit or not isinstance(step, Tensor) or step.numel() != 1 or step.dtype != torch.float32:
            raise ValueError("its optimizer state does not fit")
