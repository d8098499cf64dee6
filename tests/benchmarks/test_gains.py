"""Gains in words over another recipe: intervals of pairs, and the command on a small corpus."""

from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gains
from benchmarks.compare_methods import Result
from benchmarks.gains import Row, measure_gains, table
from benchmarks.minisuperb import evaluate
from distillation.errors import UserError
from wav2vec2.checkpoint import fingerprint, load_checkpoint


def make_row(recipe: str, seeds: dict[int, list[int]], num: int = 100) -> Row:
    """``seeds``: right ones of so many words per test speaker."""
    runs = []
    for seed, right in seeds.items():
        result = Result(recipe, seed, 100, 7, 120.0, [0.1, 0.2 * seed], [0, 1])
        runs.append((result, {"words": {str(i): [n, num] for i, n in enumerate(right)}}))
    return Row(Path("c"), recipe, runs)


def test_a_gain_is_that_of_the_same_speakers_and_seeds():
    """Speakers differ by far more than recipes: the interval of the words is wide, that of the gain is not."""
    plain = make_row("plain", {1: [10, 40, 70, 90], 2: [12, 41, 69, 90]})
    better = make_row("better", {2: [15, 44, 72, 93], 1: [12, 43, 74, 89], 3: [0, 0, 0, 0]})
    better.runs.sort(key=lambda run: run[0].seed)
    (point, low, high), *_ = measure_gains([plain, better], "plain").values()
    # of seeds, whose gains are 2 and 3: 12.7 * 0.71 / sqrt(2); and a little of speakers
    assert point == pytest.approx(2.5) and 5.5 < point - low < 8 and 5.5 < high - point < 8
    third = make_row("third", {1: [12, 42, 72, 92], 2: [14, 43, 71, 92]})
    fourth = make_row("fourth", {1: [12, 42, 72, 92], 2: [14, 43, 71, 92]})
    more = measure_gains([third, plain, better, fourth], "plain")  # rows whose seeds agree tell of the spread too
    assert more["third"][0] == 2.0 and more["better"][0] == point
    assert more["better"][2] - more["better"][1] < 0.3 * (high - low)
    noisy = make_row("noisy", {1: [40, 70, 90, 99], 2: [14, 43, 71, 92], 3: [0, 0, 0, 0]})
    alike = make_row("alike", {1: [12, 42, 72, 92], 2: [14, 43, 71, 92], 3: [2, 2, 2, 2]})
    three = make_row("plain", {1: [10, 40, 70, 90], 2: [12, 41, 69, 90], 3: [0, 0, 0, 0]})
    (_, low, high), _ = measure_gains([alike, three, noisy], "plain").values()
    assert high - low < 0.1, "three seeds tell of their own spread"
    words, lowest, highest = plain.words()
    assert words == pytest.approx(52.75) and highest - lowest > 20
    with pytest.raises(UserError, match="no seed in common"):
        measure_gains([make_row("other", {7: [1, 1, 1, 1]}), plain], "plain")
    one = measure_gains([make_row("one", {1: [12, 41, 73, 92]}), plain], "plain")["one"]
    assert one[0] == 2.0 and 1.0 <= one[1] < one[0] < one[2] <= 3.0  # of speakers alone
    text = table([plain, better], {"better": [3.0, 2.5, 3.5]}, "plain")
    assert "| plain | 100 | 2 | 2.0 | 52.8 [" in text and "|  | 20.0 ± 7.1 | 30.0 ± 14.1 |" in text
    assert "| better | 100 | 3 | 2.0 | " in text and "| +3.0 [+2.5, +3.5] |" in text


def test_intervals_hold_the_truth_as_often_as_they_say(monkeypatch):
    """Two seeds of five rows that are alike, seeds apart by half a point: 95 % of intervals hold 0."""
    monkeypatch.setattr(gains, "DRAWS", 800)
    rng = np.random.default_rng(0)
    inside = []
    for _ in range(60):
        rows = []
        for recipe in "abcdef":
            seeds = {}
            for seed in (1, 2):
                luck = rng.normal(0, 20)
                seeds[seed] = [round(4000 + 200 * i + luck + rng.normal(0, 5)) for i in range(8)]
            rows.append(make_row(recipe, seeds, 8000))
        inside += [low < 0 < high for _, low, high in measure_gains(rows, "a").values()]
    assert 0.88 < np.mean(inside) <= 0.99


@pytest.mark.slow
def test_the_command(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gains, "PROBE_STEPS", 4)
    compare = tmp_path / "compare"
    for recipe, source in (("dphubert", "final.pth"), ("mine", "teacher.pth")):
        for seed in (1, 2):
            final = compare / recipe / f"seed{seed}" / "final" / "final.pth"
            final.parent.mkdir(parents=True)
            shutil.copy(small / source, final)
            content = fingerprint(load_checkpoint(final).model)
            kept = {"model": content, "result": asdict(Result(recipe, seed, 100, 7, 60.0, [0.1, 0.3], [0, 1]))}
            final.with_suffix(".distance.json").write_text(json.dumps(kept))
    gains.run([compare], small, tmp_path / "out", threads=1)
    printed = capsys.readouterr().out
    assert "more than dphubert" in printed and "| mine | 100 | 2 | 1.0 | " in printed
    rows = json.loads((tmp_path / "out" / "gains.json").read_text())
    assert [row["recipe"] for row in rows] == ["dphubert", "mine"] and len(rows[1]["runs"]) == 2
    assert rows[0]["gain"] is None and len(rows[1]["gain"]) == 3
    xml.etree.ElementTree.fromstring((tmp_path / "out" / "gains.svg").read_text())
    # the words that are known are not asked again where the other tasks are
    asked = []

    def probe(features: object, data: object, steps: int, tasks: list[str]) -> evaluate.Counts:
        asked.append(tasks)
        return {task: {} for task in tasks}

    monkeypatch.setattr(evaluate, "evaluate", probe)
    data = evaluate.start(small, None)[1]
    _, counts = evaluate.measured(final, data, 4)
    assert asked == [["phones", "keywords", "ABX", "speakers"]] and counts["words"]
    with pytest.raises(UserError, match="no finished run of hubert; there are dphubert, mine"):
        gains.run([compare], small, against="hubert")
    with pytest.raises(UserError, match="--compare is empty"):
        gains.run([], small)
    final.with_suffix(".distance.json").unlink()
    with pytest.raises(
        UserError, match=r"nothing is kept of its distance to the teacher; run benchmarks\.compare_methods first"
    ):
        gains.run([compare], small, threads=1)
