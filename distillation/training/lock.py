"""One run per folder: a lock file that names its owner, and that a dead owner does not hold."""

import contextlib
import fcntl
import json
import logging
import os
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distillation.errors import UserError

logger = logging.getLogger(__name__)

NAME = ".lock"
MAX_BYTES = 4096
# The owner touches its lock this often; one on another machine that has not for so long is dead.
TOUCH_SECONDS, STALE_SECONDS = 60.0, 600.0


@contextlib.contextmanager
def run_lock(exp_dir: Path, owner: bool) -> Iterator[None]:
    """Hold the folder of a run; remove what a killed run left half-written in it.

    Args:
        exp_dir: folder, made if need be.
        owner: whether this process holds the lock for all processes of the run, i.e. is rank 0.

    Raises:
        UserError: another run holds it.
        OSError: the folder cannot be written.
    """
    if not owner:
        yield
        return
    exp_dir.mkdir(parents=True, exist_ok=True)
    path = exp_dir / NAME
    content = json.dumps(_identity())
    _take(path, content)
    finished = threading.Event()
    threading.Thread(target=_keep_fresh, args=(path, finished), daemon=True, name="run-lock").start()
    try:
        for leftover in [*exp_dir.glob(".*.tmp"), *exp_dir.glob("ckpts/.*.tmp")]:
            leftover.unlink(missing_ok=True)
        yield
    finally:
        finished.set()
        with contextlib.suppress(OSError):
            if path.read_text(encoding="utf-8") == content:
                path.unlink()


def _take(path: Path, content: str) -> None:
    while True:
        with path.open("a+", encoding="utf-8", errors="replace") as file:
            with contextlib.suppress(OSError):  # file systems without flock: the window is a few microseconds
                fcntl.flock(file, fcntl.LOCK_EX)
            if not _same_file(path, file.fileno()):
                continue  # its owner removed it while we waited
            file.seek(0)
            holder = _parse(file.read(MAX_BYTES))
            if holder is not None:
                if not _is_dead(holder, path):
                    raise UserError(
                        f"{path.parent} is in use by process {holder['pid']} on {holder['host']}: stop that one or use "
                        f"another folder; if it is surely dead, delete {path}"
                    )
                logger.warning(
                    "%s: took over from process %s on %s, which is gone", path, holder["pid"], holder["host"]
                )
            file.truncate(0)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            return


def _identity() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
    }


def _started(pid: int) -> str | None:
    """When a process started, in a form that no other one with its number shares; None if it is dead or unknown."""
    with contextlib.suppress(OSError, IndexError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # fields after the name in parentheses, which may hold blanks: the 3rd of all is the state, the 22nd the start
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else f"{boot}:{fields[19]}"
    return None


def _parse(text: str) -> dict[str, Any] | None:
    """Who holds the lock; None for an empty or broken file, whose writer died in the act."""
    try:
        holder = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not (isinstance(holder, dict) and isinstance(holder.get("pid"), int) and isinstance(holder.get("host"), str)):
        return None
    return holder if holder["pid"] > 0 else None


def _is_dead(holder: dict[str, Any], path: Path) -> bool:
    if holder["host"] == socket.gethostname():
        return not _alive(holder["pid"]) or holder.get("started") != _started(holder["pid"])
    if holder.get("job") is not None and holder["job"] == os.environ.get("SLURM_JOB_ID"):
        return True  # the same job, requeued on another node
    # Ages are compared by the clock of the file system, which all machines share.
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".clock.") as now:
        return os.fstat(now.fileno()).st_mtime - path.stat().st_mtime > STALE_SECONDS


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _same_file(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _keep_fresh(path: Path, finished: threading.Event) -> None:
    while not finished.wait(TOUCH_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)
