"""Hold the sparsity at a target with an augmented Lagrangian (DPHuBERT, section 3.3; Wang et al., EMNLP 2020)."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from distillation.budget import (
    MACS_SECONDS,
    SUPERB_SAMPLES,
    Budget,
    Cost,
    Milliseconds,
    MultiplyAccumulates,
    Parameters,
    parse_target,
)
from distillation.errors import UserError, require
from distillation.latency import read_latency
from wav2vec2 import Wav2Vec2Model
from wav2vec2.architecture import architecture
from wav2vec2.checkpoint import add_masks
from wav2vec2.feature_extractor import SAMPLE_RATE
from wav2vec2.hardconcrete import HardConcrete

UNITS = {
    "conv": ("extractor_prune_conv_channels", ".hard_concrete"),
    "head": ("encoder_prune_attention_heads", ".hard_concrete_for_heads"),
    "interm": ("encoder_prune_feed_forward_intermediate", ".hard_concrete_for_intermediate"),
    "head_channel": ("encoder_prune_attention_head_channels", "_channels"),
    "attlayer": ("encoder_prune_attention_layer", ".attention.hard_concrete_for_layer"),
    "ffnlayer": ("encoder_prune_feed_forward_layer", ".feed_forward.hard_concrete_for_layer"),
}  # name in recipes -> (flag of the flat config, end of its masks' module paths)


@dataclass
class PruningConfig:
    """Joint pruning of step 1. The defaults are the published ones."""

    units: list[str] = field(default_factory=lambda: ["conv", "head", "interm"])
    """What to prune: any of conv, head, interm, attlayer, ffnlayer, or instead of head the channels of heads, one by
    one: head_channel. Empty for no pruning."""
    cost: Literal["params", "macs", "milliseconds"] = "params"
    """What the budget is of: parameters, multiply-accumulates, or time on the machine of a latency table."""
    target_sparsity: float = 0.75
    """Share of the teacher's cost to remove, in [0, 1)."""
    target: str | int | float | None = None
    """What is to stay instead, with its unit: 23.6M (parameters), 500GMACs or 35ms (of the table's utterance);
    target_sparsity is then not used."""
    macs_seconds: float | None = None
    """Length in seconds of the utterance whose multiply-accumulates are counted; null for 10 where a share is asked
    for, and for the 32 utterances of the SUPERB protocol, whose sum is published, where a target is."""
    latency: Path | None = None
    """Table of evaluation.latency, for milliseconds: measured on the machine that will run the model."""
    multiple_of: int = 1
    """Multiple that prune.py keeps of the FFN units and conv channels of each layer: 8, 16 or 32 suit many
    processors."""
    warmup_steps: int = 5000
    """Updates over which the target rises to that of the budget, from what the student lacks at the start: 0 for a copy
    of the teacher."""
    lr_masks: float = 2e-2
    """Peak learning rate of log_alpha."""
    lr_lagrangian: float = 2e-2
    """Peak learning rate of lambda1 and lambda2."""
    constant_lr: bool = False
    """Keep both rates constant instead of following the schedule of the weights (short runs need it)."""
    drop_rates: dict[str, float] = field(default_factory=dict)
    """Initial drop probability per unit kind where it differs from the published 0.01 (interm: 0.5); head_channel has
    head's where none of its own is given."""

    def __post_init__(self) -> None:
        for unit in [*self.units, *self.drop_rates]:
            if unit not in UNITS:
                raise UserError(f"pruning: unknown unit {unit!r}, choose from {', '.join(UNITS)}")
        if len(set(self.units)) != len(self.units):
            raise UserError(f"pruning.units is {self.units}: name each unit once")
        if {"head", "head_channel"} <= {*self.units}:
            raise UserError(f"pruning.units is {self.units}: a head goes with its channels: name head or head_channel")
        if self.cost == "milliseconds" and "head_channel" in self.units:
            raise UserError(
                "pruning.cost is milliseconds: tables hold times of whole heads: name head, not head_channel"
            )
        require(self, "pruning.", "lie in [0, 1)", lambda value: 0 <= value < 1, "target_sparsity")
        require(self, "pruning.", "be at least 1", lambda value: value >= 1, "multiple_of")
        require(self, "pruning.", "lie in [0.1, 86400]", lambda value: 0.1 <= value <= 86400, "macs_seconds")
        if self.target is not None:
            self.target = str(self.target)
            parse_target(self.target, self.cost, "pruning.target")
            if not self.units:
                raise UserError(
                    f"pruning.target is {self.target}, and pruning.units is empty: this recipe prunes nothing; name "
                    f"units of {', '.join(UNITS)}"
                )
        if self.cost == "milliseconds" and self.latency is None and self.units:
            raise UserError(
                "pruning.cost is milliseconds: measure the machine that will run the model by python -m "
                "evaluation.latency TEACHER --out latency.json, and name the table by --pruning.latency"
            )
        require(self, "pruning.", "be positive", lambda value: 0 < value < math.inf, "lr_masks", "lr_lagrangian")
        require(self, "pruning.", "be at least 0", lambda value: value >= 0, "warmup_steps")
        for unit, rate in self.drop_rates.items():
            if not 0 < rate < 1:
                raise UserError(f"pruning.drop_rates.{unit} is {rate}: it must lie between 0 and 1")


