"""Signals to this process: where they arrive, what they end with, and that they reach children once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from distillation import stopping
from distillation.errors import command
from distillation.stopping import STOP_SIGNALS, Raising, Signalled, Stopped, keeping, listening, run_child
from tests.helpers import ROOT
from wav2vec2.checkpoint import replacing


def send(number: int, after: float = 0.0) -> None:
    """To this process."""
    if after:
        threading.Timer(after, os.kill, (os.getpid(), number)).start()
    else:
        os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("kept", [True, False])
def test_a_stopped_command(number, kept, tmp_path, capsys):
    before = [signal.getsignal(each) for each in STOP_SIGNALS]

    @command
    def main() -> None:
        with replacing(tmp_path / "half") as temporary:
            temporary.write_text("half")
            if not kept:
                send(number)
            with keeping("what is finished is in out"):
                send(number)
                time.sleep(5)

    with pytest.raises(SystemExit) as stop:
        main()
    name = signal.Signals(number).name
    words = "what is finished is in out; the same command goes on" if kept else "nothing is half-written; run it again"
    assert (stop.value.code, capsys.readouterr().err) == (75, f"stopped: {name}: {words}\n")
    assert not list(tmp_path.iterdir())
    send(number)  # the echo comes while Python ends
    for each, handler in zip(STOP_SIGNALS, before):
        signal.signal(each, handler)


def test_after_a_stop_the_handlers_come_back_in_a_while(monkeypatch):
    monkeypatch.setattr(stopping, "ECHO_SECONDS", 0.1)
    got = []
    before = {number: signal.signal(number, lambda *args: got.append(args[0])) for number in STOP_SIGNALS}
    try:
        with pytest.raises(Stopped), listening(Raising()):
            raise Stopped("SIGTERM")
        send(signal.SIGTERM)
        assert not got
        time.sleep(0.11)
        send(signal.SIGTERM)
        send(signal.SIGTERM)
        assert got == [signal.SIGTERM] * 2
        with pytest.raises(KeyError), listening(Raising()):
            raise KeyError
        send(signal.SIGUSR1)
        assert got[2:] == [signal.SIGUSR1]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_an_echo_is_no_second_signal(monkeypatch):
    monkeypatch.setattr(stopping, "ECHO_SECONDS", 0.1)
    found = []
    with listening(Raising()):
        for _ in range(2):
            with pytest.raises(Signalled):
                send(signal.SIGINT)
            send(signal.SIGTERM)
            found.append("went on")
            time.sleep(0.11)
    assert found == ["went on"] * 2


CHILD = """
import pathlib, signal, sys, time
got = []
for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
    signal.signal(getattr(signal, name), lambda number, frame: got.append(signal.Signals(number).name))
pathlib.Path(sys.argv[1]).touch()
while not got:
    time.sleep(0.01)
pathlib.Path(sys.argv[2]).write_text(" ".join(got))
sys.exit(3)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_child_gets_the_signal_and_is_waited_for(number, tmp_path):
    begun, saved = tmp_path / "begun", tmp_path / "saved"

    def strike() -> None:
        while not begun.exists():
            time.sleep(0.01)
        send(number)

    threading.Thread(target=strike).start()
    with listening(Raising()), pytest.raises(Signalled, match=signal.Signals(number).name):
        run_child([sys.executable, "-S", "-c", CHILD, str(begun), str(saved)])
    assert saved.read_text() == signal.Signals(number).name


def test_a_child_that_ends_by_itself(tmp_path):
    words = [sys.executable, "-S", "-c", "import sys; print('made'); sys.exit(5)"]
    with (tmp_path / "log").open("w") as log:
        assert run_child(words, stdout=log, stderr=subprocess.STDOUT) == 5
    assert (tmp_path / "log").read_text() == "made\n"


def test_a_forked_process_ends_as_if_nobody_had_listened():
    read, write = os.pipe()
    with listening(Raising()):
        pid = os.fork()
        if pid == 0:
            os.write(write, b"x")  # Python forgets the signals of the moment in which it forks
            time.sleep(20)
            os._exit(0)
        os.read(read, 1)
        os.kill(pid, signal.SIGTERM)
        _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM


def test_threads_leave_the_handlers_alone():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def work() -> None:
        with listening(Raising()):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [before]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_script_that_still_imports_ends_in_one_line(number):
    with subprocess.Popen([sys.executable, "distill.py"], cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        status = Path(f"/proc/{process.pid}/status")
        while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) >> (STOP_SIGNALS[-1] - 1) & 1:
            time.sleep(0.005)
        process.send_signal(number)
        printed = process.communicate(timeout=60)[1]
    assert (process.returncode, printed) == (75, f"stopped: {number.name}: nothing was begun yet; run it again\n")
