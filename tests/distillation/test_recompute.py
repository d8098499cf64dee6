"""Running layers again in the backward pass instead of keeping what they compute: the same numbers, less memory."""

from __future__ import annotations

import copy

import pytest
import torch

from benchmarks.steps import kept_bytes
from distillation.objectives import ObjectiveConfig, Objectives, Teacher
from distillation.objectives.layer_to_layer import LayerToLayer
from distillation.sparsity import PruningConfig, make_prunable
from tests.configs import TINY
from wav2vec2 import wav2vec2_model

KINDS = {
    "masked, dropout": {"encoder_dropout": 0.1, "encoder_attention_dropout": 0.1, "encoder_ff_interm_dropout": 0.1},
    "map reuse": {"encoder_reuse_attention": [False, True] * 2, "encoder_layer_drop": 0.0},
    "wavlm": {
        "encoder_num_heads": None, "encoder_head_dim": None, "encoder_total_num_heads": [4] * 4,
        "encoder_remaining_heads": [[0, 1, 2, 3]] * 4, "encoder_num_buckets": 32, "encoder_max_distance": 80,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_the_same_gradients_with_less_memory(kind, padded):
    torch.manual_seed(0)
    teacher = wav2vec2_model(**{**TINY, **KINDS[kind]}).eval()
    units = ["head", "interm"] if kind != "map reuse" else ["interm"]
    student = make_prunable(teacher, PruningConfig(units=units)).train()
    config = ObjectiveConfig(layer_to_layer=LayerToLayer.Config(layers=[[0], [2, 4]]))
    waveforms = torch.randn(2, 8000)
    lengths = torch.tensor([8000, 5000]) if padded else None
    kept, gradients = [], []
    for recompute in (False, True):
        model = copy.deepcopy(student)
        objectives = Objectives(config, model, teacher, recompute)

        def loss(objectives: Objectives = objectives, model=model) -> torch.Tensor:
            torch.manual_seed(1)  # masks and dropout
            return objectives(Teacher(teacher), model, waveforms, lengths).total

        loss().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
        kept.append(kept_bytes(loss, model))
    assert kept[1] < 0.8 * kept[0]  # the convolutions keep theirs
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        again = gradients[1][name]
        assert (gradient is None) == (again is None), name
        if gradient is not None:
            torch.testing.assert_close(again, gradient, atol=1e-7, rtol=1e-5)
