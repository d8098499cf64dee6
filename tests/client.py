"""Processes of tests/server.py: from a test, or as a stand-in for ``python`` in a shell script.

python -S tests/client.py SOCKET STAND_IN WORDS...
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
SECONDS = 600  # that a process may take


class Connection:
    """One process of the server."""

    def __init__(self, path: str, files: list[int], **request: object) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(SECONDS)
        self.socket.connect(path)
        socket.send_fds(self.socket, [json.dumps(request).encode() + b"\n"], files)
        self.lines = self.socket.makefile()
        self.pid = int(self.lines.readline())

    def wait(self) -> int:
        """Its exit code, negative for a signal."""
        return int(self.lines.readline())


@dataclass
class Finished:
    """What a process has printed, and its exit code."""

    code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return self.stdout + self.stderr

    @property
    def error(self) -> str:
        """The one line that a script ends with."""
        assert "Traceback" not in self.output, self.output[-4000:]
        lines = [line for line in self.output.replace("\r", "\n").splitlines() if line.strip()]
        assert sum(line.startswith(("error: ", "stopped: ")) for line in lines) == 1, self.output[-4000:]
        return lines[-1]


class Process:
    """A running script."""

    def __init__(self, server: Server, argv: list[str], fault: tuple | None, python: Path) -> None:
        server.count += 1
        self.logs = [server.folder / f"{server.count}.{name}" for name in ("out", "err")]
        with self.logs[0].open("w") as out, self.logs[1].open("w") as err:
            files = [out.fileno(), err.fileno()]
            environ = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
            self.connection = Connection(
                server.socket, files, argv=argv, cwd=str(ROOT), environ=environ, executable=str(python), fault=fault
            )
        self.pid = self.connection.pid

    def kill(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def wait(self) -> Finished:
        self.code = self.connection.wait()
        return self.finished()

    def finished(self) -> Finished:
        """What has been printed up to now."""
        return Finished(self.code, *(log.read_text() for log in self.logs))

    def until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.logs[1].read_text()[-3000:]
            time.sleep(0.02)


class Server:
    """A context manager.

    Attributes:
        bin: folder with a ``python`` for shell scripts that runs scripts and modules through the server; in its
            folder ``cold`` one that leaves prune.py and final_distill.py to the real Python.
    """

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Server:
        self.temporary = tempfile.TemporaryDirectory(prefix="server")  # the path of a socket must be short
        self.folder = Path(self.temporary.name)
        self.socket, self.bin = str(self.folder / "socket"), self.folder / "bin"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.server", self.socket], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self.bin.mkdir()
        self.add_python(self.bin / "python")
        (self.bin / "cold").mkdir()
        self.add_python(self.bin / "cold" / "python", "prune.py | final_distill.py")
        assert self.process.stdout is not None and self.process.stdout.readline() == b"ready\n"
        return self

    def add_python(self, path: Path, cold: str = "''") -> None:
        """Write a stand-in for ``python``; all but ``cold`` goes through the server, and reports measure once."""
        path.write_text(f"""#!/bin/sh
case "$1" in report.py) set -- "$@" --rounds 1 ;; esac
case "$1" in {cold}) ;; *.py | -m) set -- -S "{__file__}" "{self.socket}" "$0" "$@" ;; esac
exec "{sys.executable}" "$@"
""")
        path.chmod(0o755)

    def __exit__(self, *exc_info: object) -> None:
        self.process.communicate()  # closes its stdin
        self.temporary.cleanup()

    def start(self, script: str, *args: object, fault: tuple | None = None, python: Path | None = None) -> Process:
        """Start a script of the repository, or ``-m`` with a module; ``python`` runs the processes that it starts."""
        name = script if script == "-m" else str(ROOT / script)
        return Process(self, [name, *map(str, args)], fault, python or self.bin / "python")

    def run(self, script: str, *args: object, fault: tuple | None = None, code: int = 0) -> Finished:
        """Run it; on another exit code than ``code`` show what it printed."""
        finished = self.start(script, *args, fault=fault).wait()
        assert finished.code == code, f"{script} ended with {finished.code}\n{finished.output[-4000:]}"
        return finished


def main() -> None:
    """Do as if this were the process: signals go on to it, its exit code or fatal signal becomes this one's."""
    path, executable, *argv = sys.argv[1:]
    process = Connection(
        path, [1, 2], argv=argv, cwd=str(Path.cwd()), environ=dict(os.environ), executable=executable, fault=None
    )

    def forward(number: int, frame: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, number)

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, forward)
    code = process.wait()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main()
