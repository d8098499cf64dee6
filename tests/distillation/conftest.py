"""Small teachers and students in float64, batches, and the passes that objectives ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from distillation.objectives import Passes, Teacher
from distillation.students import StudentConfig, ThinStudent, build_student
from wav2vec2 import Wav2Vec2Model, wav2vec2_model
from wav2vec2.passes import HiddenStates, PassOptions

# (samples of the padded batch, valid samples per row or None): padded, not padded, one frame, batch of one
BATCHES = {"padded": (2600, [2600, 1500, 400]), "full": (2600, None), "one frame": (400, None), "single": (1700, None)}


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture(params=BATCHES)
def batch(request: pytest.FixtureRequest) -> tuple[Tensor, Tensor | None]:
    """Waveforms [B, N] in float64, zero on padding, and lengths."""
    num_samples, lengths = BATCHES[request.param]
    rows = 1 if request.param == "single" else 3
    waveforms = torch.randn(rows, num_samples, dtype=torch.float64)
    if lengths is None:
        return waveforms, None
    valid = torch.arange(num_samples) < torch.tensor(lengths)[:, None]
    return waveforms * valid, torch.tensor(lengths)


@pytest.fixture
def teacher(tiny_config: dict) -> Wav2Vec2Model:
    """4 layers, 24 wide, with a mask embedding."""
    model = _random(wav2vec2_model(**tiny_config))
    model.mask_embedding = torch.randn(24, dtype=torch.float64)
    return model


@pytest.fixture
def make_student(teacher: Wav2Vec2Model) -> Callable[..., Wav2Vec2Model]:
    """Thin students of the teacher: ``make_student(width=16, time_reduction=2)``."""

    def make(**changes: Any) -> Wav2Vec2Model:
        settings = {"num_layers": 4, "width": 16, "heads": 2, "ffn": 20, "channels": [6, 8, 12], "pos_conv_kernel": 8,
                    "pos_conv_groups": 4, **changes}  # fmt: skip
        return _random(build_student(StudentConfig(thin=ThinStudent(**settings)), teacher))

    return make


def _random(model: Wav2Vec2Model) -> Wav2Vec2Model:
    """In eval mode and float64, every parameter random: norms and biases start as 1 and 0, which hides mistakes."""
    for p in model.parameters():
        if p.requires_grad:  # all but the dummy weight
            p.data.add_(torch.randn_like(p), alpha=0.3)
    return model.double().eval()


def _passes(objective: Any, student: Wav2Vec2Model, teacher: Wav2Vec2Model, batch: Any) -> Passes:
    options = [
        PassOptions(layers, keep_maps=objective.keeps_maps)
        for layers in (objective.teacher_layers, objective.student_layers)
    ]
    return Passes(Teacher(teacher), student, *batch, *options)


@pytest.fixture
def passes() -> Callable[..., Passes]:
    """``passes(objective, student, teacher, batch)``."""
    return _passes


class GivenPasses(Passes):
    """Passes whose outputs are given: two layers of ``student`` and ``teacher`` states each."""

    def __init__(self, student: list[Tensor], teacher: list[Tensor]) -> None:
        self.waveforms, self.lengths = student[0], None
        self._student_output = HiddenStates(student[0], student[1:], student[0])
        self._teacher_output = HiddenStates(teacher[0], teacher[1:], teacher[0])
        self._student_states = student

    @property
    def num_frames(self) -> int:
        return self.waveforms.shape[1]

    def upsampled(self, state: Tensor) -> Tensor:
        return state

    def masked(self, masked: Tensor, student_embedding: Tensor) -> tuple[HiddenStates, HiddenStates]:
        assert self._teacher_output is not None and self._student_output is not None
        return self._teacher_output, self._student_output


@pytest.fixture
def given_passes() -> type[GivenPasses]:
    return GivenPasses


@pytest.fixture
def frames_of() -> Callable[..., list[int]]:
    """Frames of each row that are compared, by the strides of HuBERT; time reduction by two loses an odd last one."""

    def count(batch: tuple[Tensor, Tensor | None], student: Wav2Vec2Model) -> list[int]:
        waveforms, lengths = batch
        samples = [waveforms.shape[1]] * len(waveforms) if lengths is None else lengths.tolist()
        frames = [(n - 400) // 320 + 1 for n in samples]
        reduced = student.encoder.transformer.time_reduction is not None
        return [n - n % 2 if reduced and n > 1 else n for n in frames]

    return count
