"""The augmented Lagrangian and the masks of a recipe, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from distillation.errors import UserError
from distillation.sparsity import UNITS, Lagrangian, PruningConfig, check_target, make_prunable
from wav2vec2 import prune, wav2vec2_model
from wav2vec2.architecture import HUBERT_BASE
from wav2vec2.hardconcrete import alive_probability


def test_target_ramp():
    lagrangian = Lagrangian(1000, PruningConfig(target_sparsity=0.75, warmup_steps=5000))
    assert [lagrangian.target(step) for step in (0, 1, 2500, 5000, 50000)] == [0, 0.75 / 5000, 0.375, 0.75, 0.75]
    assert Lagrangian(1000, PruningConfig(target_sparsity=0.6, warmup_steps=0)).target(0) == 0.6


def test_penalty_and_gradients():
    lagrangian = Lagrangian(1000, PruningConfig(target_sparsity=0.5, warmup_steps=10))
    with torch.no_grad():
        lagrangian.lambda1.fill_(2.0)
        lagrangian.lambda2.fill_(3.0)
    num_params = torch.tensor(900.0, dtype=torch.float64, requires_grad=True)  # sparsity 0.1, target 0.2 at step 4
    penalty = lagrangian(num_params, 4)
    assert penalty.item() == pytest.approx(2 * -0.1 + 3 * 0.01, abs=1e-6)
    penalty.backward()
    assert lagrangian.lambda1.grad.item() == pytest.approx(-0.1, abs=1e-6)
    assert lagrangian.lambda2.grad.item() == pytest.approx(0.01, abs=1e-6)
    # d/dn = (lambda1 + 2 lambda2 gap) * -1/1000
    assert num_params.grad.item() == pytest.approx(-(2 - 0.6) / 1000, abs=1e-7)


def test_lambda_moves_against_a_positive_gap():
    """Too little sparsity is a negative gap; maximising makes lambda1 negative, which pushes the sparsity up."""
    lagrangian = Lagrangian(1000, PruningConfig(target_sparsity=0.5, warmup_steps=0))
    optimizer = torch.optim.AdamW([{"params": lagrangian.parameters(), "maximize": True}], lr=0.02, weight_decay=0.0)
    lagrangian(torch.tensor(900.0), 0).backward()
    optimizer.step()
    assert lagrangian.lambda1.item() == pytest.approx(-0.02, abs=1e-6)
    assert lagrangian.lambda2.item() == pytest.approx(0.02, abs=1e-6)


def test_published_start(tiny_config):
    """At step 0 the expected sparsity of HuBERT Base is 10 %, not 0: half of the FFN units start at gate 0's door."""
    with torch.device("meta"):
        model = make_prunable(wav2vec2_model(**HUBERT_BASE), PruningConfig())
    with torch.no_grad():
        rates = {"": 0.01, "intermediate": 0.5}
        alive = {}
        for name, mask in model.masks().items():
            rate = rates["intermediate" if name.endswith("intermediate") else ""]
            alive[mask] = alive_probability(torch.full((len(mask),), math.log((1 - rate) / rate), dtype=torch.float64))
    expected = float(model.get_num_params(alive.__getitem__).item())
    assert 1 - expected / 94_371_456 == pytest.approx(0.10, abs=0.005)


@pytest.mark.parametrize("unit", UNITS)
def test_each_unit_masks_its_kind(unit, tiny_config):
    torch.manual_seed(0)
    model = make_prunable(wav2vec2_model(**tiny_config), PruningConfig(units=[unit], drop_rates={unit: 0.2}))
    counts = {"conv": 7, "head": 4, "interm": 4, "attlayer": 4, "ffnlayer": 4}
    masks = model.masks()
    assert len(masks) == counts[unit] and all(UNITS[unit][1] in f".{name}" for name in masks)
    for mask in masks.values():
        assert mask.log_alpha.mean().item() == pytest.approx(math.log(4), abs=0.05)


def test_masks_keep_the_weights(tiny_config):
    model = wav2vec2_model(**tiny_config)
    masked = make_prunable(model, PruningConfig())
    for name, p in model.named_parameters():
        assert torch.equal(p, masked.get_parameter(name))
    for name, mask in masked.masks().items():
        rate = 0.5 if name.endswith("intermediate") else 0.01
        assert mask.log_alpha.mean().item() == pytest.approx(math.log((1 - rate) / rate), abs=0.02)


@pytest.mark.parametrize(
    "settings",
    [{"units": ["neuron"]}, {"units": ["head", "head"]}, {"target_sparsity": 1.0}, {"target_sparsity": -0.1},
     {"drop_rates": {"head": 0.0}}, {"drop_rates": {"layer": 0.1}}, {"warmup_steps": -1},
     {"lr_masks": -1.0}, {"lr_masks": math.nan}, {"lr_lagrangian": 0.0}, {"lr_lagrangian": math.inf}],
)  # fmt: skip
def test_bad_settings(settings):
    with pytest.raises(UserError):
        PruningConfig(**settings)


def test_a_target_that_the_units_cannot_give(tiny_config):
    config = PruningConfig(units=["head"], target_sparsity=0.75)
    model = wav2vec2_model(**tiny_config)
    before = sum(p.numel() for p in model.parameters())
    student = make_prunable(model, config)
    with pytest.raises(UserError, match=r"is 0\.75: without any head units [\d,]+ of [\d,]+ parameters stay"):
        check_target(student, before, config)
    for mask in student.masks().values():
        torch.nn.init.constant_(mask.log_alpha, -30.0)
    gone = 1 - sum(p.numel() for p in prune(student)[0].parameters()) / before
    check_target(student, before, PruningConfig(units=["head"], target_sparsity=gone - 1e-9))
    with pytest.raises(UserError):
        check_target(student, before, PruningConfig(units=["head"], target_sparsity=gone + 1e-6))
    check_target(model, before, PruningConfig(units=[]))  # nothing is to be pruned
