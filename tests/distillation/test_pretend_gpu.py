"""Every method and model on a GPU that is none: nothing is left on the CPU, types fit, and the host seldom waits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from benchmarks.trial import TOLERANCE
from tests.helpers import ROOT

GATES = "aten._to_copy.default in wav2vec2/hardconcrete.py: alive = (value > 0).cpu()"
EVAL_GATES = "aten._to_copy.default in wav2vec2/hardconcrete.py: host_log_alpha = log_alpha.detach().cpu()"
CTC = "aten._to_copy.default in distillation/objectives/ctc.py: losses = F.ctc_loss("  # torch's own wants lengths there


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What tests/pretend_gpu.py found."""
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.pretend_gpu"], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.mark.slow
def test_losses_are_those_of_the_cpu(seen):
    """Also where live units are rounded up to multiples of 8, as a GPU has them."""
    assert len(seen["training"]) >= 3 * 15
    for row in seen["training"]:
        limit = 1e-6 if row["precision"] == "32-true" else TOLERANCE[row["precision"]]
        assert abs(row["found"] - row["expected"]) <= limit * max(1, abs(row["expected"])), row


@pytest.mark.slow
def test_the_host_waits_once_a_micro_batch(seen):
    """For the gates; in students without, for the lengths of rows whose frames are masked."""
    for row in seen["training"]:
        waits = [wait for wait in row["waits"] if wait != CTC]
        assert len(waits) <= 1, row
        assert all(wait == GATES or "lengths.tolist()" in wait for wait in waits), row
        assert row["waits"].count(CTC) <= 2


@pytest.mark.slow
def test_models_give_what_they_give_on_the_cpu(seen):
    for row in seen["inference"]:
        assert row["difference"] < 2e-6, row
        assert row["waits"] == ([EVAL_GATES] if row["model"] == "masked" else []), row


@pytest.mark.slow
def test_it_would_notice(seen):
    two_devices, *waits = seen["mistakes"]
    assert "aten.add.Tensor: tensors on cuda:0 and on the CPU" in two_devices
    assert [wait.split()[0] for wait in waits] == ["aten._local_scalar_dense.default", "aten.index.Tensor"]
