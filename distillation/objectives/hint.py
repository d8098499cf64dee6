"""Hint-based distillation of FitHuBERT (https://arxiv.org/abs/2207.00555, section 2.3): every layer, the last most.

Shapes: B batch, T frames, D student width, E teacher width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distillation.objectives.base import Objective, Passes, at_least_float32, masked_mean, match_layers
from distillation.objectives.heads import LayerHead
from wav2vec2 import Wav2Vec2Model


class LayerwiseHeads(Objective):
    """One head per matched layer; the last one weighs ``last``, each of the others ``hint``."""

    uses_upsampler = False

    @dataclass
    class Config:
        """Settings."""

        layers: list[int] | None = None
        """Student layers from 1 on, each matched with the teacher layer at the same relative depth; null for all."""

        last: float = 1.0
        """Weight of the last of them."""

        hint: float = 0.1
        """Weight of each of the others."""

    def __init__(self, config: LayerwiseHeads.Config, student: Wav2Vec2Model, teacher: Wav2Vec2Model) -> None:
        super().__init__()
        self.layers = match_layers(config.layers, student, teacher)
        self.student_layers, self.teacher_layers = self.layers[-1]
        reduction = student.encoder.transformer.reduction
        self.heads = nn.ModuleList(LayerHead(student.embed_dim, teacher.embed_dim, reduction) for _ in self.layers)
        for head in self.heads:
            weight = config.last if head is self.heads[-1] else config.hint
            head.requires_grad_(weight != 0)  # a term that is only logged trains nothing

    def predictions(self, layers: list[Tensor], num_frames: int) -> list[Tensor]:
        """Student layers 1, 2, ... through the heads of the matched ones: [B, T, E] each."""
        return [head(layers[layer - 1], num_frames) for head, (layer, _) in zip(self.heads, self.layers)]


class Hint(LayerwiseHeads):
    """Mean squared difference between the teacher's layers and the student's through linear heads."""

    @dataclass
    class Config(LayerwiseHeads.Config):
        """Settings."""

    def __init__(self, config: Hint.Config, student: Wav2Vec2Model, teacher: Wav2Vec2Model) -> None:
        super().__init__(config, student, teacher)
        self.weights = {"last": config.last, "hint": config.hint}

    def forward(self, passes: Passes) -> dict[str, Tensor]:
        """Terms last and hint, the sum over the other layers."""
        predictions = self.predictions(passes.student_output().layers, passes.num_frames)
        targets = [passes.teacher()[layer] for _, layer in self.layers]
        valid = passes.valid()
        *hints, last = (
            masked_mean((at_least_float32(p) - at_least_float32(t)).square(), valid)
            for p, t in zip(predictions, targets)
        )
        return {"last": last, "hint": torch.stack(hints).sum() if hints else torch.zeros_like(last)}
