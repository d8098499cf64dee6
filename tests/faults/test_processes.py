"""Several processes: killed and resumed, one of them lost, and started by torchrun."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.faults.test_resume import assert_same_run

ROOT = Path(__file__).parents[2]


def start(*command: object, log: Path) -> subprocess.Popen:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, env=environment, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip


def ranks(exp: Path) -> list[int]:
    """Processes of a run, the oldest first."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if str(exp).encode() in words and any(word.endswith(b"distill.py") for word in words[:2]):
                found.append(int(folder.name))
    return sorted(found)


def wait_for(path: Path, log: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def one_error(log: Path) -> str:
    text = log.read_text()
    assert "Traceback" not in text, text
    lines = text.replace("\r", "\n").splitlines()
    return next(line for line in reversed(lines) if line.startswith(("error: ", "stopped: ")))


def test_two_processes(tiny_flags, tmp_path):
    """Rank 1 dies, rank 0 dies, both are asked to end; then to the end: the same bits as without any of it."""
    flags = [*tiny_flags, "--trainer.devices", 2, "--optim.max_steps", 40, "--data.num_workers", 1]
    reference, exp, log = tmp_path / "reference", tmp_path / "run", tmp_path / "log"
    last = exp / "ckpts/last.ckpt"
    undisturbed = start("distill.py", *flags, "--exp_dir", reference, log=tmp_path / "reference.log")
    for victim in (1, 0):
        run = start("distill.py", *flags, "--exp_dir", exp, log=log)
        wait_for(last, log) if victim else wait_for(exp / ".lock", log)
        before = last.stat().st_mtime_ns if last.exists() else 0
        while not last.exists() or last.stat().st_mtime_ns == before and victim == 0:
            time.sleep(0.02)
        begin = time.monotonic()
        both = ranks(exp)
        os.kill(run.pid if victim == 0 else next(pid for pid in both if pid != run.pid), signal.SIGKILL)
        assert run.wait(60) == (1 if victim else -signal.SIGKILL), log.read_text()
        while ranks(exp):
            assert time.monotonic() - begin < 60, "the other process goes on"
            time.sleep(0.1)
        assert any(reason in one_error(log) for reason in ("is gone", "was killed", "connection to another process"))
    run = start("distill.py", *flags, "--exp_dir", exp, log=log)
    before = last.stat().st_mtime_ns
    while last.stat().st_mtime_ns == before:
        time.sleep(0.02)
    run.send_signal(signal.SIGTERM)  # to rank 0 alone
    assert run.wait(60) == 75, log.read_text()
    assert "stopped: SIGTERM at update" in one_error(log)
    assert torch.load(last, weights_only=True)["global_step"] < 40
    run = start("distill.py", *flags, "--exp_dir", exp, log=log)
    assert run.wait(120) == 0, log.read_text()
    assert undisturbed.wait(120) == 0
    assert_same_run(reference, exp)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun(tiny_flags, tmp_path, victim):
    exp, log = tmp_path / "run", tmp_path / "log"
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29400 + os.getpid() % 1000]
    flags = [*tiny_flags, "--trainer.devices", 2, "--optim.max_steps", 500, "--exp_dir", exp]
    run = start(*torchrun, "distill.py", *flags, log=log)
    wait_for(exp / "ckpts/last.ckpt", log)
    workers = [pid for pid in ranks(exp) if pid != run.pid]
    of_rank = {}
    for pid in workers:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        of_rank.update({int(word[5:]): pid for word in environment if word.startswith(b"RANK=")})
    begin = time.monotonic()
    os.kill(of_rank[victim], signal.SIGKILL)
    assert run.wait(60) == 1
    while ranks(exp):
        assert time.monotonic() - begin < 60
        time.sleep(0.1)
    assert "SIGKILL" in log.read_text() or "connection to another process" in log.read_text()
