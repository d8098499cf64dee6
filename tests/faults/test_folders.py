"""Disks that are full, folders that cannot be written or are taken, checkpoints that are broken."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess

import pytest
import torch

from tests.helpers import assert_same_run


@pytest.fixture
def small_disk(tmp_path):
    """Mount an empty disk; afterwards take it away."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("may not mount a disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_disk_full(server, reference, tiny_flags, tmp_path):
    exp = tmp_path / "run"
    args = ["distill.py", *tiny_flags, "--exp_dir", exp]
    last = exp / "ckpts/last.ckpt"
    message = server.run(*args, fault=["full", "write", 1], code=2).error
    assert message.startswith(f"error: {last}: No space left on device; make room and run again")
    assert torch.load(last, weights_only=True)["global_step"] == 3
    assert [path.name for path in last.parent.iterdir()] == ["last.ckpt"]
    server.run(*args)
    assert_same_run(reference, exp)


def test_small_disk(server, small_disk, reference, tiny_flags):
    """A real one: the first checkpoint fits, the second does not fit beside it."""
    exp, size = small_disk / "run", (reference / "ckpts/last.ckpt").stat().st_size
    (small_disk / "filler").write_bytes(b"x" * (2 * 1024 * 1024 - int(1.7 * size)))
    message = server.run("distill.py", *tiny_flags, "--exp_dir", exp, code=2).error
    assert "No space left on device; make room" in message
    assert torch.load(exp / "ckpts/last.ckpt", weights_only=True)["global_step"] == 3
    (small_disk / "filler").unlink()
    server.run("distill.py", *tiny_flags, "--exp_dir", exp)
    assert_same_run(reference, exp)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    message = server.run("distill.py", *tiny_flags, "--exp_dir", small_disk / "other", code=2).error
    assert "Read-only file system; choose a folder that can be written" in message


def test_folder_is_a_file(server, tiny_flags, tmp_path):
    (tmp_path / "file").write_text("")
    message = server.run("distill.py", *tiny_flags, "--exp_dir", tmp_path / "file/run", code=2).error
    assert "Not a directory; a part of this path is a file" in message


def test_second_run_is_refused(server, tiny_flags, tmp_path):
    exp = tmp_path / "run"
    flags = [*tiny_flags, "--exp_dir", exp]
    first = server.start("distill.py", *flags, "--optim.max_steps", 400)
    first.until((exp / "metrics.csv").exists)
    message = server.run("distill.py", *flags, "--seed", 5, code=2).error
    assert f"{exp} is in use by process {first.pid} on {socket.gethostname()}" in message
    assert str(exp / ".lock") in message
    assert "seed: 2022" in (exp / "config.yaml").read_text(), "the second run changed the folder of the first"
    first.kill(signal.SIGTERM)
    assert first.wait().code == 75


def other_shape(content: dict) -> None:
    state = content["optimizer_states"][0]["state"]
    state[0]["exp_avg"] = state[0]["exp_avg"].flatten()[:1]


def other_heads(content: dict) -> None:
    content["state_dict"].pop(next(name for name in content["state_dict"] if name.startswith("objectives.")))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: content.pop("loops"), "does not say where it stands"),
        (lambda content: content["guard"].pop("counts"), "cannot be continued"),
        (lambda content: content["means"].update(seconds=None), "cannot be continued"),
        (lambda content: content["optimizer_states"][0]["param_groups"][0].update(lr="fast"), "cannot be continued"),
        (lambda content: content.update(global_step="nine"), "not a checkpoint of a run"),
        (other_shape, "optimizer state"),
        (other_heads, "another network or objective"),
    ],
)
def test_checkpoint_with_wrong_content(server, reference, tiny_flags, tmp_path, change, reason):
    """Nothing is written over it."""
    exp = tmp_path / "run"
    shutil.copytree(reference / "ckpts", exp / "ckpts")
    last = exp / "ckpts/last.ckpt"
    content = torch.load(last, weights_only=True)
    change(content)
    torch.save(content, last)
    before = last.read_bytes()
    longer = ("--optim.max_steps", 15, "--continue_with_changes")
    message = server.run("distill.py", *tiny_flags, "--exp_dir", exp, *longer, code=2).error
    assert reason in message and str(last) in message
    assert last.read_bytes() == before and not (exp / ".lock").exists()
