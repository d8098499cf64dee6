"""Hold the sparsity at a target with an augmented Lagrangian (DPHuBERT, section 3.3; Wang et al., EMNLP 2020)."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from distillation.errors import UserError, require
from wav2vec2 import Wav2Vec2Model
from wav2vec2.checkpoint import add_masks

UNITS = {
    "conv": ("extractor_prune_conv_channels", ".hard_concrete"),
    "head": ("encoder_prune_attention_heads", ".hard_concrete_for_heads"),
    "interm": ("encoder_prune_feed_forward_intermediate", ".hard_concrete_for_intermediate"),
    "attlayer": ("encoder_prune_attention_layer", ".attention.hard_concrete_for_layer"),
    "ffnlayer": ("encoder_prune_feed_forward_layer", ".feed_forward.hard_concrete_for_layer"),
}  # name in recipes -> (flag of the flat config, end of the mask's module path)


@dataclass
class PruningConfig:
    """Joint pruning of step 1. The defaults are the published ones."""

    units: list[str] = field(default_factory=lambda: ["conv", "head", "interm"])
    """What to prune: any of conv, head, interm, attlayer, ffnlayer. Empty for no pruning."""
    target_sparsity: float = 0.75
    """Share of the teacher's parameters to remove, in [0, 1)."""
    warmup_steps: int = 5000
    """Updates over which the target rises from 0 to target_sparsity."""
    lr_masks: float = 2e-2
    """Peak learning rate of log_alpha."""
    lr_lagrangian: float = 2e-2
    """Peak learning rate of lambda1 and lambda2."""
    constant_lr: bool = False
    """Keep both rates constant instead of following the schedule of the weights (short runs need it)."""
    drop_rates: dict[str, float] = field(default_factory=dict)
    """Initial drop probability per unit kind where it differs from the published 0.01 (interm: 0.5)."""

    def __post_init__(self) -> None:
        for unit in [*self.units, *self.drop_rates]:
            if unit not in UNITS:
                raise UserError(f"pruning: unknown unit {unit!r}, choose from {', '.join(UNITS)}")
        if len(set(self.units)) != len(self.units):
            raise UserError(f"pruning.units is {self.units}: name each unit once")
        require(self, "pruning.", "lie in [0, 1)", lambda value: 0 <= value < 1, "target_sparsity")
        require(self, "pruning.", "be positive", lambda value: 0 < value < math.inf, "lr_masks", "lr_lagrangian")
        require(self, "pruning.", "be at least 0", lambda value: value >= 0, "warmup_steps")
        for unit, rate in self.drop_rates.items():
            if not 0 < rate < 1:
                raise UserError(f"pruning.drop_rates.{unit} is {rate}: it must lie between 0 and 1")


def make_prunable(model: Wav2Vec2Model, config: PruningConfig) -> Wav2Vec2Model:
    """The same network with masks over the units of the recipe."""
    masked = add_masks(model, **{flag: unit in config.units for unit, (flag, _) in UNITS.items()})
    for name, mask in masked.masks().items():
        for unit, rate in config.drop_rates.items():
            if name.endswith(UNITS[unit][1]):
                mask.reset(rate)
    return masked


def check_target(student: Wav2Vec2Model, num_params_before: int, config: PruningConfig) -> None:
    """Look before training whether the units of the recipe can give its sparsity.

    Args:
        student: with masks.
        num_params_before: parameters of the unpruned model.
        config: what to prune.

    Raises:
        UserError: more parameters stay when all of these units are gone.
    """
    least = student.get_num_params(lambda mask: torch.zeros(len(mask), dtype=torch.float64)).item()
    if config.units and (1 - config.target_sparsity) * num_params_before < least:
        raise UserError(
            f"pruning.target_sparsity is {config.target_sparsity}: without any {', '.join(config.units)} units "
            f"{least:,.0f} of {num_params_before:,} parameters stay, a sparsity of {1 - least / num_params_before:.4f}"
        )


class Lagrangian(nn.Module):
    """Penalty ``lambda1 (s - t) + lambda2 (s - t)^2`` with learned, maximised multipliers that start at 0.

    s is the expected sparsity against ``num_params_before``; t rises linearly to the target.

    Args:
        num_params_before: parameters of the unpruned model.
        config: the target, the updates until it is reached, and the rates of masks and multipliers.
    """

    def __init__(self, num_params_before: int, config: PruningConfig) -> None:
        super().__init__()
        self.num_params_before, self.config = num_params_before, config
        self.lambda1 = nn.Parameter(torch.zeros(()))
        self.lambda2 = nn.Parameter(torch.zeros(()))

    def target(self, step: int) -> float:
        """Target sparsity at update ``step`` (0, 1, ...)."""
        config = self.config
        if step >= config.warmup_steps:
            return config.target_sparsity
        return config.target_sparsity * step / config.warmup_steps

    def sparsity(self, num_params: Tensor) -> Tensor:
        """Expected sparsity (float32 scalar) from the expected number of parameters (float64 scalar)."""
        return (1 - num_params / self.num_params_before).float()

    def forward(self, num_params: Tensor, step: int) -> Tensor:
        """Penalty (scalar) at update ``step``."""
        gap = self.sparsity(num_params) - self.target(step)
        return self.lambda1 * gap + self.lambda2 * gap.square()
