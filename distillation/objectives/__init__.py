"""The objectives: what the student is trained towards. A new one is one file and one row in each table below."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from distillation.errors import UserError
from distillation.objectives.base import Objective, Passes, Teacher
from distillation.objectives.layer_to_layer import LayerToLayer, PredictionLayer
from wav2vec2 import Wav2Vec2Model

__all__ = ["OBJECTIVES", "ObjectiveConfig", "Objectives", "Passes", "Teacher"]

OBJECTIVES: dict[str, type[Objective]] = {
    "layer_to_layer": LayerToLayer,
    "prediction_layer": PredictionLayer,
}


@dataclass
class ObjectiveConfig:
    """Which objectives to train towards, each with its settings; those that are set add up."""

    layer_to_layer: LayerToLayer.Config | None = None
    """Matched layers, DPHuBERT."""

    prediction_layer: PredictionLayer.Config | None = None
    """Teacher layers predicted from the last student layer."""


@dataclass
class Loss:
    """Of one micro-batch."""

    total: Tensor  # scalar, float32: the weighted sum of the terms
    terms: dict[str, Tensor]  # name -> scalar, unweighted, detached


class Objectives(nn.Module):
    """All objectives of a run, summed.

    Args:
        config: the ones that are not None are used.
        student: the model that learns.
        teacher: the frozen model.

    Raises:
        UserError: none is set, or one does not fit the models.
    """

    def __init__(self, config: ObjectiveConfig, student: Wav2Vec2Model, teacher: Wav2Vec2Model) -> None:
        super().__init__()
        self.parts = nn.ModuleDict()
        for entry in fields(config):
            settings = getattr(config, entry.name)
            if settings is not None:
                self.parts[entry.name] = OBJECTIVES[entry.name](settings, student, teacher)  # type: ignore[call-arg]
        if not self.parts:
            raise UserError(f"the recipe sets no objective: set one of {', '.join(OBJECTIVES)}")
        self.teacher_layers = max(part.teacher_layers for part in self._all())
        self.student_layers = max(part.student_layers for part in self._all())

    def _all(self) -> list[Objective]:
        return list(self.parts.values())  # type: ignore[arg-type]

    def forward(self, teacher: Teacher, student: nn.Module, waveforms: Tensor, lengths: Tensor | None) -> Loss:
        """Run the passes that the objectives ask for and add up their terms.

        Args:
            teacher: frozen.
            student: the model that learns.
            waveforms: [B, N].
            lengths: [B] valid samples; None when nothing is padded.
        """
        passes = Passes(teacher, student, waveforms, lengths, self.teacher_layers, self.student_layers)
        total = torch.zeros((), device=waveforms.device)
        terms = {}
        for name, part in self.parts.items():
            for term, value in part(passes).items():
                weight = part.weights[term]
                if weight != 0:
                    total = total + weight * value
                terms[term if len(self.parts) == 1 else f"{name}/{term}"] = value.detach()
        return Loss(total, terms)

    def head_state(self) -> dict[str, Tensor]:
        """State of all heads as a model file keeps it: bare indices with one objective, as the released files."""
        with_heads = {name: part for name, part in self.parts.items() if len(part.heads)}
        return {
            (key if len(with_heads) == 1 else f"{name}.{key}"): value
            for name, part in with_heads.items()
            for key, value in part.heads.state_dict().items()
        }

    def load_head_state(self, state: dict[str, Tensor], source: object) -> bool:
        """Continue with the heads of a model file.

        Returns:
            Whether there were any: a file without heads leaves them at their start.

        Raises:
            UserError: the heads of the file are those of other objectives.
        """
        if not state:
            return False
        expected = self.head_state()
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
