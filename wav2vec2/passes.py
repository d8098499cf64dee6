"""How to run a model, and what a pass returns.

Shapes: B batch, T frames, D width, L layers.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class PassOptions:
    """How to run a model."""

    num_layers: int | None = None  # stop after that many; None for all
    layer_drop: float = 0.0  # probability of skipping a layer
    masked: Tensor | None = None  # bool [B, T]: frames whose feature is replaced by mask_embedding
    mask_embedding: Tensor | None = None  # [D]
    scale_gradients: bool = False  # layer-gradient scaling, see ScaleGradient
    keep_maps: bool = False  # compute the attention maps explicitly and return them
    recompute: bool = False  # keep the inputs of the layers alone for backward, and run each layer again there


@dataclass
class HiddenStates:
    """What a pass computes. T' = ceil(T / time_reduction) frames in the layers of a time-reduced model, else T."""

    features: Tensor  # [B, T, D], the Transformer's input before the positional convolution
    layers: list[Tensor]  # outputs of the layers, [B, T', D] each
    layer_input: Tensor  # [B, T', D], what the first layer sees, without dropout
    maps: list[Tensor | None] = field(default_factory=list)  # per layer [B, T', T'], mean over live heads; if kept


class ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by a factor.

    Layer-gradient scaling (released ARMHuBERT): at the output of layer i = 1 .. N the gradient from the layers above
    counts (N - i) / (N - i + 1), that of the layer's own loss the complement. Whatever comes down is thus the mean of
    the gradients of the layers i .. N, not their sum.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        """Return a view of ``x``."""
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Scale the gradient."""
        return grads[0] * ctx.factor, None
