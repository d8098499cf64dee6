"""Turns and phases, with a clock that is made up or real."""

from __future__ import annotations

import time

import pytest

from evaluation import timing


def test_steps_run_in_turns_and_the_median_counts(monkeypatch):
    log: list[str] = []
    clock = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    seconds = {"a": iter([100, 1, 2, 50]), "b": iter([100, 4, 4, 4])}  # the first run is the warm-up

    def step(name: str) -> None:
        log.append(name)
        clock[0] += next(seconds[name])

    found = timing.in_turns({name: lambda name=name: step(name) for name in seconds}, 3, "test")
    assert found == {"a": 2, "b": 4}
    rounds = ["".join(log[i : i + 2]) for i in range(0, 8, 2)]
    assert len(log) == 8 and set(rounds) == {"ab", "ba"}


def test_phases_add_up():
    watch = timing.Stopwatch()
    begin = time.perf_counter()
    with watch("outer"):
        time.sleep(0.02)
        with watch("inner"):
            time.sleep(0.05)
        with watch("inner"):
            time.sleep(0.05)
    assert sum(watch.seconds.values()) == pytest.approx(time.perf_counter() - begin, abs=0.005)
    assert watch.seconds["inner"] >= 0.1 and watch.seconds["outer"] >= 0.02
