"""What is left out of a run: counted, named once, and too much of it."""

from __future__ import annotations

import json
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from distillation.data.loaders import Batch
from distillation.data.manifest import Manifest
from distillation.errors import UserError
from distillation.training.guards import MAX_NAMED, BatchGuard, Trouble

ALONE = types.SimpleNamespace(world_size=1, is_global_zero=True)
FINITE, INFINITE = torch.tensor(1.0), torch.tensor(float("inf"))


def batch(*files: str, errors: dict[str, str] | None = None, silent=(), clipped=()) -> Batch:
    return Batch(
        waveforms=torch.zeros(len(files), 10), lengths=None, number=0, files=list(files), errors=errors or {},
        seconds=1.0, read_seconds=0.1, silent=list(silent), clipped=list(clipped),
    )  # fmt: skip


@pytest.fixture
def guard(tmp_path: Path) -> BatchGuard:
    """Of a run with ten files in each list, of which a fifth may be bad, and two updates without effect."""
    lists = {
        kind: Manifest(tmp_path, [f"{kind}{i}" for i in range(10)], np.full(10, 100)) for kind in ("train", "valid")
    }
    return BatchGuard(lists, 0.2, 2, tmp_path / "bad_files.tsv")


def test_bad_files_are_counted_and_named_once(guard, caplog):
    guard.read("train", batch("a", errors={"x": "cut"}))
    guard.read("train", batch("b", errors={"x": "cut"}))
    guard.read("valid", batch("c", errors={"y": "gone"}, silent=["c"], clipped=["c", "d"]))
    assert guard.metrics()["skipped/files"] == 0, "nothing is settled yet"
    guard.settle(ALONE)
    guard.read("train", batch(errors={"x": "cut"}, silent=["e"]))
    guard.settle(ALONE)
    assert guard.metrics() == {"skipped/files": 2, "skipped/updates": 0, "audio/silent": 2, "audio/clipped": 2}
    lines = [record.getMessage() for record in caplog.records]
    assert lines.count("left out of the training data from now on: x: cut") == 1
    assert lines.count("left out of the validation data from now on: y: gone") == 1
    assert lines.count("silent audio, e.g. c (counted in metrics.csv)") == 1
    assert len(lines) == 4
    assert guard.report.read_text() == "x\tcut\ny\tgone\n"


def test_too_many_bad_files(guard, caplog):
    guard.read("train", batch(errors={"x": "cut", "y": "cut"}))
    guard.read("valid", batch(errors={"z": "cut"}))
    guard.settle(ALONE)  # a fifth is allowed, of each list
    guard.read("train", batch(errors={"w": "8000 Hz"}))
    with pytest.raises(
        UserError, match=r"3 of 10 training files .* --data\.max_bad_share 0\.2: x: cut; y: cut; w: 8000"
    ):
        guard.settle(ALONE)
    guard.settle(ALONE)  # said once: what is new counts


def test_only_some_of_many_are_named(guard, caplog):
    guard.max_bad_share = 1
    guard.read("train", batch(errors={str(i): "cut" for i in range(MAX_NAMED + 2)}))
    guard.settle(ALONE)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == MAX_NAMED + 1 and lines[-1] == f"and 2 more, see {guard.report}"
    assert len(guard.report.read_text().splitlines()) == MAX_NAMED + 2


def test_a_root_that_is_gone_is_the_reason(guard, tmp_path):
    guard.manifests["train"] = Manifest(tmp_path / "mount", ["a"], np.array([100]))
    guard.read("train", batch(errors={"a": "No such file"}))
    with pytest.raises(UserError, match="mount is gone"):
        guard.settle(ALONE)


def update(guard: BatchGuard, number: int, *losses: torch.Tensor, gradient: bool | None = True) -> None:
    for i, loss in enumerate(losses):
        guard.loss(number, loss, batch(f"{number}.{i}"))
    guard.gradient(number, None if gradient is None else torch.tensor(gradient))


def test_updates_without_effect(guard, caplog):
    update(guard, 0, FINITE, FINITE)
    update(guard, 1, FINITE, INFINITE, gradient=False)
    update(guard, 2, FINITE, FINITE, gradient=False)
    guard.settle(ALONE)
    assert guard.metrics()["skipped/updates"] == 2
    assert [record.getMessage() for record in caplog.records] == [
        "update 2 has no effect, its loss is not finite; files: 1.1",
        "update 3 has no effect, its gradient is not finite; files: 2.0, 2.1",
    ]
    update(guard, 3, FINITE)
    guard.settle(ALONE)  # two are allowed
    update(guard, 4, INFINITE, gradient=False)
    with pytest.raises(UserError, match=r"3 updates had .* more than --trainer\.max_skipped_updates 2; .*: 4\.0\. Try"):
        guard.settle(ALONE)


def test_under_a_loss_scaler_only_the_loss_counts(guard, caplog):
    """It skips updates by itself while it looks for its scale."""
    update(guard, 0, FINITE, FINITE, gradient=None)
    update(guard, 1, FINITE, INFINITE, gradient=None)
    guard.settle(ALONE)
    assert guard.metrics()["skipped/updates"] == 1 and "update 2 has no effect, its loss" in caplog.text


def test_micro_batches_of_the_update_under_way_are_kept(guard, caplog):
    update(guard, 0, FINITE)
    guard.loss(1, INFINITE, batch("early"))
    guard.settle(ALONE)
    assert guard.metrics()["skipped/updates"] == 0
    guard.loss(1, FINITE, batch("late"))
    guard.gradient(1, torch.tensor(False))
    guard.settle(ALONE)
    assert guard.metrics()["skipped/updates"] == 1 and "files: early" in caplog.text and "late" not in caplog.text


def test_totals_survive_a_checkpoint(guard, tmp_path):
    guard.read("train", batch(errors={"x": "cut"}, clipped=["c"]))
    update(guard, 0, INFINITE, gradient=False)
    guard.settle(ALONE)
    again = BatchGuard(guard.manifests, 0.2, 2, tmp_path / "again.tsv")
    again.load_state(json.loads(json.dumps(guard.state())))
    assert again.metrics() == guard.metrics() and again.metrics()["skipped/files"] == 1
    again.read("train", batch(errors={"x": "cut"}, clipped=["d"]))  # known already
    again.settle(ALONE)
    assert again.metrics() == {"skipped/files": 1, "skipped/updates": 1, "audio/silent": 0, "audio/clipped": 2}
    assert not again.report.exists()


def test_what_another_rank_met_is_added():
    mine, theirs = Trouble(), Trouble()
    assert not mine
    mine.files["train"]["a"] = "cut"
    theirs.files["train"]["b"] = "cut"
    theirs.levels["silent"] = ["s"]
    mine.updates, mine.suspects = {3: ["a"]}, {3: ["a", "c"]}
    theirs.updates, theirs.suspects = {3: [], 4: ["d"]}, {3: ["e"], 4: ["d"]}
    mine.add(theirs)
    assert mine.files["train"] == {"a": "cut", "b": "cut"} and mine.levels["silent"] == ["s"]
    assert mine.updates == {3: ["a"], 4: ["d"]} and mine.suspects == {3: ["a", "c", "e"], 4: ["d"]}
