"""One run per folder: who holds a lock, and who no longer does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distillation.errors import UserError
from distillation.training import lock as lock_module
from distillation.training.lock import run_lock


def held_by(folder: Path, age: float = 0, **changes: object) -> Path:
    """The lock of another owner: by default one that lives, this process."""
    lock = folder / ".lock"
    lock.write_text(json.dumps({**lock_module._identity(), **changes}))
    os.utime(lock, (time.time() - age, time.time() - age))
    return lock


@pytest.mark.parametrize(
    ("owner", "age"),
    [
        ({"host": "elsewhere"}, 30),
        ({}, 5000),  # on this machine a living process counts, not the age
    ],
)
def test_living_owner_keeps_the_lock(tmp_path, owner, age):
    lock = held_by(tmp_path, age, **owner)
    before = lock.read_text()
    with pytest.raises(UserError, match=f"in use by process {os.getpid()}"), run_lock(tmp_path, owner=True):
        pass
    assert lock.read_text() == before


@pytest.mark.parametrize(
    ("owner", "age"),
    [
        ({"pid": 2**22 + 1}, 0),  # no such process
        ({"started": "another boot:17"}, 0),  # its number was given to another process
        ({"host": "elsewhere"}, 700),  # touched every minute while its owner lives
        ({"host": "elsewhere", "job": "4711"}, 0),  # the same job, requeued elsewhere
        ({"pid": -1}, 0),
        ({"pid": "1"}, 0),
    ],
)
def test_dead_owner_does_not_keep_the_lock(tmp_path, monkeypatch, owner, age):
    monkeypatch.setenv("SLURM_JOB_ID", "4711" if "job" in owner else "12")
    lock = held_by(tmp_path, age, **owner)
    (tmp_path / "ckpts").mkdir()
    (tmp_path / "ckpts/.last.ckpt.77.tmp").write_text("half")
    with run_lock(tmp_path, owner=True):
        assert json.loads(lock.read_text())["pid"] == os.getpid()
        with pytest.raises(UserError), run_lock(tmp_path, owner=True):
            pass
    assert not lock.exists() and not list((tmp_path / "ckpts").iterdir())


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff" * 9000, b"[" * 4096])
def test_broken_lock(tmp_path, content):
    (tmp_path / ".lock").write_bytes(content)
    with run_lock(tmp_path, owner=True):
        pass
    assert not (tmp_path / ".lock").exists()


def zombie() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    while Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    return process.pid


def test_dead_process_that_nobody_has_buried(tmp_path):
    started = lock_module._started(os.getpid())
    held_by(tmp_path, pid=zombie(), started=started)
    with run_lock(tmp_path, owner=True):
        pass


def test_other_ranks_leave_the_folder_to_the_owner(tmp_path):
    with run_lock(tmp_path / "run", owner=False):
        assert not (tmp_path / "run").exists()
    with run_lock(tmp_path / "run", owner=True), run_lock(tmp_path / "run", owner=False):
        assert (tmp_path / "run/.lock").exists()


def test_the_owner_shows_that_it_lives(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "TOUCH_SECONDS", 0.01)
    with run_lock(tmp_path, owner=True):
        os.utime(tmp_path / ".lock", (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / ".lock").stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_a_lock_that_another_run_took_over_is_left_to_it(tmp_path):
    with run_lock(tmp_path, owner=True):
        held_by(tmp_path, pid=1)
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == 1


def test_it_is_given_back_after_an_error(tmp_path):
    with pytest.raises(KeyError), run_lock(tmp_path, owner=True):
        raise KeyError
    assert not (tmp_path / ".lock").exists()
