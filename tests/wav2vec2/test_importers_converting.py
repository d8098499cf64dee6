"""What a checkpoint is recognised as, by its content alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.released_students import lightning
from wav2vec2 import CheckpointError
from wav2vec2.importers import recognise

MODEL = {"mask_emb": torch.ones(2)}


@pytest.mark.parametrize(
    ("content", "name", "suffix", "has_settings"),
    [
        ({"cfg": {"encoder_layers": 12}, "model": MODEL}, "WavLM of unilm", "fairseq", False),
        ({"cfg": {"model": {}}, "args": None, "model": MODEL}, "a model of fairseq, cfg layout", "fairseq", False),
        ({"args": object(), "model": MODEL}, "a model of fairseq, args layout", "fairseq", False),
        (lightning(MODEL), "a released student (FitHuBERT, ARMHuBERT, ", "student", True),
        ({"Config": {"distiller": {}}, "Distiller": MODEL, "Step": 1}, "DistilHuBERT of s3prl", "student", False),
    ],
)
def test_known_kinds(content: Any, name: str, suffix: str, has_settings: bool) -> None:
    layout = recognise(content)
    assert layout.name.startswith(name) and (layout.suffix, layout.has_settings) == (suffix, has_settings)


@pytest.mark.parametrize(
    "content",
    [
        [], None, {}, MODEL, {"model": MODEL}, {"cfg": {"encoder_layers": 12}, "model": [1]}, {3: {"model": MODEL}},
        {"Config": {"runner": {}}, "Distiller": MODEL}, {"Config": {"distiller": {}}, "Distiller": []},
        {"state_dict": MODEL}, {"state_dict": [1]}, {"state_dict": {3: MODEL}, "pytorch-lightning_version": "2.6"},
    ],
)  # fmt: skip
def test_other_kinds_are_told_what_is_accepted(content: Any) -> None:
    with pytest.raises(CheckpointError, match=r"accepted are WavLM of unilm; .*cfg .*args .*student .*; DistilHuBERT"):
        recognise(content)


def test_a_model_of_this_toolkit_needs_no_conversion() -> None:
    with pytest.raises(CheckpointError, match="needs no conversion"):
        recognise({"config": {"aux_num_out": None}, "state_dict": MODEL, "distill_linear_projs": {}})
