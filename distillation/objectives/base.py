"""What an objective is, and the forward passes it may ask for.

Shapes: B batch, T frames, D student width, E teacher width, L layers.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from distillation.errors import UserError
from wav2vec2 import Wav2Vec2Model
from wav2vec2.feature_extractor import valid_frames


class Teacher:
    """The frozen teacher: always in eval, never registered as a submodule, hence in no checkpoint.

    Args:
        model: any model of this toolkit.
        dtype: what it computes in; None for the precision of the training step around it.
    """

    def __init__(self, model: Wav2Vec2Model, dtype: torch.dtype | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.dtype = dtype

    def to(self, device: torch.device) -> None:
        """Move to the student's device."""
        self.model.to(device)

    @torch.no_grad()
    def __call__(self, waveforms: Tensor, lengths: Tensor | None, num_layers: int, **kwargs: Any) -> list[Tensor]:
        """States 0..num_layers, each [B, T, E]."""
        context: AbstractContextManager = nullcontext()
        if self.dtype is not None:
            lower = self.dtype != torch.float32
            context = torch.autocast(waveforms.device.type, dtype=self.dtype if lower else None, enabled=lower)
        with context:
            return self.model.extract_features(waveforms, lengths, num_layers, **kwargs)[0]


class Passes:
    """The forward passes of one micro-batch; each kind is run once, however many objectives ask for it.

    Args:
        teacher: frozen.
        student: the model that learns.
        waveforms: [B, N].
        lengths: [B] valid samples; None when nothing is padded.
        teacher_layers: run the teacher no further than this layer.
        student_layers: run the student no further than this layer.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: Wav2Vec2Model,
        waveforms: Tensor,
        lengths: Tensor | None,
        teacher_layers: int,
        student_layers: int,
    ) -> None:
        self.waveforms, self.lengths = waveforms, lengths
        self._teacher, self._student = teacher, student
        self._teacher_layers, self._student_layers = teacher_layers, student_layers
        self._cache: dict[str, list[Tensor]] = {}

    def teacher(self) -> list[Tensor]:
        """Teacher states [B, T, E], index 0 the Transformer's input. No gradient."""
        if "teacher" not in self._cache:
            self._cache["teacher"] = self._teacher(self.waveforms, self.lengths, self._teacher_layers)
        return self._cache["teacher"]

    def student(self) -> list[Tensor]:
        """Student states [B, T, D], index 0 the Transformer's input."""
        if "student" not in self._cache:
            states, _ = self._student.extract_features(self.waveforms, self.lengths, self._student_layers)
            self._cache["student"] = states
        return self._cache["student"]

    def valid(self) -> Tensor | None:
        """Bool [B, T]: frames that are no padding; None when all are."""
        if self.lengths is None:
            return None
        return valid_frames(self._student.output_length(self.lengths), self.student()[0].shape[1])


class Objective(nn.Module):
    """Base of all objectives: owns its heads, asks for passes, returns named unweighted terms.

    Subclasses set ``weights`` (term name -> weight; 0 only logs), ``heads`` (possibly empty) and the deepest layers
    they look at, and implement ``forward``.
    """

    weights: dict[str, float]
    teacher_layers: int
    student_layers: int
    heads: nn.ModuleList

    def forward(self, passes: Passes) -> dict[str, Tensor]:
        """Terms by name, each a float32 scalar."""
        raise AssertionError(f"{type(self).__name__} has no forward")


def masked_mean(x: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of ``x`` [B, T, ...] over valid frames [B, T] and all trailing dimensions."""
    if valid is None:
        return x.mean()
    per_frame = x.flatten(2).mean(-1) if x.dim() > 2 else x
    return (per_frame * valid).sum() / valid.sum().clamp(min=1)


def check_layers(layers: list[int], num_layers: int, what: str) -> None:
    """One-line error when a matched layer does not exist."""
    bad = [layer for layer in layers if not 0 <= layer <= num_layers]
    if bad:
        raise UserError(
            f"the objective matches layers {bad}, but the {what} has layers 0 to {num_layers}: "
            "choose a recipe for this model, or set other layers"
        )
