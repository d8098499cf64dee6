"""Checkpoints of a run: whole or not there; what does not fit is refused in one line before anything is trained."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO
from torch import Tensor

from distillation.errors import UserError
from distillation.training.lightning_internals import wrap_restoring
from distillation.training.standing import AFRESH
from wav2vec2 import CheckpointError
from wav2vec2.checkpoint import read_torch_file, write_torch_file

# what reading and fitting a checkpoint of the right kind with wrong content raises
UNREADABLE = (KeyError, TypeError, AttributeError, ValueError, IndexError, AssertionError)


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint appears under its name when it is complete, never before; reading one executes nothing."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write to a temporary name, flush, rename."""
        write_torch_file(path, checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read tensors and plain types, to the CPU."""
        return read_torch_file(path)


def check_state(module: pl.LightningModule, content: Mapping[str, Any], source: Path) -> None:
    """Refuse a checkpoint whose tensors are not those of the module.

    Raises:
        UserError: naming ``source``.
    """
    state, expected = content.get("state_dict"), module.state_dict()
    if not isinstance(state, dict) or state.keys() != expected.keys():
        raise UserError(f"{source}: holds another network or objective than this run: use another --exp_dir")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.shape != expected[name].shape:
            raise UserError(f"{source}: {name} does not fit this run: use another --exp_dir")


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
            rates: list[dict[str, Any]] = []
            try:
                if fitting and what == "state":
                    _check_kinds(trainer, content)
                    rates = _rates_of(trainer.optimizers[0])
                restore(*args, **kwargs)
                if fitting and what == "state":
                    _check_moments(trainer.optimizers[0])
                    _set_rates(trainer, rates)
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


def _rates_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Settings of the groups of an optimizer that no update has changed."""
    return [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in optimizer.param_groups]


def _set_rates(trainer: pl.Trainer, rates: list[dict[str, Any]]) -> None:
    """Rates are the command's, which are the checkpoint's unless they were changed on request; moments are its own."""
    scheduler: Any = trainer.lr_scheduler_configs[0].scheduler
    scheduler.base_lrs = [settings["initial_lr"] for settings in rates]
    factors = (factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas)
    scheduler._last_lr = [base * factor for base, factor in zip(scheduler.base_lrs, factors)]
    for group, settings, lr in zip(trainer.optimizers[0].param_groups, rates, scheduler._last_lr):
        group.update(settings, lr=lr)


def _check_moments(optimizer: torch.optim.Optimizer) -> None:
    """The fused update trusts the shapes of its state."""
    for p, state in optimizer.state.items():
        moments = [state.get("exp_avg"), state.get("exp_avg_sq")]
        fit = all(isinstance(m, Tensor) and m.shape == p.shape and m.dtype == p.dtype for m in moments)
        step = state.get("step")
        if not fit or not isinstance(step, Tensor) or step.numel() != 1 or step.dtype != torch.float32:
            raise ValueError("its optimizer state does not fit")
