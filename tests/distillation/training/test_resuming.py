"""What a checkpoint must hold for a run to go on with it."""

from __future__ import annotations

import math

import pytest

from distillation.training.resuming import _same_kind

FRESH = {"lr": 0.1, "betas": (0.9, 0.999), "fused": True, "foreach": None, "params": [0, 1], "name": "weights"}


def test_values_of_a_run_are_of_the_kinds_of_a_fresh_one():
    later = {**FRESH, "lr": 1, "betas": [0.8, 1.0], "fused": None, "foreach": False, "params": [5, 6], "new": "x"}
    assert _same_kind(later, FRESH)
    assert _same_kind({}, FRESH)  # what is missing is missed when it is taken


@pytest.mark.parametrize(
    "wrong",
    [{"lr": "fast"}, {"lr": None}, {"lr": True}, {"lr": math.nan}, {"betas": 0.9}, {"betas": (0.9,)}, {"fused": 1},
     {"params": {0: 1}}, {"params": [0, "1"]}, {"name": 3}],
)  # fmt: skip
def test_wrong_kinds(wrong):
    assert not _same_kind({**FRESH, **wrong}, FRESH)
    assert not _same_kind({"inner": [{**FRESH, **wrong}]}, {"inner": [FRESH]})
