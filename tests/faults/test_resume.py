"""A run that is killed anywhere and started again ends with the same bits as one that never was."""

from __future__ import annotations

import signal

import pytest
import torch

from tests.helpers import assert_same_run, assert_same_tensors, weights


def test_a_bug_in_the_first_resumed_update_is_no_broken_checkpoint(server, reference, tiny_flags, tmp_path):
    """A mistake in a new objective shows its traceback, and the checkpoint is as good as before."""
    exp = tmp_path / "run"
    args = ["distill.py", *tiny_flags, "--exp_dir", exp]
    server.run(*args, fault=["kill", "update", 8], code=-signal.SIGKILL)
    finished = server.run(*args, fault=["bug", "update", 6], code=1)
    assert "resuming from" in finished.output and "at update 6" in finished.output
    assert "Traceback" in finished.output and "has no attribute 'heds'" in finished.output
    assert "move it away" not in finished.output and "error: " not in finished.output
    server.run(*args)
    assert_same_run(reference, exp)


def test_step_1_killed_everywhere(server, reference, tiny_flags, tmp_path):
    """Within an epoch, in validation, while writing, before the rename, and across epochs (one is 2 to 3 updates)."""
    exp = tmp_path / "run"
    args = ["distill.py", *tiny_flags, "--exp_dir", exp]
    last = exp / "ckpts/last.ckpt"
    for fault, saved in (
        (["kill", "update", 2], None),
        (["kill", "rename", 0], None),
        (["kill", "update", 4], 3),
        (["kill", "valid", 4], 3),
        (["kill", "write", 0], 3),
        (["SIGTERM", "update", 4], 5),
        (["SIGUSR1", "update", 7], 8),  # a validation follows this update, and is not lost
        (["SIGINT", "update", 9], 10),  # Ctrl-C
        (["kill", "valid", 12], 10),
    ):
        finished = server.run(*args, fault=fault, code=75 if fault[0] != "kill" else -signal.SIGKILL)
        assert last.is_file() == (saved is not None)
        if saved is not None:
            assert torch.load(last, weights_only=True)["global_step"] == saved
        if fault[0] != "kill":
            assert f"stopped: {fault[0]} at update {saved}: saved" in finished.error
            assert not (exp / ".lock").exists()
    server.run(*args)
    assert_same_run(reference, exp)
    ends, same = (torch.load(run / "ckpts/last.ckpt", weights_only=True)["AudioDataModule"] for run in (reference, exp))
    assert ends == same and len(ends["ends"]) > 3, "epochs that are over are not counted again"


def test_an_update_may_be_cut_in_another_way(server, tiny_flags, tmp_path):
    """On other GPUs: the update keeps its seconds, and the folder says from when on."""
    exp = tmp_path / "run"
    args = ["distill.py", *tiny_flags, "--exp_dir", exp]
    server.run(*args, fault=["SIGTERM", "update", 6], code=75)
    cut = ["--data.seconds_per_batch", 2.5, "--trainer.batches_per_update", 4, "--trainer.precision", "bf16-mixed"]
    finished = server.run(*args, *cut)
    assert "with other micro-batches the rest of this epoch is drawn anew" in finished.output
    changed = {
        "data.seconds_per_batch": [5.0, 2.5],
        "trainer.batches_per_update": [2, 4],
        "trainer.precision": ["32-true", "bf16-mixed"],
    }
    checkpoint = torch.load(exp / "ckpts/last.ckpt", weights_only=True)
    assert checkpoint["run"]["history"][1:] == [{"update": 7, "changed": changed}]
    assert checkpoint["AudioDataModule"]["cut"] == [2.5, None] and checkpoint["global_step"] == 12
    message = server.run(*args, "--data.seconds_per_batch", 3, code=2).error
    assert "update 10 s -> 6 s" in message and "update cannot change in the middle of a run" in message


@pytest.mark.parametrize("workers", [0, 2])
def test_step_2_killed_everywhere(server, reference, tiny_flags, tmp_path, workers):
    """Here validation after the last update is a pass of its own."""
    exp = tmp_path / "final"
    args = ["final_distill.py", *tiny_flags, "--student_ckpt", reference / "pruned.pth", "--exp_dir", exp,
            "--data.num_workers", workers]  # fmt: skip
    faults = [["kill", "update", 5], ["SIGTERM", "update", 3], ["kill", "write", 0], ["kill", "valid", 6]]
    faults += [["SIGINT", "valid", 6]]  # after the last update nothing waits for one to end
    faults += [["kill", "write", 0]]  # of final.pth: the run itself is complete
    for fault in faults if workers == 0 else faults[:2]:
        server.run(*args, fault=fault, code=75 if fault[0] != "kill" else -signal.SIGKILL)
    assert not (exp / "final.pth").exists()
    server.run(*args)
    assert_same_run(reference / "final", exp)
    assert_same_tensors(weights(reference / "final/final.pth"), weights(exp / "final.pth"))
