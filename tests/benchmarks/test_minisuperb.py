"""mini-SUPERB: probes, ABX, intervals, and a whole run on a small corpus."""

from __future__ import annotations

import json
import math
import shutil
import signal
import xml.etree.ElementTree

import numpy as np
import pytest
import torch

from benchmarks.minisuperb import evaluate
from benchmarks.minisuperb.abx import SHORTEST, abx_right, draw_triples, warped_distance
from benchmarks.minisuperb.evaluate import Row, rates, scores, table
from demo.corpus import CorpusSettings, training_sentences
from demo.frame_probe import accuracy, linear_probe
from demo.labels import IGNORE, read_split
from distillation.errors import UserError
from distillation.stopping import Signalled, Stopped

# Probes


def test_weighted_probe_finds_the_layer_that_knows():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(3000) % 4
    layers = torch.randn(3000, 5, 8, generator=generator)
    layers[:, 3, :4] += 2 * torch.eye(4)[labels]
    found = linear_probe(layers[:2000], labels[:2000], layers[2000:], 4, steps=200)
    alone = linear_probe(layers[:2000, 3], labels[:2000], layers[2000:, 3], 4, steps=200)
    assert accuracy(alone, labels[2000:]) > 80
    assert accuracy(found, labels[2000:]) > accuracy(alone, labels[2000:]) - 8


def test_strength_is_chosen_by_the_examples_that_are_not_fitted():
    """Labels that choose disagree with those that fit: the strongest regularisation is the least wrong."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 6, generator=generator)
    labels = (x[:, 0] > 0).long()
    choose = torch.arange(2000) % 4 == 0
    flipped = torch.where(choose, 1 - labels, labels)
    strengths = (1e-4, 200.0)  # the second forgets within an update: class 0 or 1 for all
    plain = linear_probe(x, labels, x, 2, steps=100, strengths=strengths, choose=choose)
    assert accuracy(plain, labels) > 95
    other = linear_probe(x, flipped, x, 2, steps=100, strengths=strengths, choose=choose)
    assert accuracy(other, labels) < 95


# ABX


def plain_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Dynamic time warping, cell by cell."""
    x, y = (side / np.linalg.norm(side, axis=1, keepdims=True) for side in (x, y))
    angle = np.arccos(np.clip(x @ y.T, -1, 1)) / math.pi
    total, steps = np.full(angle.shape, np.inf), np.ones(angle.shape)
    for i in range(len(x)):
        for j in range(len(y)):
            before = [(a, b) for a, b in ((i - 1, j), (i - 1, j - 1), (i, j - 1)) if a >= 0 and b >= 0]
            if before:
                best = min(before, key=lambda cell: total[cell])
                total[i, j], steps[i, j] = total[best] + angle[i, j], steps[best] + 1
            else:
                total[i, j] = angle[i, j]
    return total[-1, -1] / steps[-1, -1]


def test_warped_distance():
    generator = torch.Generator().manual_seed(0)
    x, y = ([torch.randn(n, 4, generator=generator) for n in sizes] for sizes in ((3, 7, 1, 5), (6, 2, 4, 5)))
    expected = [plain_distance(a.numpy(), b.numpy()) for a, b in zip(x, y)]
    np.testing.assert_allclose(warped_distance(x, y), expected, atol=1e-5)
    slower = [a.repeat_interleave(3, dim=0) for a in x]
    assert warped_distance(x, slower).max() < 1e-3  # said more slowly, it is the same word


@pytest.mark.slow
def test_abx_of_words(spoken):
    utterances = read_split(spoken[0], "train-clean-100")
    triples, speakers = draw_triples(utterances, 60)
    names = sorted({word for u in utterances for *_, word in u.words})
    perfect, blind = [], []
    for u in utterances:
        frames = torch.zeros(u.num_frames, len(names))
        middle = (torch.arange(u.num_frames) * 320 + 200) / 16000
        for start, end, word in u.words:
            frames[(start <= middle) & (middle < end), names.index(word)] = 1
        perfect.append(frames)
        blind.append(torch.tensor([1.0, 0, 0]).expand(u.num_frames, 3))
    assert len(triples) == len(speakers) == 60
    for (a, b, x), speaker in zip(triples, speakers):
        assert utterances[a.utterance].speaker == utterances[b.utterance].speaker != speaker
        assert utterances[x.utterance].speaker == speaker and min(t.last - t.first for t in (a, b, x)) >= SHORTEST
    assert abx_right(perfect, triples).mean() > 0.95
    assert abx_right(blind, triples).mean() == 0.5


