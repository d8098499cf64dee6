"""Layer-to-layer distillation of DPHuBERT (https://arxiv.org/abs/2305.17651, eq. 1), and DistilHuBERT's prediction."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillation.errors import UserError
from distillation.objectives.base import Objective, Passes, at_least_float32, check_layers, masked_mean
from distillation.objectives.heads import identity_linear
from wav2vec2 import Wav2Vec2Model


@dataclass
class DistanceWeights:
    """Weights of the parts of the distance between two states; a part of weight 0 is logged only."""

    l1: float = 1.0
    """Mean absolute difference."""
    l2: float = 0.0
    """Mean squared difference."""
    cos: float = 1.0
    """Cosine similarity, in the form that cos_type names."""
    cos_type: Literal["raw", "log_sig"] = "raw"
    """raw: minus the mean similarity (DPHuBERT); log_sig: minus the mean log sigmoid of it (DistilHuBERT)."""

    def as_terms(self) -> dict[str, float]:
        """Term name -> weight."""
        return {"l1": self.l1, "l2": self.l2, "cos": self.cos}


def distances(
    prediction: list[Tensor], target: list[Tensor], valid: Tensor | None, weights: DistanceWeights
) -> dict[str, Tensor]:
    """The parts of the distance, averaged over matched layers, rows, valid frames and (l1, l2) width.

    The paper writes a sum over layers; the released code, whose numbers are published, takes the mean, and so do we.

    Args:
        prediction: per matched layer, [B, T, E].
        target: teacher states, [B, T, E] each.
        valid: bool [B, T], or None when nothing is padded.
        weights: parts of weight 0 are computed without gradient.
    """

    def l1(p: Tensor, t: Tensor) -> Tensor:
        return masked_mean((p - t).abs(), valid)

    def l2(p: Tensor, t: Tensor) -> Tensor:
        return masked_mean((p - t).square(), valid)

    def cos(p: Tensor, t: Tensor) -> Tensor:
        similarity = F.cosine_similarity(p, t, dim=-1)
        return -masked_mean(F.logsigmoid(similarity) if weights.cos_type == "log_sig" else similarity, valid)

    terms = {}
    for name, function in (("l1", l1), ("l2", l2), ("cos", cos)):
        with torch.set_grad_enabled(torch.is_grad_enabled() and getattr(weights, name) != 0):
            pairs = ((at_least_float32(p), at_least_float32(t)) for p, t in zip(prediction, target))
            terms[name] = torch.stack([function(p, t) for p, t in pairs]).mean()
    return terms


class LayerToLayer(Objective):
    """Each matched student layer is mapped linearly to the teacher's width and compared with the teacher's layer."""

    terms_look_alike = True

    @dataclass
    class Config(DistanceWeights):
        """Settings."""

        layers: list[list[int]] = field(default_factory=lambda: [[0], [4, 8, 12]])
        """Matched layers (0 is the Transformer's input), in groups; the layers of a group share one linear map."""

    def __init__(self, config: LayerToLayer.Config, student: Wav2Vec2Model, teacher: Wav2Vec2Model) -> None:
        super().__init__()
        self.config = config
        self.layers = [layer for group in config.layers for layer in group]
        if not self.layers or len(set(self.layers)) != len(self.layers):
            raise UserError(f"objective.layer_to_layer.layers is {config.layers}: name each matched layer once")
        check_layers(self.layers, teacher.num_layers, "teacher")
        check_layers(self.layers, student.num_layers, "student")
        self.teacher_layers = self.student_layers = max(self.layers)
        self.weights = config.as_terms()
        maps = [identity_linear(student.embed_dim, teacher.embed_dim) for _ in config.layers]
        # one entry per matched layer, shared within a group: the layout of the released files
        self.heads = nn.ModuleList(head for head, group in zip(maps, config.layers) for _ in group)

    def forward(self, passes: Passes) -> dict[str, Tensor]:
        """Terms l1, l2, cos."""
        student, teacher = passes.student(), passes.teacher()
        prediction = [head(student[layer]) for head, layer in zip(self.heads, self.layers)]
        return distances(prediction, [teacher[layer] for layer in self.layers], passes.valid(), self.config)


class PredictionLayer(Objective):
    """Every target is predicted from the last student layer by its own head.

    DPHuBERT's ablation has linear + GELU (Table 2, "predlayer"). DistilHuBERT's paper speaks of prediction heads
    (https://arxiv.org/abs/2110.01900, section 2.2); in its released code there is a GELU between two linear maps, and
    the loss is ``cos_type: log_sig``.
    """

    terms_look_alike = True

    @dataclass
    class Config(DistanceWeights):
        """Settings."""

        layers: list[int] = field(default_factory=lambda: [0, 4, 8, 12])
        """Teacher layers to predict."""

        heads: Literal["linear_gelu", "two_linear", "linear"] = "linear_gelu"
        """Per layer a linear map with GELU after it (DPHuBERT's ablation), two linear maps with GELU between them
        (DistilHuBERT as released), or a linear map alone."""

    def __init__(self, config: PredictionLayer.Config, student: Wav2Vec2Model, teacher: Wav2Vec2Model) -> None:
        super().__init__()
        self.config = config
        if not config.layers:
            raise UserError("objective.prediction_layer.layers is empty: name the teacher layers to predict")
        check_layers(config.layers, teacher.num_layers, "teacher")
        self.teacher_layers, self.student_layers = max(config.layers), student.num_layers
        self.weights = config.as_terms()
        inputs, outputs = student.embed_dim, teacher.embed_dim
        self.heads = nn.ModuleList(
            # the first maps are those of one wide linear layer, cut up: 768 -> 3 x 768 in the released DistilHuBERT
            nn.Sequential(nn.Linear(inputs, inputs), nn.GELU(), nn.Linear(inputs, outputs))
            if config.heads == "two_linear"
            else nn.Sequential(
                nn.Linear(inputs, outputs), nn.GELU() if config.heads == "linear_gelu" else nn.Identity()
            )
            for _ in config.layers
        )

    def forward(self, passes: Passes) -> dict[str, Tensor]:
        """Terms l1, l2, cos."""
        last, teacher = passes.student()[self.student_layers], passes.teacher()
        prediction = [head(last) for head in self.heads]
        return distances(prediction, [teacher[layer] for layer in self.config.layers], passes.valid(), self.config)
