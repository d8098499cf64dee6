"""Starts scripts of the repository as processes without paying for their imports: forks from one that has made them.

Reads one JSON request per line: {"start": argv, "log": path, "fault": [what, number]} answers the process id,
{"wait": pid} its exit code, negative for a signal. A fault happens at an exact place inside the script:

    ["kill", "update", n]   SIGKILL in the forward pass of update n (from 0)
    ["kill", "valid", n]    SIGKILL in the validation after n updates
    ["kill", "write", n]    SIGKILL when half of the n-th torch file (from 0) is written
    ["kill", "rename", n]   SIGKILL when the n-th torch file is complete under its temporary name
    ["SIGTERM", "update", n] and so on: that signal instead, and the script goes on
    ["full", "write", n]    no room on the disk for the second half of the n-th torch file
"""

from __future__ import annotations

import errno
import io
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import torch

import lightning
import wav2vec2.checkpoint as checkpoint

torch.set_num_threads(1)


def inject(what: str, where: str, number: int) -> None:
    def strike() -> None:
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


def child(request: dict[str, Any]) -> None:
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = request["start"]
    if request.get("fault"):
        inject(*request["fault"])
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        code = 1
    sys.stdout.flush()
    os._exit(code)


def main() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if "start" in request:
            pid = os.fork()
            if pid == 0:
                child(request)
            print(pid, flush=True)
        else:
            _, status = os.waitpid(request["wait"], 0)
            print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
