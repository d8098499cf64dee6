"""What pruning is held to: numbers as people write them, and what checkpoints keep of a budget."""

from __future__ import annotations

import pytest
import torch

from distillation.budget import SUPERB_SAMPLES, Budget, Milliseconds, MultiplyAccumulates, Parameters, parse_target
from distillation.errors import UserError
from distillation.latency import LatencyTable
from tests.configs import TINY
from tests.latency import costs_of, latency_content
from wav2vec2 import wav2vec2_model


@pytest.mark.parametrize(
    ("text", "cost", "number"),
    [
        ("23.6M", "params", 23.6e6),
        ("388k", "params", 388e3),
        ("23,585,946 params", "params", 23_585_946),
        ("23_585_946 parameters", "params", 23_585_946),
        ("23.6M parameters", "params", 23.6e6),
        ("500GMACs", "macs", 500e9),
        ("500 GMACs", "macs", 500e9),
        ("1.2TMACs", "macs", 1.2e12),
        ("654000000000 MACs", "macs", 654e9),
        ("35ms", "milliseconds", 35),
        (" 0.5 ms", "milliseconds", 0.5),
    ],
)
def test_targets(text, cost, number):
    assert parse_target(text, cost, "pruning.target") == pytest.approx(number, rel=1e-15)


UNIT, NUMBER = ", and its unit is missing: write 23.6M", ": write a number with its unit, such as 23.6M"


@pytest.mark.parametrize(
    ("text", "cost", "said"),
    [
        ("500", "macs", UNIT),
        ("35", "milliseconds", UNIT),
        ("23.6", "params", UNIT),
        ("23585946", "params", UNIT),
        ("23.6M", "macs", UNIT),  # of what?
        ("500G", "macs", UNIT),
        ("-3M", "params", NUMBER),
        ("0ms", "milliseconds", NUMBER),
        ("35kms", "milliseconds", NUMBER),
        ("35 s", "milliseconds", NUMBER),
        ("23.6MB", "params", NUMBER),
        ("75%", "params", NUMBER),
        ("1e6", "params", NUMBER),
        ("1,5M", "params", NUMBER),  # a decimal comma
        ("1,2345M", "params", NUMBER),
        ("\uff19M", "params", NUMBER),  # a digit of another script
        ("nan ms", "milliseconds", NUMBER),
        ("", "params", NUMBER),
        ("M", "params", NUMBER),
        ("35\nms", "milliseconds", NUMBER),
        ("35ms", "params", ", and pruning.cost is params: set --pruning.cost milliseconds"),
        ("500GMACs", "params", ", and pruning.cost is params: set --pruning.cost macs"),
        ("23.6M params", "milliseconds", ", and pruning.cost is milliseconds: set --pruning.cost params"),
    ],
)
def test_targets_that_say_too_little_or_something_else(text, cost, said):
    with pytest.raises(UserError) as error:
        parse_target(text, cost, "pruning.target")
    assert said in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).startswith("pruning.target is ")


def test_costs_in_their_units():
    assert Parameters().text(23_585_946.4) == "23,585,946 parameters"
    assert MultiplyAccumulates(SUPERB_SAMPLES).text(654.21e9) == "654.2 GMACs (SUPERB)"
    assert MultiplyAccumulates([160_000]).text(1.5e12) == "1,500 GMACs (10 s)"
    assert Milliseconds(LatencyTable(latency_content(TINY), "x")).text(35.1234) == "35.12 ms"


def test_budgets():
    assert Budget.of_share(Parameters(), 1001, 0.75).target == 250, "whole ones"
    budget = Budget.of_share(MultiplyAccumulates([100]), 1001, 0.75)
    assert (budget.before, budget.target, budget.sparsity) == (1001, 250.25, 0.75)
    budget = Budget.of_target(budget.cost, 1000, 300)
    assert (budget.target, budget.sparsity, budget.sparsity_of(900)) == (300, 0.7, pytest.approx(0.1))
    assert budget.sparsity_of(torch.tensor([900.0, 200.0])).tolist() == pytest.approx([0.1, 0.8])


@pytest.mark.parametrize("cost", ["params", "macs", "milliseconds"])
def test_checkpoints_keep_budgets(tmp_path, cost):
    """In plain types, without the file of the table."""
    budget = Budget.of_share(costs_of(TINY)[cost], 1234.5, 0.6)
    torch.save(budget.state(), tmp_path / "x.ckpt")
    found = Budget.read(torch.load(tmp_path / "x.ckpt", weights_only=True), "x.ckpt")
    model = wav2vec2_model(**TINY)
    assert (found.before, found.target, found.sparsity) == (budget.before, budget.target, budget.sparsity)
    assert found.cost(model) == budget.cost(model) and found.cost.text(1e9) == budget.cost.text(1e9)


@pytest.mark.parametrize(
    "changes",
    [{"cost": "flops"}, {"cost": None}, {"before": None}, {"target": "x"}, {"samples": None}, {"samples": [1.5]},
     {"samples": [0]}, {"cost": "milliseconds", "table": 3}],
    ids=str,
)  # fmt: skip
def test_damaged_budgets(changes):
    state = {"cost": "macs", "samples": [160], "before": 100.0, "target": 50.0, "sparsity": 0.5}
    assert Budget.read(state, "x.ckpt").target == 50
    for damaged in ({**state, **changes}, {k: v for k, v in state.items() if k not in changes}, 7, None):
        with pytest.raises(UserError, match=r"^x\.ckpt: (damaged, its budget cannot be read|not a latency table)"):
            Budget.read(damaged, "x.ckpt")
