"""How to run a model, and what a pass returns.

Shapes: B batch, T frames, D width, L layers.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .statistics import Statistics


@dataclass
class PassOptions:
    """How to run a model."""

    num_layers: int | None = None  # stop after that many; None for all
    layer_drop: float = 0.0  # probability of skipping a layer
    masked: Tensor | None = None  # bool [B, T]: frames whose feature is replaced by mask_embedding
    mask_embedding: Tensor | None = None  # [D]
    scale_gradients: Literal["released", "paper"] | None = None  # layer-gradient scaling, see layer_scales
    extractor_gradient: float = 1.0  # factor of the gradient that the conv layers get
    keep_maps: bool = False  # compute the attention maps explicitly and return them
    statistics: Statistics | None = None  # of the whole waveforms that these are pieces of
    recompute: bool = False  # keep the inputs of the layers alone for backward, and run each layer again there


@dataclass
class HiddenStates:
    """What a pass computes. T' = T // time_reduction frames, at least one, in the layers of a time-reduced model."""

    features: Tensor  # [B, T, D], the Transformer's input before the positional convolution
    layers: list[Tensor]  # outputs of the layers, [B, T', D] each
    layer_input: Tensor  # [B, T', D], what the first layer sees, without dropout
    maps: list[Tensor | None] = field(default_factory=list)  # per layer [B, T', T'], mean over live heads; if kept


def layer_scales(form: Literal["released", "paper"], layer: int, num_layers: int) -> tuple[float, float]:
    """Factors of the gradients that meet at the output of a layer: from the layers above, and from its own loss.

    Layer-gradient scaling of ARMHuBERT (https://arxiv.org/abs/2305.11685). ``paper``: at layer i = 1 .. N the one from
    above counts (N - i) / (N - i + 1), that of the layer's own loss the complement; what comes down is thus the mean of
    the gradients of the layers i .. N, not their sum. ``released``: in its code i counts from 0, and the branch to the
    loss leaves after the trunk's factor, so that its gradient gets both.

    Args:
        form: which of the two.
        layer: from 1 on.
        num_layers: N.
    """
    above = num_layers - layer + (form == "released")
    trunk = above / (above + 1)
    return trunk, (trunk if form == "released" else 1.0) / (above + 1)


class ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        """Return a view of ``x``."""
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Scale the gradient."""
        return grads[0] * ctx.factor, None
