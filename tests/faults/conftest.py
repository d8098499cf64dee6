"""Scripts as processes that are killed, starved or lied to, at an exact moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Process:
    """A running script."""

    def __init__(self, server: Server, pid: int, log: Path) -> None:
        self.server, self.pid, self.log = server, pid, log

    def kill(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Finished:
        self.code = self.server.ask({"wait": self.pid})
        return self.finished()

    def finished(self) -> Finished:
        """What has been printed up to now."""
        return Finished(self.code, self.log.read_text())

    def until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.02)


@dataclass
class Finished:
    code: int
    output: str

    @property
    def error(self) -> str:
        """The one line that a script ends with."""
        assert "Traceback" not in self.output, self.output[-4000:]
        lines = [line for line in self.output.replace("\r", "\n").splitlines() if line.strip()]
        assert sum(line.startswith(("error: ", "stopped: ")) for line in lines) == 1, self.output[-4000:]
        return lines[-1]


class Server:
    def __init__(self, folder: Path) -> None:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.folder, self.count = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "server.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment,
        )  # fmt: skip

    def ask(self, request: dict) -> int:
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, script: str, *args: object, fault: tuple | None = None) -> Process:
        self.count += 1
        log = self.folder / f"{self.count}.log"
        argv = [str(ROOT / script), *map(str, args)]
        return Process(self, self.ask({"start": argv, "log": str(log), "fault": fault}), log)

    def run(self, script: str, *args: object, fault: tuple | None = None, code: int = 0) -> Finished:
        finished = self.start(script, *args, fault=fault).wait()
        assert finished.code == code, f"{script} ended with {finished.code}\n{finished.output[-4000:]}"
        return finished


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("logs"))
    yield server
    server.process.kill()
    server.process.wait()


@pytest.fixture(scope="session")
def reference(server: Server, tiny_flags: list[object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both steps, never interrupted: E, E/pruned.pth and E/final."""
    exp = tmp_path_factory.mktemp("reference") / "run"
    server.run("distill.py", *tiny_flags, "--exp_dir", exp)
    server.run("prune.py", "--distilled_ckpt", exp / "ckpts/last.ckpt")
    server.run("final_distill.py", *tiny_flags, "--student_ckpt", exp / "pruned.pth", "--exp_dir", exp / "final")
    return exp
