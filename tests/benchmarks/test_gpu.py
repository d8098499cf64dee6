"""What scripts/gpu.sh runs, on the CPU: the parts hold, their mistakes are found, their time is kept."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_checks, gpu_profile, gpu_stages
from benchmarks.gpu_profile import CHANGES, conv1d_by_products
from benchmarks.trial import SMALL, TOLERANCE, Trial, Updates, recipe_names
from distillation.errors import Incomplete, UserError
from distillation.stopping import Signalled
from tests.helpers import ROOT
from wav2vec2 import kernels
from wav2vec2.kernels import conv1d


def check(folder: Path, **flags: object) -> dict:
    """The checks of a run."""
    gpu_checks.run(folder / "out.json", device="cpu", size="small", **flags)
    return json.loads((folder / "out.json").read_text())["checks"]


@pytest.mark.slow
def test_every_recipe_is_checked(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_stages.Stages, "killed_and_resumed", lambda self: time.sleep(1) or {})
    rows = check(tmp_path, seconds=0.0)
    begun = rows.pop("killed and resumed")
    assert begun["found"] == {} and begun["seconds"] > 0.9, "beside the others, before it was late"
    named = {name for row in rows for name in row.removeprefix("small: ").split(", ")}
    assert set(recipe_names()) <= named
    assert all(row == {"left_out": True} for row in rows.values())
    assert {"small: dpwavlm_base_plus, eval", "pruned, and step 2", "extract_features.py", "export.py"} <= set(rows)


@pytest.mark.slow
def test_updates_and_masks_on_the_same_device(tmp_path, capsys):
    rows = check(tmp_path, only="small: dphubert_plus")
    assert list(rows) == ["small: dphubert_plus, eval", "small: dphubert_plus"]
    updates = rows["small: dphubert_plus"]["found"]
    assert updates["32-true"] == updates["its gradient, 32-true"] == 0.0
    assert 0 < updates["bf16-mixed"] < TOLERANCE["bf16-mixed"] and updates["its gradient, bf16-mixed"] > 0
    assert "2 checks hold, 0 do not, 0 left out" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spoil", "precision"),
    [
        (lambda found: [1.0002 * loss for loss in found.losses], "32-true"),
        (lambda found: [found.losses[0], math.nan, found.losses[2]], "bf16-mixed"),
        (lambda found: found.gradients["weights"].zero_(), "its gradient, bf16-mixed"),
        (lambda found: found.gradients["log_alpha"].mul_(1.002), "its gradient, 32-true"),
    ],
)
def test_what_differs_is_told(tmp_path, monkeypatch, capsys, spoil, precision):
    """As if a device summed up something else, or had no backward pass."""
    updates, calls = Trial.updates, []

    def off_after_the_first(self: Trial, *args: object) -> Updates:
        found = updates(self, *args)
        calls.append(found)
        if len(calls) > 1:
            spoilt = spoil(found)
            found = Updates(spoilt, found.gradients) if isinstance(spoilt, list) else found
        return found

    monkeypatch.setattr(Trial, "updates", off_after_the_first)
    with pytest.raises(Incomplete, match=r"1 of 2 checks do not hold: small: dphubert_plus$"):
        check(tmp_path, only="small: dphubert_plus")
    eval_row, row = json.loads((tmp_path / "out.json").read_text())["checks"].values()
    assert row["error"].startswith("updates differ from the CPU's") and f"'{precision}': " in row["error"]
    assert "found" in eval_row and "AssertionError" in row["traceback"]
    assert capsys.readouterr().out.count("FAILED") == 1


@pytest.mark.slow
def test_a_model_that_lost_something_is_told(tmp_path, monkeypatch):
    cut = gpu_checks.prune

    def lossy(model):
        left, config = cut(model)
        left.encoder.transformer.layers[-1].final_layer_norm.weight.data[0] += 0.01
        return left, config

    monkeypatch.setattr(gpu_checks, "prune", lossy)
    with pytest.raises(Incomplete, match=r"1 of 1 checks do not hold: small: dphubert_plus, eval$"):
        check(tmp_path, only="small: dphubert_plus, eval")
    [row] = json.loads((tmp_path / "out.json").read_text())["checks"].values()
    assert "'from the CPU': 0.0, 'from the pruned model': 0.0" in row["error"]


def test_recipes_that_train_alike():
    assert len({Trial.of(name, SMALL).method for name in ("starhubert", "starhubert_xs")}) == 1
    assert len({Trial.of(name, SMALL).method for name in ("dphubert_base", "dpwavlm_base_plus")}) == 2


@pytest.mark.slow
def test_stages(tmp_path, monkeypatch, script):
    """The killed run is a process of its own, and so is one that fails; the rest need not import all again."""
    monkeypatch.setattr(gpu_stages, "UPDATES", 12)
    monkeypatch.setattr(gpu_stages, "CHECKPOINT", 4)
    stages = gpu_stages.Stages(tmp_path, "cpu")
    monkeypatch.setattr(stages, "run", script)
    killed = stages.killed_and_resumed()
    assert killed["killed at update"] in (4, 8) and killed["weights differ by"] == 0.0
    assert stages.second_step()["parameters"] > 0
    assert stages.features()["differ from the CPU's by"] < 1e-5
    shutil.rmtree(stages.run_folder)
    assert stages.second_step()["parameters"] > 0  # alone, as --only has it
    monkeypatch.undo()
    with pytest.raises(AssertionError, match=r"prune\.py ended with 2: error: "):
        stages.run("prune.py", "--distilled_ckpt", tmp_path / "none.ckpt")


@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 2), (2, 2), (10, 5)])
def test_convolution_by_products(kernel_size, stride):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 41, 6, requires_grad=True), torch.randn(5, 6, kernel_size, requires_grad=True)
    bias = torch.randn(5, requires_grad=True)
    expected, found = (form(x, weight, bias, stride) for form in (conv1d, conv1d_by_products))
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(y.square().sum(), (x, weight, bias)) for y in (expected, found)]
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_profile(tmp_path, capsys):
    out = tmp_path / "profile.json"
    gpu_profile.run(out, batch_seconds=2.0, rounds=1, device="cpu", size="small")
    found = json.loads(out.read_text())
    operations = found["operations"]
    assert 0 < operations["expected size"] < 0.2 * (operations["forward"] + operations["backward"])
    assert {row["name"] for row in found["profile"]["kernels"]} & {"aten::bmm", "aten::mm", "aten::addmm"}
    assert set(CHANGES) - set(found["changes"]) == {"matrix products by cuBLASLt"}
    assert set(found["sizes"]) == {"new in every step", "the same in every step"}
    one, eight = found["step 2"].values()
    assert eight["parameters"] == pytest.approx(one["parameters"], rel=0.02) and one["seconds"] > 0
    assert "| sizes as they come | " in capsys.readouterr().out
    assert kernels.takes("channels_last")  # all is as it was
    gpu_profile.run(out, seconds=0.0, batch_seconds=2.0, rounds=1, device="cpu", size="small")
    assert "no time for: step 2" in capsys.readouterr().out


@pytest.mark.slow
def test_mistakes(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for module in (gpu_checks, gpu_profile):
        with pytest.raises(UserError, match="no GPU is visible; --device cpu tries the"):
            module.run(tmp_path / "out.json")
    with pytest.raises(UserError, match="--only nothing: no check has this in its name"):
        check(tmp_path, only="nothing")
    for words, said in (
        ([tmp_path, "speedy"], "speedy: choose checks, speed, profile"),
        (["checks", "speed"], "checks: name a folder for the results first"),
        (["--size=small"], "--size=small: name a folder for the results first"),
    ):
        ran = subprocess.run([ROOT / "scripts" / "gpu.sh", *words], capture_output=True, text=True)
        assert (ran.returncode, ran.stderr) == (2, f"error: {said}\n")
    for effort, said in (({"rounds": 0}, "--rounds is 0: it must be at least 1"),
                         ({"batch_seconds": 0.01}, "--batch_seconds is 0.01: it must be at least 1")):  # fmt: skip
        for module in (gpu, gpu_profile):
            with pytest.raises(UserError, match=said):
                module.run(tmp_path / "out.json", device="cpu", **effort)


def test_a_stopped_check_tells_what_was_found(tmp_path, monkeypatch, capsys):
    def stop() -> dict:
        raise Signalled(signal.SIGINT)

    found = {"one": lambda: {"a": 1.0}, "two": stop, "three": stop}
    monkeypatch.setattr(gpu_checks, "checks", lambda *args: found)
    with pytest.raises(Signalled):
        check(tmp_path)
    assert "1 checks hold, 0 do not, 2 left out" in capsys.readouterr().out
    assert list(json.loads((tmp_path / "out.json").read_text())["checks"]) == ["one"]
