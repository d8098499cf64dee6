"""The augmented Lagrangian, the masks and the budget of a recipe, by hand."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from distillation.budget import SUPERB_SAMPLES, Budget, Parameters
from distillation.build import build_step
from distillation.config import parse_recipe
from distillation.errors import UserError
from distillation.latency import read_latency
from distillation.sparsity import UNITS, Lagrangian, PruningConfig, check_budget, make_budget, make_prunable
from distillation.students import uniform_slice
from tests.configs import first_layers
from tests.latency import costs_of, write_latency
from wav2vec2 import Wav2Vec2Model, prune, wav2vec2_model
from wav2vec2.architecture import HUBERT_BASE, architecture
from wav2vec2.counting import count_params
from wav2vec2.hardconcrete import alive_probability


@pytest.fixture(scope="module")
def teacher(tiny_config):
    torch.manual_seed(0)
    return wav2vec2_model(**tiny_config)


@pytest.fixture(scope="module")
def latency(tiny_config, tmp_path_factory):
    return write_latency(tmp_path_factory.mktemp("tables") / "latency.json", tiny_config)


def lagrangian_of(sparsity: float, warmup_steps: int) -> Lagrangian:
    return Lagrangian(Budget.of_share(Parameters(), 1000, sparsity), PruningConfig(warmup_steps=warmup_steps))


def test_target_ramp():
    lagrangian = lagrangian_of(0.75, warmup_steps=5000)
    assert [lagrangian.target(step) for step in (0, 1, 2500, 5000, 50000)] == [0, 0.75 / 5000, 0.375, 0.75, 0.75]
    assert lagrangian_of(0.6, warmup_steps=0).target(0) == 0.6


def test_penalty_and_gradients():
    lagrangian = lagrangian_of(0.5, warmup_steps=10)
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
    lagrangian = lagrangian_of(0.5, warmup_steps=0)
    optimizer = torch.optim.AdamW([{"params": lagrangian.parameters(), "maximize": True}], lr=0.02, weight_decay=0.0)
    lagrangian(torch.tensor(900.0), 0).backward()
    optimizer.step()
    assert lagrangian.lambda1.item() == pytest.approx(-0.02, abs=1e-6)
    assert lagrangian.lambda2.item() == pytest.approx(0.02, abs=1e-6)


@pytest.mark.parametrize("cost", ["params", "macs", "milliseconds"])
def test_masks_of_every_cost_reach_their_target(teacher, tiny_config, cost):
    cost, config = costs_of(tiny_config)[cost], PruningConfig(warmup_steps=100)
    student = make_prunable(teacher, config)
    lagrangian = Lagrangian(Budget.of_share(cost, cost(teacher).item(), 0.5), config)
    train_masks(student, lagrangian)
    assert lagrangian.sparsity(cost(student)).item() == pytest.approx(0.5, abs=0.01)


def test_a_smaller_student_is_pruned_from_where_it_is(teacher):
    """Its ramp begins at what it lacks: asked for less at first, all of its masks would learn to stay for good."""
    half = uniform_slice(teacher, Parameters(), count_params(teacher) // 2)
    plain = parse_recipe(["--objective.layer_to_layer.layers", "[[0],[1]]"])[0]
    recipe = dataclasses.replace(plain, pruning=PruningConfig(warmup_steps=100, target_sparsity=0.75))
    student = make_prunable(half, recipe.pruning)
    step = build_step(recipe, recipe.optim, student, teacher, recipe.pruning)
    lagrangian = step.lagrangian
    lacks = 1 - count_params(half) / count_params(teacher)
    assert lagrangian.target(0) == pytest.approx(lacks, abs=1e-6) and lagrangian.target(100) == 0.75
    assert lagrangian.target(50) == pytest.approx((lacks + 0.75) / 2, abs=1e-6)
    train_masks(student, lagrangian, 600)
    assert lagrangian.sparsity(lagrangian.cost(student)).item() == pytest.approx(0.75, abs=0.01)
    whole = build_step(recipe, recipe.optim, make_prunable(teacher, recipe.pruning), teacher, recipe.pruning)
    assert whole.lagrangian.start == 0.0


def train_masks(student: Wav2Vec2Model, lagrangian: Lagrangian, num_steps: int = 300) -> None:
    """By the penalty alone."""
    masks = [mask.log_alpha for mask in student.masks().values()]
    groups = [{"params": masks}, {"params": lagrangian.parameters(), "maximize": True}]
    optimizer = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.0)
    for step in range(num_steps):
        optimizer.zero_grad()
        lagrangian(lagrangian.cost(student), step).backward()
        optimizer.step()


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
    counts = {"conv": 7, "head": 4, "head_channel": 8, "interm": 4, "attlayer": 4, "ffnlayer": 4}
    masks = model.masks()
    assert len(masks) == counts[unit] and all(UNITS[unit][1] in f".{name}" for name in masks)
    for mask in masks.values():
        assert mask.log_alpha.mean().item() == pytest.approx(math.log(4), abs=0.05)


def test_channels_of_heads_start_as_heads_where_nothing_else_is_said(tiny_config):
    for rates, expected in (({}, 0.01), ({"head": 0.1}, 0.1), ({"head": 0.1, "head_channel": 0.3}, 0.3)):
        model = make_prunable(wav2vec2_model(**tiny_config), PruningConfig(units=["head_channel"], drop_rates=rates))
        for mask in model.masks().values():
            assert mask.log_alpha.mean().item() == pytest.approx(math.log(1 / expected - 1), abs=0.05)


def test_units_that_the_heads_of_a_model_do_not_have(tiny_config):
    uneven = wav2vec2_model(**tiny_config, encoder_head_channels=[[[2, 3]] * 4] * 4)
    assert len(make_prunable(uneven, PruningConfig(units=["head_channel", "interm"])).masks()) == 12
    with pytest.raises(UserError, match="heads of this model are of unequal width: name head_channel"):
        make_prunable(uneven, PruningConfig())
    milliseconds = PruningConfig(units=["interm"], cost="milliseconds", latency=Path("table.json"))
    with pytest.raises(UserError, match="of unequal width: tables hold times of whole heads"):
        make_prunable(uneven, milliseconds)
    wanted = count_params(uneven) // 2
    cut = uniform_slice(uneven, Parameters(), wanted)
    assert wanted - 100 <= count_params(cut) <= wanted and architecture(cut.config).uneven
    reuse = {"encoder_reuse_attention": [False, True] * 2, "encoder_layer_drop": 0.0}
    with pytest.raises(UserError, match="this model reuses attention maps: name head"):
        make_prunable(wav2vec2_model(**tiny_config | reuse), PruningConfig(units=["head_channel"]))


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
    [{"units": ["neuron"]}, {"units": ["head", "head"]}, {"units": ["head", "head_channel"]},
     {"units": ["head_channel"], "cost": "milliseconds", "latency": Path("table.json")},
     {"target_sparsity": 1.0}, {"target_sparsity": -0.1},
     {"drop_rates": {"head": 0.0}}, {"drop_rates": {"layer": 0.1}}, {"warmup_steps": -1},
     {"multiple_of": 0}, {"macs_seconds": 0.0}, {"macs_seconds": math.inf}, {"macs_seconds": math.nan},
     {"cost": "milliseconds"}, {"target": "35ms"}, {"target": "500"}, {"cost": "macs", "target": "23.6M"},
     {"lr_masks": -1.0}, {"lr_masks": math.nan}, {"lr_lagrangian": 0.0}, {"lr_lagrangian": math.inf}],
)  # fmt: skip
def test_bad_settings(settings):
    with pytest.raises(UserError):
        PruningConfig(**settings)


# Budgets


def test_budgets_of_recipes(teacher, latency):
    before = sum(p.numel() for p in teacher.parameters())
    budget = make_budget(PruningConfig(target_sparsity=0.7), teacher)
    assert (budget.cost.name, budget.before) == ("params", before)
    assert (budget.target, budget.sparsity) == (round(0.3 * before), 0.7)
    budget = make_budget(PruningConfig(target="12.5k", target_sparsity=0.7), teacher)
    assert (budget.target, budget.sparsity) == (12500, 1 - 12500 / before)

    macs = teacher.get_num_macs(160_000).item()  # a share is one of 10 s, an absolute number one of what is published
    budget = make_budget(PruningConfig(cost="macs", target_sparsity=0.7), teacher)
    assert (budget.before, budget.target) == (macs, pytest.approx(0.3 * macs)) and budget.cost.samples == (160_000,)
    budget = make_budget(PruningConfig(cost="macs", target="0.9GMACs"), teacher)
    assert (budget.before, budget.target) == (teacher.get_num_macs(SUPERB_SAMPLES).item(), 9e8)
    assert budget.cost.text(budget.target) == "0.9 GMACs (SUPERB)"
    budget = make_budget(PruningConfig(cost="macs", target="5MMACs", macs_seconds=2.5), teacher)
    assert (budget.before, budget.cost.samples) == (teacher.get_num_macs(40_000).item(), (40_000,))
    assert budget.cost.text(budget.target) == "0.005 GMACs (2.5 s)"

    budget = make_budget(PruningConfig(cost="milliseconds", latency=latency, target="40ms"), teacher)
    table = read_latency(latency)
    assert (budget.before, budget.target) == (table(teacher).item(), 40) and budget.cost.text(40) == "40 ms"


def test_targets_above_the_teacher(teacher, latency):
    for settings, has in (
        ({"target": "1M"}, r"21,948 parameters"),
        ({"cost": "macs", "target": "1TMACs"}, r"1\.666 GMACs \(SUPERB\)"),
        ({"cost": "milliseconds", "latency": latency, "target": "200ms"}, r"66\.18 ms"),
    ):
        with pytest.raises(UserError, match=rf"is {settings['target']}: the teacher has {has}, there is nothing to"):
            make_budget(PruningConfig(**settings), teacher)


def test_latency_tables_that_do_not_belong(teacher, tiny_config, tmp_path):
    def refused() -> str:
        with pytest.raises(UserError) as error:
            make_budget(PruningConfig(cost="milliseconds", latency=tmp_path / "latency.json"), teacher)
        assert "\n" not in str(error.value) and str(error.value).startswith(str(tmp_path / "latency.json"))
        return str(error.value)

    assert "no such latency table; make it with python -m evaluation.latency TEACHER" in refused()
    write_latency(tmp_path / "latency.json", first_layers(tiny_config, 3))
    assert "is of another model (encoder_num_layers 3, not 4)" in refused()


@pytest.mark.parametrize("cost", ["params", "macs", "milliseconds"])
def test_a_target_that_the_units_cannot_give(teacher, latency, cost):
    config = PruningConfig(units=["head"], cost=cost, target_sparsity=0.85, latency=latency)
    student, budget = make_prunable(teacher, config), make_budget(config, teacher)
    unit = {"params": "parameters", "macs": r"GMACs \(10 s\)", "milliseconds": "ms"}[cost]
    with pytest.raises(UserError, match=rf"0\.8500: without any head units [\d,.]+ {unit} of [\d,.]+ {unit} stay"):
        check_budget(student, budget, config)
    for mask in student.masks().values():
        torch.nn.init.constant_(mask.log_alpha, -30.0)
    gone = budget.sparsity_of(budget.cost(prune(student)[0]).item())
    check_budget(student, Budget.of_share(budget.cost, budget.before, gone - 1e-9), config)
    with pytest.raises(UserError):
        check_budget(student, Budget.of_share(budget.cost, budget.before, gone + 1e-4), config)


def test_a_target_above_what_the_student_has(teacher):
    config = PruningConfig(target_sparsity=0.25)
    student, budget = make_prunable(teacher, config), make_budget(config, teacher)
    check_budget(student, budget, config)
    smaller = make_prunable(prune(teacher)[0], config)
    for mask in smaller.masks().values():
        torch.nn.init.constant_(mask.log_alpha, -30.0)
    smaller = make_prunable(prune(smaller)[0], config)
    with pytest.raises(UserError, match=r"sparsity of 0\.2500: the student has [\d,]+ parameters before it is pruned"):
        check_budget(smaller, budget, config)