def make_prunable(model: Wav2Vec2Model, config: PruningConfig) -> Wav2Vec2Model:
    """The same network with masks over the units of the recipe.

    Raises:
        UserError: units that this network's heads do not have.
    """
    if architecture(model.config).uneven:
        theirs = "and the heads of this model are of unequal width"
        if "head" in config.units:
            raise UserError(f"pruning.units names head, {theirs}: name head_channel")
        if config.cost == "milliseconds":
            raise UserError(f"pruning.cost is milliseconds, {theirs}: tables hold times of whole heads")
    if "head_channel" in config.units and any(model.config.get("encoder_reuse_attention") or ()):
        raise UserError("pruning.units names head_channel, and this model reuses attention maps: name head")
    masked = add_masks(model, **{flag: unit in config.units for unit, (flag, _) in UNITS.items()})
    rates = config.drop_rates
    if "head" in rates:
        rates = {"head_channel": rates["head"]} | rates
    for name, mask in masked.masks().items():
        for unit, rate in rates.items():
            if name.endswith(UNITS[unit][1]):
                mask.reset(rate)
    return masked


def make_budget(config: PruningConfig, teacher: Wav2Vec2Model) -> Budget:
    """What a recipe asks of its pruned model.

    Args:
        config: of the recipe.
        teacher: dense.

    Raises:
        UserError: a latency table that cannot be read or is another teacher's, or a target above the teacher's cost.
    """
    cost: Cost = Parameters()
    if config.cost == "macs":
        seconds = config.macs_seconds or (MACS_SECONDS if config.target is None else None)
        cost = MultiplyAccumulates(SUPERB_SAMPLES if seconds is None else [round(seconds * SAMPLE_RATE)])
    elif config.cost == "milliseconds":
        assert config.latency is not None
        table = read_latency(config.latency)
        table.check(teacher)
        cost = Milliseconds(table)
    before = cost(teacher).item()
    if not before > 0:
        raise UserError(f"{config.latency}: by this table the teacher takes no time")
    if config.target is None:
        return Budget.of_share(cost, before, config.target_sparsity)
    target = parse_target(str(config.target), config.cost, "pruning.target")
    if target >= before:
        raise UserError(
            f"pruning.target is {config.target}: the teacher has {cost.text(before)}, there is nothing to prune"
        )
    return Budget.of_target(cost, before, target)


@torch.no_grad()
def whole_cost(student: Wav2Vec2Model, cost: Cost) -> float:
    """What a student with masks costs while all of its units are there."""
    return cost(student, lambda mask: torch.ones(len(mask), dtype=torch.float64)).item()


@torch.no_grad()
def check_budget(student: Wav2Vec2Model, budget: Budget, config: PruningConfig) -> None:
    """Look before training whether the units of the recipe can give its budget.

    Args:
        student: with masks.
        budget: of :func:`make_budget`.
        config: of the recipe.

    Raises:
        UserError: more stays when all of these units are gone, or the student has no more than that to begin with.
    """
    cost, before = budget.cost, budget.before

    def fewest(mask: HardConcrete) -> Tensor:
        kept = torch.zeros(len(mask), dtype=torch.float64)
        kept[: config.multiple_of if mask.min_live else 0] = 1
        return kept

    most = whole_cost(student, cost)
    if budget.target > most:
        raise UserError(
            f"the target is {cost.text(budget.target)}, a sparsity of {budget.sparsity:.4f}: the student has "
            f"{cost.text(most)} before it is pruned, there is nothing to prune"
        )
    least = cost(student, fewest).item()
    if budget.target < least:
        raise UserError(
            f"the target is {cost.text(budget.target)}, a sparsity of {budget.sparsity:.4f}: without any "
            f"{', '.join(config.units)} units {cost.text(least)} of {cost.text(before)} stay, a sparsity of "
            f"{budget.sparsity_of(least):.4f}"
        )


class Lagrangian(nn.Module):
    """Penalty ``lambda1 (s - t) + lambda2 (s - t)^2`` with learned, maximised multipliers that start at 0.

    s is the share of the teacher's cost that the student lacks, as an expectation over its masks; t rises linearly to
    the budget's. A student that is smaller than its teacher from the start has this as the start of its ramp: asked for
    less, it would learn that all of its masks are to stay.

    Args:
        budget: what the student is held to.
        config: the updates until the target is reached, and the rates of masks and multipliers.
        start: sparsity of the student with all of its units.
    """

    def __init__(self, budget: Budget, config: PruningConfig, start: float = 0.0) -> None:
        super().__init__()
        self.budget, self.config, self.start = budget, config, start
        self.cost = budget.cost  # its tables move with the module
        self.lambda1 = nn.Parameter(torch.zeros(()))
        self.lambda2 = nn.Parameter(torch.zeros(()))

    def target(self, step: int) -> float:
        """Target sparsity at update ``step`` (0, 1, ...)."""
        target, warmup_steps = self.budget.sparsity, self.config.warmup_steps
        return target if step >= warmup_steps else self.start + (target - self.start) * step / warmup_steps

    def sparsity(self, cost: Tensor) -> Tensor:
        """Expected sparsity (float32 scalar) from the expected cost (float64 scalar)."""
        return self.budget.sparsity_of(cost).float()

    def forward(self, cost: Tensor, step: int) -> Tensor:
        """Penalty (scalar) at update ``step``, from the expected cost (float64 scalar)."""
        gap = self.sparsity(cost) - self.target(step)
        return self.lambda1 * gap + self.lambda2 * gap.square()
