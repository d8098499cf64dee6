"""Optimizer groups and learning-rate schedules."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from distillation.errors import require
from distillation.sparsity import Lagrangian

NEW = "new"  # group of heads and output layer, where they learn in another way than the rest


@dataclass
class OptimConfig:
    """Length and learning rates of one step. Updates are optimizer steps, whatever the accumulation."""

    max_steps: int = 50000
    """Updates."""
    max_epochs: int | None = None
    """Length in passes over the data instead; max_steps is then not used."""
    lr: float = 2e-4
    """Peak learning rate of the weights and heads."""
    warmup_steps: int = 15000
    """Updates of linear warm-up; the last of them has the peak rate."""
    freeze_steps: int = 0
    """Updates at the start in which heads and output layer alone learn; the warm-up of the rest begins after them."""
    lr_new: float | None = None
    """Peak learning rate of heads and output layer; null for that of the weights."""
    warmup_ratio: float | None = None
    """Warm-up as a share of all updates after the freeze instead; warmup_steps is then not used."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """After the warm-up: linear decay, half a cosine, or no decay; 0 would come just after the last update."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW moment decay rates."""
    eps: float = 1e-8
    """AdamW epsilon."""
    weight_decay: float = 0.0
    """AdamW weight decay of what decays."""
    decays: Literal["matrices", "all_but_biases"] = "matrices"
    """What decays: parameters of at least two dimensions, or also the weights of norms and the mask embedding, as in
    the released code of the fixed students."""
    clip: float | None = 10.0
    """Largest norm of the whole gradient; null for no clipping."""

    def __post_init__(self) -> None:
        require(self, "", "be at least 1", lambda value: value >= 1, "max_steps")
        require(self, "", "be at least 1, or null", lambda value: value >= 1, "max_epochs")
        require(self, "", "lie in [0, 1]", lambda value: 0 <= value <= 1, "warmup_ratio")
        require(self, "", "be at least 0", lambda value: 0 <= value < math.inf, "warmup_steps", "weight_decay")
        require(self, "", "be positive", lambda value: 0 < value < math.inf, "lr", "eps", "lr_new")
        require(self, "", "be at least 0", lambda value: value >= 0, "freeze_steps")
        require(self, "", "be two numbers in [0, 1)", lambda value: all(0 <= beta < 1 for beta in value), "betas")
        require(self, "", "be positive, or null for no clipping", lambda value: 0 < value < math.inf, "clip")

    def resolved(self, updates_of: Callable[[int], int]) -> OptimConfig:
        """The same with its length and its warm-up in updates.

        Args:
            updates_of: how many updates a number of epochs holds.
        """
        steps = self.max_steps if self.max_epochs is None else updates_of(self.max_epochs)
        left = max(0, steps - self.freeze_steps)
        warmup = self.warmup_steps if self.warmup_ratio is None else round(self.warmup_ratio * left)
        return dataclasses.replace(self, max_steps=steps, max_epochs=None, warmup_steps=warmup, warmup_ratio=None)


def lr_factor(step: int, warmup_steps: int, max_steps: int, schedule: str) -> float:
    """Share of the peak rate at update ``step`` = 0 .. max_steps - 1.

    Reaches 1 at the end of the warm-up and would reach 0 just after the last update, so that no update is wasted on a
    rate of 0 (the released system's last is).
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    remaining = (max_steps - step) / max(1, max_steps - warmup_steps)
    remaining = min(1.0, max(0.0, remaining))
    if schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * remaining))
    return remaining


def group_factor(name: str, step: int, optim: OptimConfig) -> float:
    """Share of its peak rate that a group has at update ``step`` = 0 .. max_steps - 1."""
    freeze = optim.freeze_steps
    if name == NEW and freeze:
        return lr_factor(step, 0, optim.max_steps, optim.schedule)
    if step < freeze:
        return 0.0
    return lr_factor(step - freeze, optim.warmup_steps, optim.max_steps - freeze, optim.schedule)


def param_groups(
    module: nn.Module, lagrangian: Lagrangian | None, optim: OptimConfig, new: Container[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """Optimizer groups: weights (decayed or not), new parts where they learn in another way, mask parameters, and the
    maximised multipliers.

    Every trainable parameter is in exactly one group.

    Args:
        module: everything that is trained.
        lagrangian: its multipliers; None where nothing is pruned.
        optim: rates.
        new: parameters of heads and output layer.
    """
    multipliers = [] if lagrangian is None else list(lagrangian.parameters())
    apart = optim.lr_new is not None or optim.freeze_steps > 0
    masks, decayed, plain, heads = [], [], [], []
    for name, p in module.named_parameters():
        if not p.requires_grad or any(p is m for m in multipliers):
            continue
        if apart and p in new:
            heads.append(p)
        elif name.endswith("log_alpha"):
            masks.append(p)
        elif "bias" in name.rpartition(".")[2] or (p.dim() < 2 and optim.decays == "matrices"):
            plain.append(p)
        else:
            decayed.append(p)
    groups: list[dict[str, Any]] = [
        {"name": "weights", "params": decayed, "lr": optim.lr, "weight_decay": optim.weight_decay},
        {"name": "biases_norms", "params": plain, "lr": optim.lr, "weight_decay": 0.0},
        {"name": NEW, "params": heads, "lr": optim.lr_new or optim.lr, "weight_decay": optim.weight_decay},
    ]
    if lagrangian is not None:
        rates = lagrangian.config
        groups += [
            {"name": "log_alpha", "params": masks, "lr": rates.lr_masks, "weight_decay": 0.0},
            {"name": "lambda", "params": multipliers, "lr": rates.lr_lagrangian, "weight_decay": 0.0, "maximize": True},
        ]
    grouped = [p for group in groups for p in group["params"]]
    trainable = {p for p in module.parameters() if p.requires_grad}
    assert len(grouped) == len(set(grouped)) and set(grouped) == trainable, "a parameter is in no group, or in two"
    return [group for group in groups if group["params"]]
