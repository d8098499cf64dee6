"""Signals that ask a command to stop: what is finished stays, one line says so, the exit code is 75.

Ctrl-C counts as such a signal. `distillation.errors.command` turns the first one into :class:`Signalled` wherever the
command is, so work is kept by writing whole files (`wav2vec2.checkpoint.replacing`) or lines of a
`distillation.journal.Journal`. Training, which saves at the end of an update, makes it a :class:`StopRequest`.

Imports nothing that takes time: this is what a script has first.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

# SIGTERM comes with a pre-emption; `sbatch --signal` announces the time limit with any of them. In this order they get
# their handlers: a process that handles the last one handles all (SIGINT has one of Python's own from the start)
STOP_SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
INTERRUPTED = 75  # exit code, EX_TEMPFAIL of sysexits.h: try again
# Ctrl-C reaches all processes of a terminal, and a script passes it on to its stage: the echo is no second request
ECHO_SECONDS = 1.0


class Stopped(Exception):
    """The command was asked to stop, and has kept its work: the message says by what, and what is kept where."""


class Signalled(BaseException):
    """A signal asked the process to stop. No `Exception`: nothing on the way may take it for a failure."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class Raising:
    """Handler that raises `Signalled`; an echo of the signal within a second is ignored."""

    def __init__(self) -> None:
        self.owner, self.since = os.getpid(), -ECHO_SECONDS

    def __call__(self, number: int, frame: FrameType | None) -> None:
        """Raise it in the process that listens."""
        if os.getpid() != self.owner:  # a forked reader: as if nobody had listened
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        now = time.monotonic()
        if now - self.since > ECHO_SECONDS:
            self.since = now
            raise Signalled(number)


@contextlib.contextmanager
def listening(handler: Any) -> Iterator[None]:
    """Handle the stop signals like this, in the main thread; the handlers before come back, after a stop in a while."""
    before: dict[signal.Signals, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in STOP_SIGNALS}
    try:
        yield
    except (Signalled, Stopped):
        # Python takes a moment to end, in which the echo must not change the exit code
        before = {number: _after_echo(old) for number, old in before.items()}
        raise
    finally:
        for number, old in before.items():
            signal.signal(number, old)


class StopRequest:
    """Whether a signal has asked this process to stop; a context manager, within which :meth:`listen` takes effect.

    Ctrl-C counts as such a signal; the second one ends the process as it is.

    Attributes:
        signal: name of the first.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._since = 0.0
        self._listening = contextlib.ExitStack()

    def __enter__(self) -> StopRequest:
        return self

    def listen(self) -> None:
        """From now on signals are noted; before, they end the process."""
        self._listening.enter_context(listening(self._note))

    def __exit__(self, *exc_info: Any) -> None:
        self._listening.__exit__(*exc_info)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._since = signal.Signals(number).name, now
        elif number == signal.SIGINT and now - self._since > ECHO_SECONDS:
            raise Signalled(number)


def _after_echo(handler: Any) -> Any:
    """Ignores a signal for a second; later ones find this handler again."""
    until = time.monotonic() + ECHO_SECONDS

    def handle(number: int, frame: FrameType | None) -> None:
        if time.monotonic() > until:
            signal.signal(number, handler)
            os.kill(os.getpid(), number)

    return handle


@contextlib.contextmanager
def keeping(what: str) -> Iterator[None]:
    """Around work that is kept piece by piece: say so when a signal stops it.

    Args:
        what: is kept, and where, e.g. "the files finished so far are in feats".

    Raises:
        Stopped: a signal came.
    """
    try:
        yield
    except Signalled as stop:
        raise Stopped(f"{stop}: {what}; the same command goes on") from None


def run_child(words: Sequence[str], **options: Any) -> int:
    """Run a process to its end; its exit code. A stop signal goes on to it, which may save before it ends.

    Args:
        words: the command.
        options: of ``subprocess.Popen``.

    Raises:
        Signalled: once the process has ended, if a signal asked this one to stop.
    """
    stop: Signalled | None = None
    with subprocess.Popen(words, **options) as process:
        while True:
            try:
                code = process.wait()
                break
            except Signalled as signalled:
                stop = signalled
                process.send_signal(stop.number)
    if stop is not None:
        raise stop
    return code
