"""The objectives: what the student is trained towards. A new one is one file and one row in each table below."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from distillation.errors import UserError, require
from distillation.objectives.base import Objective, Passes, Ratios, Teacher
from distillation.objectives.ctc import CTC
from distillation.objectives.hint import Hint
from distillation.objectives.layer_to_layer import LayerToLayer, PredictionLayer
from distillation.objectives.masking import Masking
from distillation.objectives.temporal_relation import TemporalRelation
from distillation.recognition.labels import Labels
from wav2vec2 import Wav2Vec2Model
from wav2vec2.counting import count_params
from wav2vec2.hardconcrete import touch
from wav2vec2.passes import PassOptions

__all__ = ["OBJECTIVES", "Loss", "ObjectiveConfig", "Objectives", "Passes", "Teacher"]

OBJECTIVES: dict[str, type[Objective]] = {
    "layer_to_layer": LayerToLayer,
    "prediction_layer": PredictionLayer,
    "hint": Hint,
    "masking": Masking,
    "temporal_relation": TemporalRelation,
    "ctc": CTC,
}


@dataclass
class ObjectiveConfig:
    """Which objectives to train towards, each with its settings; those that are set add up."""

    layer_to_layer: LayerToLayer.Config | None = None
    """Matched layers, DPHuBERT."""
    prediction_layer: PredictionLayer.Config | None = None
    """Teacher layers predicted from the last student layer, DistilHuBERT."""
    hint: Hint.Config | None = None
    """All layers through linear heads, FitHuBERT."""
    masking: Masking.Config | None = None
    """All layers with masked frames, ARMHuBERT and MaskHuBERT."""
    temporal_relation: TemporalRelation.Config | None = None
    """How frames relate to each other, STaRHuBERT."""
    ctc: CTC.Config | None = None
    """What is said, from the student's own output layer."""
    scale_gradients: Literal["released", "paper"] | None = None
    """ARMHuBERT's layer-gradient scaling, as its released code has it or as its paper does: there the gradients of the
    layers above are averaged instead of summed."""
    extractor_gradient: float = 1.0
    """Factor of the gradient that reaches the student's conv layers (DistilHuBERT: 0.1)."""

    def __post_init__(self) -> None:
        require(self, "objective.", "be at least 0", lambda value: 0 <= value < math.inf, "extractor_gradient")


@dataclass
class Loss:
    """Of one micro-batch."""

    total: Tensor  # scalar, float32: the weighted sum of the terms
    terms: dict[str, Tensor]  # name -> scalar, unweighted, detached
    ratios: Ratios  # what is counted in validation


class Objectives(nn.Module):
    """All objectives of a run, summed.

    Args:
        config: the ones that are not None are used.
        student: the model that learns.
        teacher: the frozen model.
        recompute: run the student's layers again in the backward pass instead of keeping what they compute.

    Raises:
        UserError: none is set, or one does not fit the models.
    """

    def __init__(
        self, config: ObjectiveConfig, student: Wav2Vec2Model, teacher: Wav2Vec2Model, recompute: bool = False
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        for name, objective in OBJECTIVES.items():
            settings = getattr(config, name)
            if settings is not None:
                self.parts[name] = objective(settings, student, teacher)  # type: ignore[call-arg]
        if not self.parts:
            raise UserError(f"the recipe sets no objective: set one of {', '.join(OBJECTIVES)}")
        parts = self._all()
        if not any(weight for part in parts for weight in part.weights.values()):
            raise UserError("every weight of the objective is 0: nothing would be trained")
        self.only_logged = any(
            not (any if part.terms_look_alike else all)(part.weights.values()) for part in parts
        )  # some layer or head may be looked at by terms of weight 0 alone
        self.student_layers = max(part.student_layers for part in parts)
        self.uses_labels = any(part.uses_labels for part in parts)
        self.uses_output_layer = any(part.uses_output_layer for part in parts)
        self.ratio_names = [name for part in parts for name in part.ratio_names]
        keep_maps = any(part.keeps_maps for part in parts)
        self.teacher_options = PassOptions(max(part.teacher_layers for part in parts), keep_maps=keep_maps)
        self.student_options = PassOptions(
            self.student_layers, keep_maps=keep_maps, scale_gradients=config.scale_gradients,
            extractor_gradient=config.extractor_gradient, recompute=recompute,
        )  # fmt: skip
        if student.encoder.transformer.upsampler is not None:  # DDP waits for every trainable parameter
            student.encoder.transformer.upsampler.requires_grad_(any(part.uses_upsampler for part in parts))

    def _all(self) -> list[Objective]:
        return list(self.parts.values())  # type: ignore[arg-type]

    def forward(
        self,
        teacher: Teacher,
        student: Wav2Vec2Model,
        waveforms: Tensor,
        lengths: Tensor | None,
        heard: Tensor | None = None,
        labels: Labels | None = None,
        frozen: bool = False,
    ) -> Loss:
        """Run the passes that the objectives ask for and add up their terms.

        Args:
            teacher: frozen.
            student: the model that learns.
            waveforms: [B, N].
            lengths: [B] valid samples; None when nothing is padded.
            heard: [B, N], what the student hears instead; None for the same.
            labels: what is said; None where no objective asks.
            frozen: only heads and output layer learn.
        """
        passes = Passes(
            teacher, student, waveforms, lengths, self.teacher_options, self.student_options, heard, labels, frozen
        )
        total = torch.zeros((), device=waveforms.device)
        terms: dict[str, Tensor] = {}
        ratios: Ratios = {}
        for name, part in zip(self.parts, self._all()):
            for term, value in part(passes).items():
                weight = part.weights[term]
                if weight != 0:
                    total = total + weight * value
                terms[term if len(self.parts) == 1 else f"{name}/{term}"] = value.detach()
            if not self.training:
                ratios |= part.ratios(passes)
        if self.only_logged or frozen:  # DDP waits for a gradient of these too
            total = touch(total, student, self)
        return Loss(total, terms, ratios)

    def head_state(self) -> dict[str, Tensor]:
        """State of all heads as a model file keeps it: bare indices with one objective, as the released files."""
        states = {name: part.head_state() for name, part in zip(self.parts, self._all())}
        states = {name: state for name, state in states.items() if state}
        return {
            (key if len(states) == 1 else f"{name}.{key}"): value
            for name, state in states.items()
            for key, value in state.items()
        }

    def num_params(self) -> int:
        """Parameters that are trained besides the student and not part of it."""
        return count_params(self)

    def load_head_state(self, state: dict[str, Tensor], source: object) -> bool:
        """Continue with the heads of a model file.

        Returns:
            Whether all is loaded: a file without heads leaves those of the objective at their start.

        Raises:
            UserError: the heads of the file are those of other objectives.
        """
        expected = self.head_state()
        if not state:
            return not expected
        wrong = [k for k in expected.keys() | state.keys() if k not in state or k not in expected
                 or state[k].shape != expected[k].shape]  # fmt: skip
        if wrong:
            raise UserError(
                f"{source}: its heads do not fit the objective of this recipe ({', '.join(sorted(wrong)[:3])}): "
                "use the recipe that the file was made with"
            )
        for value, new in ((expected[k], state[k]) for k in expected):
            value.copy_(new)
        return True
