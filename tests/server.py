"""Starts scripts of the repository as processes without paying for their imports: forks from one that has made them.

    python -m tests.server SOCKET

Every connection is one process: a line of JSON goes there, with the files for stdout and stderr passed along; its
process id and, when it has ended, its exit code, negative for a signal, come back as lines. A process whose connection
closes is killed: the client stands for it. The server ends when its stdin is closed. A request holds

    argv: a script or "-m" and a module, and arguments
    cwd, environ, executable: as the process shall see them; the last is what it starts other Pythons with
    fault: null, or something that happens at an exact place inside the script:

    ["kill", "update", n]   SIGKILL in the forward pass of update n (from 0)
    ["kill", "valid", n]    SIGKILL in the validation after n updates
    ["kill", "write", n]    SIGKILL when half of the n-th torch file (from 0) is written
    ["kill", "rename", n]   SIGKILL when the n-th torch file is complete under its temporary name
    ["SIGTERM", "update", n] and so on: that signal instead, and the script goes on
    ["full", "write", n]    no room on the disk for the second half of the n-th torch file
    ["bug", "update", n]    somebody's mistake in the forward pass of update n
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

import lightning
import wav2vec2.checkpoint as checkpoint

LATER = ("prepare_data", "prune", "report", "finetune_ctc", "transformers.models.hubert.modeling_hubert",
         "torch.utils.tensorboard", "torch.distributed.nn")  # fmt: skip
"""What scripts import besides Lightning, some of it in their functions."""


def inject(what: str, where: str, number: int) -> None:
    def strike() -> None:
        if what == "bug":
            raise AttributeError("'NewObjective' object has no attribute 'heds'")
        if what == "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.kill(os.getpid(), getattr(signal, "SIGKILL" if what == "kill" else what))

    module: Any = lightning.DistillModule
    if where in ("update", "valid"):
        step = "training_step" if where == "update" else "validation_step"
        original = getattr(module, step)
        struck = []

        def replacement(self: Any, *args: Any) -> Any:
            if self.global_step == number and not struck:
                struck.append(True)
                strike()
            return original(self, *args)

        setattr(module, step, replacement)
        return

    save, fsync, written = torch.save, os.fsync, []

    def half(content: Any, file: Any) -> None:
        written.append(True)
        if where == "write" and len(written) == number + 1:
            buffer = io.BytesIO()
            save(content, buffer)
            file.write(buffer.getvalue()[: buffer.tell() // 2])
            file.flush()
            strike()
            file.write(buffer.getvalue()[buffer.tell() // 2 :])
        else:
            save(content, file)

    def sync(descriptor: int) -> None:
        fsync(descriptor)
        name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if where == "rename" and len(written) == number + 1 and ("ckpt" in name or ".pth" in name):
            strike()

    checkpoint.torch.save, checkpoint.os.fsync = half, sync  # type: ignore[assignment]


def child(request: dict[str, Any], files: list[int]) -> None:
    """Become the process that was asked for."""
    for descriptor, file in enumerate([os.open(os.devnull, os.O_RDONLY), *files]):
        os.dup2(file, descriptor)
    os.environ.clear()
    os.environ.update(request["environ"])
    os.chdir(request["cwd"])
    sys.executable = request["executable"]
    if request["fault"]:
        inject(*request["fault"])
    code = 0
    try:
        if request["argv"][0] == "-m":
            sys.argv = request["argv"][1:]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = request["argv"]
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else bool(stop.code)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    sys.stdout.flush()
    os._exit(code)


def handle(connection: socket.socket) -> None:
    """Start a process, wait for it; kill it when whoever asked for it is gone."""
    data, files, *_ = socket.recv_fds(connection, 2**20, 2)
    while not data.endswith(b"\n"):
        data += connection.recv(2**20)
    pid = os.fork()
    if pid == 0:
        child(json.loads(data), files)
    with contextlib.suppress(ConnectionError):
        connection.sendall(b"%d\n" % pid)
    ended = os.pidfd_open(pid)
    ready, _, _ = select.select([ended, connection], [], [])
    if ended not in ready:
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(ConnectionError):
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def main() -> None:
    torch.set_num_threads(1)
    for name in LATER:
        importlib.import_module(name)
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "threads do not survive a fork"
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="runpy")  # -m of what is imported already
    gc.collect()
    gc.freeze()  # what is imported stays, and stays shared between the forks
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(sys.argv[1])
    listener.listen()
    print("ready", flush=True)
    while True:
        ready, _, _ = select.select([listener, sys.stdin], [], [])
        if sys.stdin in ready:
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            handle(connection)
            os._exit(0)
        connection.close()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


if __name__ == "__main__":
    main()
