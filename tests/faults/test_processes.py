"""Several processes: killed and resumed, one of them lost, and started by torchrun."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT, assert_same_run


def start(*command: object, log: Path) -> subprocess.Popen:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, *map(str, command)], cwd=ROOT, env=environment, stdout=file, stderr=file,
            start_new_session=True,
        )  # fmt: skip


def processes_of(log: Path) -> list[int]:
    """Those that print into a file, readers of audio included; the oldest first."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "fd" / "1").readlink() == log:
                found.append(int(folder.name))
    return sorted(found)


def launched(log: Path) -> list[int]:
    """Ranks that a launcher has started, and their readers; the oldest first."""
    found = []
    for pid in processes_of(log):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if any(word.endswith(b"distill.py") for word in words):
                found.append(pid)
    return found


def wait_for(path: Path, log: Path) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)


def test_no_process_without_its_client(server, tmp_path):
    """The server of the tests kills it, also where the client is gone before it knows which process it asked for."""
    script, log = tmp_path / "sleep.py", tmp_path / "log"
    script.write_text("import time; time.sleep(600)")
    request = {"argv": [str(script)], "cwd": str(tmp_path), "environ": {}, "executable": sys.executable, "fault": None}
    with socket.socket(socket.AF_UNIX) as client, log.open("w") as file:
        client.connect(server.socket)
        socket.send_fds(client, [json.dumps(request).encode() + b"\n"], [file.fileno()] * 2)
    time.sleep(0.5)  # for its start
    deadline = time.monotonic() + 20
    while processes_of(log):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_two_processes(server, tiny_flags, tmp_path):
    """Rank 1 dies, rank 0 dies, rank 0 is asked to end; then to the end: the same bits as without any of it."""
    flags = [*tiny_flags, "--trainer.devices", 2, "--optim.max_steps", 24, "--data.num_workers", 1]
    exp = tmp_path / "run"
    last = exp / "ckpts/last.ckpt"
    reference = server.start("distill.py", *flags, "--exp_dir", tmp_path / "reference")
    for victim, code in ((1, 1), (0, -signal.SIGKILL), (None, 75)):
        before = last.stat().st_mtime_ns if last.exists() else 0
        # when rank 0 is killed, rank 1 must be a child of its own, which sees that its parent is gone
        python = Path(sys.executable) if victim == 0 else None
        run = server.start("distill.py", *flags, "--exp_dir", exp, python=python)
        run.until(lambda: last.exists() and last.stat().st_mtime_ns != before)  # noqa: B023
        begin = time.monotonic()
        other, *_ = launched(run.logs[0])
        os.kill(other if victim == 1 else run.pid, signal.SIGTERM if victim is None else signal.SIGKILL)
        finished = run.wait()
        assert finished.code == code, finished.output
        run.until(lambda: not processes_of(run.logs[0]))  # noqa: B023
        assert time.monotonic() - begin < 60
        message = run.finished().error
        assert any(reason in message for reason in REASONS[victim])
    assert torch.load(last, weights_only=True)["global_step"] < 24
    server.run("distill.py", *flags, "--exp_dir", exp)
    assert reference.wait().code == 0
    assert_same_run(tmp_path / "reference", exp)


REASONS = {
    0: ("is gone", "connection to another process"),
    1: ("was killed", "connection to another process"),
    None: ("stopped: SIGTERM at update",),
}


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_torchrun(tiny_flags, tmp_path, victim):
    exp, log = tmp_path / "run", tmp_path / "log"
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", 29400 + os.getpid() % 1000]
    flags = [*tiny_flags, "--trainer.devices", 2, "--optim.max_steps", 500, "--exp_dir", exp]
    run = start(*torchrun, "distill.py", *flags, log=log)
    wait_for(exp / "ckpts/last.ckpt", log)
    of_rank = {}
    for pid in launched(log):
        if pid == run.pid:
            continue
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        of_rank.update({int(word[5:]): pid for word in environment if word.startswith(b"RANK=")})
    begin = time.monotonic()
    os.kill(of_rank[victim], signal.SIGKILL)
    assert run.wait(60) == 1
    while processes_of(log):
        assert time.monotonic() - begin < 60
        time.sleep(0.1)
    assert "SIGKILL" in log.read_text() or "connection to another process" in log.read_text()
