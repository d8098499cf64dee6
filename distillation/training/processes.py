"""The processes of a run: signals that ask them to stop, decisions that all ranks share, ends that nobody waits for."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from types import FrameType, TracebackType
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import LightningEnvironment

from distillation.errors import FAILED, MISTAKE, PeerLost
from distillation.stopping import INTERRUPTED, STOP_SIGNALS, Stopped, listening

POLL_SECONDS = 0.5
# for the other ranks to end by themselves when all of them have the same reason to
GRACE_SECONDS = 5.0
# a reader outlives a SIGTERM to the whole job for as long as the longest update and checkpoint may take
READER_SECONDS = 600


@contextlib.contextmanager
def waiting(trainer: pl.Trainer) -> Iterator[None]:
    """Outside training, several processes wait for each other where no handler runs: a thread ends them on a signal."""
    if trainer.world_size == 1 or threading.current_thread() is not threading.main_thread():
        yield
        return
    launched = "LOCAL_RANK" in os.environ  # by the process that tells; Lightning gives itself one, too
    receiver, sender = os.pipe()
    os.set_blocking(sender, False)

    def handler(number: int, frame: FrameType | None) -> None:
        """The thread does it all."""

    def watch() -> None:
        while numbers := os.read(receiver, 1):
            if signal.getsignal(numbers[0]) is handler:  # else training has begun to listen
                if not launched:
                    name = signal.Signals(numbers[0]).name
                    print(f"\nstopped: {name}: all that was saved stays; run it again", file=sys.stderr, flush=True)
                _end_now(trainer, INTERRUPTED)
        os.close(receiver)

    threading.Thread(target=watch, daemon=True, name="early-stop").start()
    with listening(handler):
        signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(-1)
            os.close(sender)


def outlive_stop_signal(worker_id: int) -> None:
    """For a process that reads audio: a stop signal is for its parent, which still needs it until it has saved.

    When the parent is killed, the thread that hands batches over loses its connection: the run's one line says why.
    """
    sys.excepthook = _ignore_lost_parent
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    for number in STOP_SIGNALS:
        signal.signal(number, lambda number, frame: signal.alarm(READER_SECONDS))


def _ignore_lost_parent(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if not issubclass(kind, ConnectionError | EOFError):
        sys.__excepthook__(kind, error, trace)


class Agreement:
    """Turns what one rank wants into what all ranks do, at the same update, and never waits for the device.

    What the ranks want at one update boundary travels between their CPUs during the next update and is read at its
    end. Alone, a process hears itself at once.

    Args:
        world_size: processes of the run; all must make one at the same place.
    """

    def __init__(self, world_size: int) -> None:
        self.group = dist.new_group(backend="gloo", timeout=timedelta(hours=2)) if world_size > 1 else None
        self._pending: tuple[torch.Tensor, dist.Work] | None = None

    def __call__(self, wishes: list[bool], wait: bool = False) -> list[bool]:
        """Which wishes any rank had at the last boundary; with ``wait`` also at this one."""
        if self.group is None:
            return wishes
        agreed = self._receive(len(wishes))
        tensor = torch.tensor(wishes, dtype=torch.int32)
        work = dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group, async_op=True)
        assert work is not None
        self._pending = tensor, work
        if wait:
            agreed = [a or b for a, b in zip(agreed, self._receive(len(wishes)))]
        return agreed

    def forget(self) -> None:
        """Drop what is under way, since it has just been done."""
        self._receive(0)

    def _receive(self, count: int) -> list[bool]:
        if self._pending is None:
            return [False] * count
        tensor, work = self._pending
        self._pending = None
        work.wait()
        return [bool(value) for value in tensor.tolist()]


def shared(trainer: pl.Trainer, error: Exception) -> BaseException:
    """What to raise here when all ranks end at the same place for the same reason: rank 0 alone tells it."""
    if trainer.is_global_zero:
        return error
    if isinstance(getattr(trainer.strategy, "cluster_environment", None), LightningEnvironment):
        return SystemExit(0)  # rank 0 is its launcher, and would take another code for an accident
    return SystemExit(INTERRUPTED if isinstance(error, Stopped) else MISTAKE)


@contextlib.contextmanager
def supervised(trainer: pl.Trainer) -> Iterator[None]:
    """While training: no process of the run outlives another one that died, whatever it waits for.

    Raises:
        PeerLost: the connection to another process broke.
    """
    with _Watchdog(trainer) as watchdog:
        try:
            yield
        except BaseException as error:
            if lost := _lost_connection(error):
                time.sleep(3 * POLL_SECONDS)  # the watchdog may know which process died, and ends this one
            watchdog.end_launched()
            if lost:
                raise PeerLost(
                    "the connection to another process of the run broke, its own error tells why; "
                    "the same command resumes"
                ) from None
            raise
        finally:
            _end_readers()


def _lost_connection(error: BaseException) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return (
        isinstance(error, RuntimeError)
        and dist.is_initialized()
        and any(text in str(error).lower() for text in ("closed by peer", "reset by peer", "broken pipe"))
    )


def _end_readers() -> None:
    if readers := multiprocessing.active_children():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the loader's handler would raise
        for reader in readers:  # they ignore the polite request that they get at exit
            reader.kill()


def _launched(trainer: pl.Trainer) -> list[Any]:
    return getattr(trainer.strategy.launcher, "procs", [])


def _end_now(trainer: pl.Trainer, code: int) -> NoReturn:
    for process in [*_launched(trainer), *multiprocessing.active_children()]:
        process.kill()
    os._exit(code)


def _ended(code: int) -> str:
    if code == INTERRUPTED:
        return "was asked to stop"
    if code == -signal.SIGKILL:
        return "was killed (by the system, for want of memory?)"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"ended with code {code}, its own error tells why"


class _Watchdog:
    """Rank 0 of a machine watches the processes it launched, they watch it."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self.trainer = trainer
        self.finished = threading.Event()
        self.parent = os.getppid() if "LOCAL_RANK" in os.environ else None

    def __enter__(self) -> _Watchdog:
        threading.Thread(target=self._watch, daemon=True, name="watchdog").start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.finished.set()

    def end_launched(self) -> None:
        """When this process ends before its time: give those it launched a moment to do the same, then end them."""
        self.finished.set()
        deadline = time.monotonic() + GRACE_SECONDS
        for process in _launched(self.trainer):
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            process.kill()

    def _watch(self) -> None:
        while not self.finished.wait(POLL_SECONDS):
            if self.parent is not None and os.getppid() != self.parent:
                self._end(FAILED, "the process that started this one is gone")
            for rank, process in enumerate(_launched(self.trainer), start=1):
                code = process.poll()
                if code:
                    self._end(
                        code if code in (MISTAKE, INTERRUPTED) else FAILED,
                        f"process {rank} of the run {_ended(code)}; the same command resumes",
                    )

    def _end(self, code: int, message: str) -> None:
        """End this process from a thread while its main thread waits for somebody who will never answer."""
        if self.finished.wait(POLL_SECONDS):
            return
        kind = "stopped" if code == INTERRUPTED else "error"
        print(f"\n{kind}: {message}", file=sys.stderr, flush=True)  # below the progress bar
        _end_now(self.trainer, code)
