"""Schedules and optimizer groups, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from distillation.budget import Budget, Parameters
from distillation.errors import UserError
from distillation.optimisation import OptimConfig, lr_factor, param_groups
from distillation.sparsity import Lagrangian, PruningConfig, make_prunable
from wav2vec2 import wav2vec2_model


def test_linear_schedule():
    factors = [lr_factor(step, 4, 12, "linear") for step in range(12)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[5:] == pytest.approx([7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])


def test_published_schedule():
    """Step 1: 15k of 50k updates of warm-up; no update has rate 0."""
    assert lr_factor(0, 15000, 50000, "linear") == pytest.approx(1 / 15000)
    assert lr_factor(14999, 15000, 50000, "linear") == 1.0
    assert lr_factor(32500, 15000, 50000, "linear") == pytest.approx(0.5)
    assert lr_factor(49999, 15000, 50000, "linear") == pytest.approx(1 / 35000)


def test_other_schedules():
    assert lr_factor(6, 2, 10, "cosine") == pytest.approx(0.5)
    assert lr_factor(4, 2, 10, "cosine") == pytest.approx(0.5 * (1 + 0.5**0.5))
    assert [lr_factor(step, 2, 10, "constant") for step in (0, 1, 9)] == [0.5, 1, 1]
    assert lr_factor(0, 0, 10, "linear") == 1.0


def test_warmup_ratio():
    assert OptimConfig(max_steps=1000, warmup_ratio=0.05).resolved(never).warmup_steps == 50
    assert OptimConfig(max_steps=1000, warmup_steps=7).resolved(never).warmup_steps == 7


def test_length_in_epochs():
    config = OptimConfig(max_epochs=3, warmup_ratio=0.1).resolved(lambda epochs: 40 * epochs)
    assert (config.max_steps, config.warmup_steps) == (120, 12)
    assert config.resolved(never) == config


def never(epochs: int) -> int:
    raise AssertionError("the length is known in updates")


def test_groups(tiny_config):
    student = make_prunable(wav2vec2_model(**tiny_config), PruningConfig())
    budget = Budget.of_share(Parameters(), 1, 0.5)
    module = nn.ModuleDict({"student": student, "lagrangian": Lagrangian(budget, PruningConfig(lr_masks=0.05))})
    groups = {
        group["name"]: group
        for group in param_groups(module, module["lagrangian"], OptimConfig(lr=1e-3, weight_decay=0.01))
    }
    assert {name: (g["lr"], g["weight_decay"], g.get("maximize", False)) for name, g in groups.items()} == {
        "weights": (1e-3, 0.01, False),
        "biases_norms": (1e-3, 0.0, False),
        "log_alpha": (0.05, 0.0, False),
        "lambda": (0.02, 0.0, True),
    }
    assert len(groups["log_alpha"]["params"]) == 7 + 4 + 4
    assert all(p.dim() >= 2 for p in groups["weights"]["params"])
    grouped = [p for group in groups.values() for p in group["params"]]
    assert len(grouped) == len(set(grouped)) == sum(p.requires_grad for p in module.parameters())
    assert not any(p is student.feature_extractor.dummy_weight for p in grouped)


def test_what_decays_as_released(tiny_config):
    """The released filter looks for "bias" in the name: weights of norms decay too, and the mask embedding."""
    module = nn.ModuleDict({"student": wav2vec2_model(**tiny_config), "objective": nn.Module()})
    module["objective"].mask_embedding = nn.Parameter(torch.ones(3))
    decayed, plain = param_groups(module, None, OptimConfig(weight_decay=0.01, decays="all_but_biases"))
    names = {p: name for name, p in module.named_parameters()}
    assert all("bias" in names[p] for p in plain["params"]) and not any("bias" in names[p] for p in decayed["params"])
    vectors = {names[p].removeprefix("student.") for p in decayed["params"] if p.dim() == 1}
    layers = {f"encoder.transformer.layers.{i}.{norm}" for i in range(4) for norm in ("layer_norm", "final_layer_norm")}
    others = {"encoder.transformer.layer_norm", "encoder.feature_projection.layer_norm",
              "feature_extractor.conv_layers.0.layer_norm"}  # fmt: skip
    assert vectors == {f"{name}.weight" for name in layers | others} | {"objective.mask_embedding"}
    by_dimension = param_groups(module, None, OptimConfig(weight_decay=0.01))
    assert not any(p.dim() < 2 for p in by_dimension[0]["params"])


def test_ten_updates_of_decay_by_hand():
    """With a gradient of 0 an update leaves what decay leaves: p (1 - rate x 0.01), at the rate of each update."""
    module = nn.Module()
    module.norm, module.bias = nn.LayerNorm(4), nn.Parameter(torch.full((2,), 3.0))
    optim = OptimConfig(max_steps=10, lr=5.0, warmup_steps=2, weight_decay=0.01, decays="all_but_biases")
    optimizer = torch.optim.AdamW(param_groups(module, None, optim), betas=(0.9, 0.98), eps=1e-6)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, 2, 10, "linear"))
    rates = [2.5, 5, 5, 35 / 8, 30 / 8, 25 / 8, 20 / 8, 15 / 8, 10 / 8, 5 / 8]
    expected = 1.0
    for rate in rates:
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step(), schedule.step()
        expected *= 1 - rate * 0.01
        torch.testing.assert_close(module.norm.weight.detach(), torch.full((4,), expected))
    assert (module.bias == 3).all() and expected == pytest.approx(0.7366, abs=1e-4)


def test_masks_without_a_lagrangian_are_refused(tiny_config):
    student = make_prunable(wav2vec2_model(**tiny_config), PruningConfig())
    with pytest.raises(AssertionError, match="in no group"):
        param_groups(student, None, OptimConfig())


def test_maximize_is_gradient_ascent():
    """Bit-equal to descending the negated gradient, unlike a negative learning rate with weight decay."""
    up, down = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    ascent = torch.optim.AdamW([{"params": [up], "maximize": True}], lr=0.1, weight_decay=0.0)
    descent = torch.optim.AdamW([down], lr=0.1, weight_decay=0.0)
    for step in range(5):
        up.grad, down.grad = torch.arange(3.0) - step, step - torch.arange(3.0)
        ascent.step(), descent.step()
    assert torch.equal(up, down)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_steps": 0},
        {"lr": 0.0},
        {"warmup_ratio": 1.5},
        {"warmup_steps": -1},
        {"max_epochs": 0},
        {"lr": math.nan},
        {"lr": math.inf},
        {"clip": 0.0},
        {"clip": -1.0},
        {"clip": math.nan},
        {"betas": (0.9, 1.0)},
        {"betas": (-0.1, 0.9)},
        {"eps": 0.0},
        {"weight_decay": -1.0},
        {"weight_decay": math.nan},
    ],
)
def test_bad_settings(settings):
    with pytest.raises(UserError):
        OptimConfig(**settings)
