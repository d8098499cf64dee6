"""Fixtures of the tests of report.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distillation.sparsity import PruningConfig, make_prunable
from evaluation import cost
from tests.evaluation.pages import write_run
from wav2vec2 import Wav2Vec2Model, load_model


@pytest.fixture
def no_child_process(monkeypatch):
    """Memory is measured in a process of its own, which test_cost.py tests."""
    monkeypatch.setattr(cost, "peak_memory", lambda path, cases: [123 << 20] * len(cases))


@pytest.fixture
def student(teacher_path) -> Wav2Vec2Model:
    """The teacher with masks, some of which drop units."""
    torch.manual_seed(1)
    masked = make_prunable(load_model(teacher_path), PruningConfig(units=["conv", "head", "interm"]))
    for mask in masked.masks().values():
        mask.log_alpha.data = torch.linspace(-6, 6, len(mask.log_alpha))
    return masked.eval()


@pytest.fixture
def run(tmp_path, teacher_path, tiny_flags, student) -> Path:
    """A finished run, whose final model is the teacher itself."""
    return write_run(tmp_path / "a run", tiny_flags, student, teacher_path)
