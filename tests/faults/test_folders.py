"""Disks that are full, folders that cannot be written or are taken, checkpoints that are broken."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from distillation import runlock
from distillation.errors import UserError
from distillation.runlock import run_lock
from tests.faults.test_resume import assert_same_run


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
    first = server.start("distill.py", *flags, "--optim.max_steps", 200)
    first.until((exp / "metrics.csv").exists)
    message = server.run("distill.py", *flags, "--seed", 5, code=2).error
    assert f"{exp} is in use by process {first.pid} on {socket.gethostname()}" in message and str(exp / ".lock") in message
    assert "seed: 2022" in (exp / "config.yaml").read_text(), "the second run changed the folder of the first"
    first.kill(runlock.os.signal.SIGTERM if hasattr(runlock.os, "signal") else 15)
    assert first.wait().code == 75