@pytest.mark.slow
def test_sentences_of_training_are_known_without_making_a_corpus(spoken):
    assert set(training_sentences(spoken[1])) == {u.text for u in read_split(spoken[0], "train-clean-100")}
    assert not set(training_sentences(spoken[1])) & {u.text for u in read_split(spoken[0], "dev-clean")}


# Scores


def test_intervals():
    def counts(*right: int) -> dict:
        return {task: {str(i): [n, 10] for i, n in enumerate(right)} for task in evaluate.TASKS}

    teacher = Row("teacher", 9, [counts(9, 8, 7, 8)])
    row = Row("small", 4, [counts(6, 5, 4, 5), counts(6, 5, 6, 5)])
    assert rates(row.runs, "words", None, 1) == pytest.approx([100 * 42 / 80])
    found = scores(row, teacher)
    assert found["words"][0] == pytest.approx(52.5) and found["ABX"][0] == pytest.approx(47.5)
    assert found["speakers"][0] == pytest.approx(100 * 52.5 / 80)
    for point, low, high in found.values():
        assert low < point < high
    assert scores(teacher, teacher)["speakers"] == [100.0, 100.0, 100.0]  # the same speakers are drawn for both
    text = table([teacher, row], teacher)
    assert "| small | 4 | 52.5 [" in text and text.count("\n") == 3


# As a whole


@pytest.mark.slow
def test_a_run(small, tmp_path, capsys, monkeypatch):
    run = tmp_path / "compare" / "slice" / "seed1"
    run.mkdir(parents=True)
    shutil.copy(small / "final.pth", run)
    measure, measured = evaluate.evaluate, []

    def stop_at_fourth(*args):
        measured.append(True)
        if len(measured) == 4:  # the second of the controls
            raise Signalled(signal.SIGTERM)
        return measure(*args)

    monkeypatch.setattr(evaluate, "evaluate", stop_at_fourth)
    with pytest.raises(Stopped, match=r"SIGTERM: what was measured of a model .* in .*/controls\.jsonl; the same"):
        evaluate.run(small, [tmp_path / "compare"], None, tmp_path / "out", steps=4, threads=1)
    evaluate.run(small, [tmp_path / "compare"], None, tmp_path / "out", steps=4, threads=1)
    assert len(measured) == 4 + 2
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "minisuperb.json").read_text())
    assert [row["name"] for row in rows] == [
        "teacher", "slice", "filter banks, 11 frames", "random weights", "teacher's layer 0"
    ]  # fmt: skip
    for row in rows:
        assert f"| {row['name']} |" in printed
        for score, low, high in row["scores"].values():
            assert low <= score <= high and score >= 0
    xml.etree.ElementTree.fromstring((tmp_path / "out" / "minisuperb.svg").read_text())
    kept = json.loads((run / "final.minisuperb.json").read_text())
    assert {task: len(v) for task, v in kept["counts"].items()} == {
        "words": 2, "phones": 2, "keywords": 2, "ABX": 2, "speakers": 5
    }  # fmt: skip
    # what is kept counts as long as it is of the same settings
    kept["counts"]["words"] = {speaker: [0.0, 1.0] for speaker in kept["counts"]["words"]}
    (run / "final.minisuperb.json").write_text(json.dumps(kept))
    for steps, words_known in ((4, True), (5, False)):
        data = evaluate.load_data(tmp_path / "out" / "corpus", CorpusSettings())
        _, counts = evaluate.measured(run / "final.pth", data, steps)
        assert (counts == kept["counts"]) is words_known
    with pytest.raises(UserError, match=r"no finished run of benchmarks\.compare_methods"):
        evaluate.run(small, [tmp_path], None, tmp_path / "out")
    with pytest.raises(UserError, match=r"run scripts/demo\.sh"):
        evaluate.run(tmp_path)


def test_rare_labels_do_not_count():
    right = torch.tensor([True, False, True, True])
    counted = torch.tensor([1, IGNORE, 0, IGNORE]) != IGNORE
    assert evaluate.count(right, [7, 7, 8, 8], counted) == {"7": [1.0, 1.0], "8": [1.0, 1.0]}
