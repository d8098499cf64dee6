"""Signals that ask a process to stop, decisions that all ranks share, and what is said of one that died."""

from __future__ import annotations

import os
import signal
import sys
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from pytorch_lightning.plugins.environments import LightningEnvironment, TorchElasticEnvironment

from distillation.errors import MISTAKE, PeerLost, UserError
from distillation.stopping import INTERRUPTED, STOP_SIGNALS, Signalled, Stopped, StopRequest
from distillation.training import processes
from distillation.training.processes import Agreement, shared, supervised


def handlers() -> list:
    return [signal.getsignal(number) for number in STOP_SIGNALS]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_the_handlers_come_back(number):
    before = handlers()
    with StopRequest() as stop:
        assert handlers() == before, "nobody listens yet"
        stop.listen()
        assert stop.signal is None
        os.kill(os.getpid(), number)
        assert stop.signal == number.name
    assert handlers() == before


def test_the_second_ctrl_c_ends_the_process(monkeypatch):
    now, before = 100.0, handlers()
    monkeypatch.setattr("time.monotonic", lambda: now)
    with StopRequest() as stop:
        stop.listen()
        os.kill(os.getpid(), signal.SIGINT)
        now += 0.5
        os.kill(os.getpid(), signal.SIGINT)  # the echo: from the terminal and from a script
        now += 1
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == "SIGINT", "what the user sent first"
        with pytest.raises(Signalled, match="SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)
    assert handlers() == before


def test_a_thread_does_not_listen():
    before = handlers()
    with StopRequest() as stop, ThreadPoolExecutor(1) as pool:
        pool.submit(stop.listen).result()
        assert handlers() == before


def test_alone_a_process_hears_itself_at_once():
    agree = Agreement(world_size=1)
    assert agree([True, False]) == [True, False] and agree([False, True], wait=True) == [False, True]
    agree.forget()
    assert agree([False]) == [False]


def trainer(rank: int, environment: object = None) -> types.SimpleNamespace:
    """As much of one as is asked for."""
    strategy = types.SimpleNamespace(launcher=None, cluster_environment=environment)
    return types.SimpleNamespace(is_global_zero=rank == 0, strategy=strategy)


def test_rank_0_alone_tells_what_all_ranks_met():
    error, stopped = UserError("x"), Stopped("y")
    assert shared(trainer(0, LightningEnvironment()), error) is error
    assert shared(trainer(1, LightningEnvironment()), error).code == 0, "its launcher is rank 0"
    for environment in (None, TorchElasticEnvironment()):
        assert shared(trainer(1, environment), error).code == MISTAKE
        assert shared(trainer(1, environment), stopped).code == INTERRUPTED


def test_what_is_said_of_a_process_that_died():
    assert "was killed (by the system, for want of memory?)" in processes._ended(-signal.SIGKILL)
    assert "was killed by SIGTERM" in processes._ended(-signal.SIGTERM)
    assert "ended with code 3, its own error tells why" in processes._ended(3)
    assert "was asked to stop" in processes._ended(INTERRUPTED)


def test_an_error_goes_through_and_a_lost_connection_says_so(monkeypatch):
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.01)
    with pytest.raises(KeyError), supervised(trainer(0)):
        raise KeyError
    with pytest.raises(RuntimeError, match="Connection reset by peer"), supervised(trainer(0)):
        raise RuntimeError("Connection reset by peer")  # not in a run of several processes
    with pytest.raises(PeerLost, match="the same command resumes"), supervised(trainer(0)):
        raise dist.DistNetworkError("Connection closed by peer")


@pytest.fixture
def usual_signals():
    """Handlers and the hook for errors as they were before."""
    numbers = (*STOP_SIGNALS, signal.SIGALRM)
    before, hook = [signal.getsignal(number) for number in numbers], sys.excepthook
    yield
    sys.excepthook = hook
    for number, handler in zip(numbers, before):
        signal.signal(number, handler)


def test_a_reader_outlives_the_stop_signal_by_as_long_as_saving_takes(usual_signals):
    processes.outlive_stop_signal(0)
    for number in STOP_SIGNALS:
        os.kill(os.getpid(), number)
        left = signal.alarm(0)
        assert processes.READER_SECONDS - 5 < left <= processes.READER_SECONDS


def test_a_reader_whose_parent_is_gone_prints_no_traceback(capsys, usual_signals):
    """As the thread that hands its batches over does, when the rank it reads for is killed."""
    processes.outlive_stop_signal(0)
    for error in (ConnectionResetError(104, "Connection reset by peer"), EOFError()):
        sys.excepthook(type(error), error, None)
    assert capsys.readouterr().err == ""
    sys.excepthook(RuntimeError, RuntimeError("a bug"), None)
    assert "a bug" in capsys.readouterr().err
