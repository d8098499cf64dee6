"""What a user reads, and the exit code, for everything that is no bug."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest
import torch

from distillation.errors import PeerLost, UserError, command
from distillation.stopping import Signalled, Stopped
from tests.helpers import ROOT
from wav2vec2 import CheckpointError


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("a\n  b"), 2, "error: a b"),
        (CheckpointError("x.pth: damaged"), 2, "error: x.pth: damaged"),
        (Stopped("SIGTERM at update 3"), 75, "stopped: SIGTERM at update 3"),
        (PeerLost("another process"), 1, "error: another process"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "e/last.ckpt"), 2,
         "error: e/last.ckpt: No space left on device; make room and run again (what was complete before is intact)"),
        (PermissionError(errno.EACCES, "Permission denied", "e"), 2, "error: e: Permission denied; choose a folder"),
        (OSError(errno.ESTALE, "Stale file handle"), 2, "error: Stale file handle; is the network mount there?"),
        (OSError("no such model on the hub"), 2, "error: no such model on the hub"),
        (torch.OutOfMemoryError("CUDA out of memory.\nmore"), 2, "error: out of GPU memory: CUDA out of memory."),
        (RuntimeError("GET was unable to find an engine to execute this computation"), 2, "error: out of GPU"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), 2, "error: out of GPU"),
        (MemoryError(), 2, "error: out of memory: lower --data.seconds_per_batch"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), 2, "error: out of memory"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "), 2,
         "error: DataLoader worker (pid 7) is killed by signal: Killed: out of memory, or of shared memory?"),
        (RuntimeError("DataLoader timed out after 900 seconds"), 2, "error: DataLoader timed out after 900 seconds"),
        (UserError("Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
                   "  File x\ndistillation.errors.UserError: a.flac: truncated\n"), 2, "error: a.flac: truncated"),
        (Signalled(signal.SIGUSR1), 75, "stopped: SIGUSR1: nothing is half-written; run it again"),
        (KeyboardInterrupt(), 75, "stopped: SIGINT: nothing is half-written; run it again"),
    ],
)  # fmt: skip
def test_one_line_and_exit_code(error, code, line, capsys):
    @command
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == code
    printed = capsys.readouterr().err
    assert printed.startswith(line) and printed.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyError("x"), AssertionError()])
def test_a_bug_keeps_its_traceback(error):
    @command
    def main() -> None:
        raise error

    with pytest.raises(type(error)):
        main()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "code", "line"),
    [("UserError('bad.tsv: no')", 2, "error: bad.tsv: no"), ("KeyError('x')", 1, "KeyError: 'x'")],
)
def test_nobody_waits_in_nccl_for_a_process_that_failed(error, code, line):
    """At exit the group would be taken down, which waits for the others, which wait for this process."""
    program = (
        "import atexit, time, torch.distributed as dist\n"
        "from distillation.errors import UserError, command\n"
        "dist.is_initialized, dist.get_backend = lambda: True, lambda: 'nccl'\n"
        "atexit.register(time.sleep, 60)\n"
        f"@command\ndef main():\n    raise {error}\nmain()\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, cwd=ROOT)
    assert result.returncode == code and result.stderr.splitlines()[-1] == line
