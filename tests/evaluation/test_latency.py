"""Latency tables: which sizes are measured, what becomes of the times, and the command on a tiny model."""

from __future__ import annotations

import itertools
import json
import signal

import pytest
import torch

from distillation.latency import LatencyTable, read_latency
from evaluation import block_times
from evaluation.block_times import (
    CONV_SHARES,
    FFN_SHARES,
    WHOLE,
    Sample,
    Watch,
    at_random,
    cut,
    designs,
    levels,
    measure,
    whole_times,
    with_masks,
)
from evaluation.latency import describe, errors_of, monotone, predictions, rising, scaled, table_of
from tests.configs import TINY
from tests.helpers import run_error
from wav2vec2 import load_model, save_model, wav2vec2_model
from wav2vec2.architecture import HUBERT_BASE, WAVLM_BASE, architecture

REUSING = TINY | {"encoder_layer_drop": 0.0, "encoder_reuse_attention": [False, True, False, True]}


# Sizes


def test_levels():
    assert levels(512, CONV_SHARES, 1) == [31, 191, 383, 511, 512]  # odd, as pruning leaves them, but for the whole
    assert levels(512, CONV_SHARES, 8) == [32, 192, 384, 504, 512]
    assert levels(12, CONV_SHARES, 1) == [1, 4, 9, 11, 12]
    assert levels(12, CONV_SHARES, 8) == [8, 8, 8, 8, 12] and levels(12, CONV_SHARES, 16) == [12] * 5
    assert levels(3072, FFN_SHARES, 1)[:2] == [47, 191] and levels(3072, FFN_SHARES, 32)[:2] == [32, 192]
    assert levels(1, CONV_SHARES, 1) == [1] * 5


@pytest.mark.parametrize("multiple_of", [1, 8, 16])
@pytest.mark.parametrize("config", [HUBERT_BASE, WAVLM_BASE, TINY, REUSING], ids=["base", "wavlm", "tiny", "reusing"])
def test_designs_meet_every_pair_of_neighbours(config, multiple_of):
    with torch.device("meta"):
        masked = with_masks(wav2vec2_model(**config))
    masks, chosen = masked.masks(), designs(masked, multiple_of)
    names = [name for name in masks if name.startswith("feature_extractor")]
    assert len(names) == 7 and all(sizes.keys() == masks.keys() for sizes in chosen)
    for name, other in itertools.pairwise(names):
        pairs = itertools.product(*(levels(len(masks[n]), CONV_SHARES, multiple_of) for n in (name, other)))
        assert {(sizes[name], sizes[other]) for sizes in chosen} == set(pairs)
    for name, mask in masks.items():
        found = {sizes[name] for sizes in chosen}
        assert min(found) >= 1 and max(found) == len(mask), "no block is gone, and each is measured whole"
        if name.endswith("heads"):
            assert min(found) == 1 and len(found) == min(len(mask), 8)
            continue
        assert all(n % multiple_of == 0 or n == len(mask) for n in found)
        if name not in names:
            assert found == set(levels(len(mask), FFN_SHARES, multiple_of))


@pytest.mark.parametrize("multiple_of", [1, 8])
def test_models_at_random(multiple_of):
    masked = with_masks(wav2vec2_model(**{**TINY, "encoder_ff_interm_features": [400] * 4}))
    found = [at_random(masked, multiple_of, seed) for seed in range(20)]
    assert found == [at_random(masked, multiple_of, seed) for seed in range(20)]
    assert len({tuple(sizes.values()) for sizes in found}) == 20
    for name, mask in masked.masks().items():
        sizes = {chosen[name] for chosen in found}
        assert min(sizes) >= (1 if name.startswith("feature_extractor") else 0) and max(sizes) <= len(mask)
        assert name.endswith("heads") or all(n % multiple_of == 0 or n == len(mask) for n in sizes)
    assert any(0 in chosen.values() for chosen in found), "attention blocks without a head are among them"
    whole = sum(len(mask) for mask in masked.masks().values())
    shares = [sum(sizes.values()) / whole for sizes in found]  # from small to large, where budgets may lie
    assert shares[0] < 0.15 and shares[-1] > 0.75 and all(low < high + 0.15 for low, high in itertools.pairwise(shares))


# Times


def test_noise_alone_makes_times_fall():
    def of(ms: list) -> list:
        return monotone(torch.tensor(ms)).tolist()

    assert of([1.0, 3.0, 2.0, 4.0]) == [1, 2.5, 2.5, 4]
    assert of([5.0, 1.0, 3.0]) == [3, 3, 3]
    assert of([1.0, 2.0, 2.0]) == [1, 2, 2]
    assert of([1.0, 9.0, 2.0, 4.0, 5.0, 6.0]) == [1, 5, 5, 5, 5, 6], "one spike does not lift all above it"
    assert of([[1.0, 2.0], [0.0, 3.0]]) == [[0.5, 2], [0.5, 3]]
    found = monotone(torch.rand(6, 7))
    assert (found.diff(dim=0) >= 0).all() and (found.diff(dim=1) >= 0).all()


def test_all_units_may_be_faster():
    """What this CPU does with 511 and 512 channels is not noise: neither with the inputs, nor with the outputs."""
    assert rising(torch.tensor([3.0, 2.0, 4.0, 1.0])).tolist() == [2.5, 2.5, 4, 1]
    assert rising(torch.tensor([3.0])).tolist() == [3]
    assert rising(torch.tensor([[2.0, 1.0, 0.5]])).tolist() == [[1.5, 1.5, 0.5]]
    assert rising(torch.tensor([[2.0], [1.0], [0.5]])).tolist() == [[1.5], [1.5], [0.5]]
    ms = [[2.0, 4.0, 1.0], [1.0, 6.0, 3.0], [0.3, 0.2, 9.0]]
    assert rising(torch.tensor(ms)).tolist() == [[1.5, 4, 1], [1.5, 6, 3], pytest.approx([0.25, 0.25, 9])]
    found = rising(torch.tensor([[1.0, 2.0, 9.0], [2.0, 3.0, 5.0], [0.0, 1.0, 2.0]]))
    assert found.tolist() == [[1, 2, 7], [2, 3, 7], [0, 1, 2]]


def formula(found, reuse: list) -> dict[str, float]:
    """Milliseconds of blocks with so many units, all of them straight lines, and of the whole model."""
    ms = {f"conv.{i}": 0.3 + 0.01 * a * b for i, (a, b) in enumerate(itertools.pairwise([1, *found.conv]))}
    ms["projection"] = 0.1 + 0.02 * found.conv[-1]
    ms |= {f"attention.{i}": 0.2 + (0.1 if reuse[i] else 0.5) * n for i, n in enumerate(found.heads) if n}
    ms |= {f"feed_forward.{i}": 0.1 + 0.01 * n for i, n in enumerate(found.interm) if n}
    return {**ms, WHOLE: 1.5 + sum(ms.values())}


@pytest.mark.parametrize("config", [TINY, REUSING], ids=["tiny", "reusing"])
def test_predictions_are_what_the_times_were_made_from(config):
    model = wav2vec2_model(**config).eval()
    masked, reuse = with_masks(model), config.get("encoder_reuse_attention", [False] * 4)

    def samples(chosen: list) -> list[Sample]:
        shapes = [architecture(cut(masked, sizes).config) for sizes in chosen]
        return [Sample(sizes, found, formula(found, reuse)) for sizes, found in zip(chosen, shapes)]

    designed = samples(designs(masked, 1))
    content = {"config": model.config, "seconds": 1.0, **table_of(model, designed)}
    assert content["fixed"] == pytest.approx(1.5, rel=1e-4)
    assert [kind["layers"] for kind in content["attention"]] == ([[0, 2], [1, 3]] if any(reuse) else [[0, 1, 2, 3]])
    assert content["conv"][1]["inputs"] == content["conv"][1]["units"] == [1, 4, 9, 11, 12]
    others = samples([at_random(masked, 1, seed) for seed in range(8)])
    pairs = predictions(LatencyTable(json.loads(json.dumps(content)), "x"), model, [*designed, *others])
    assert len(pairs) == 33 and max(errors_of(pairs)) < 1e-3
    assert [measured for _, measured in pairs[25:]] == pytest.approx([sample.ms[WHOLE] for sample in others], rel=1e-4)


def test_scaling_is_of_times_alone():
    content = {"seconds": 10.0, "fixed": 2.0, "conv": [{"inputs": [1], "units": [3, 4], "ms": [[1.0, 2.0]]}]}
    twice = {"seconds": 10.0, "fixed": 4.0, "conv": [{"inputs": [1], "units": [3, 4], "ms": [[2.0, 4.0]]}]}
    assert scaled(content, 2.0) == twice
    assert errors_of([[9.0, 10.0], [12.0, 10.0]]) == pytest.approx([0.1, 0.2])


def test_blocks_are_parts_of_the_whole():
    """Each once, in the order in which they run; none counts twice."""
    model = cut(masked := with_masks(wav2vec2_model(**TINY)), designs(masked, 1)[7])
    ms = Watch(model, blocks=True)(torch.randn(1, 16000))
    names = [f"conv.{i}" for i in range(7)] + ["projection"]
    assert list(ms) == [WHOLE, *names, *(f"{kind}.{i}" for i in range(4) for kind in ("attention", "feed_forward"))]
    assert min(ms.values()) > 0 and sum(ms.values()) <= 2 * ms[WHOLE]
    assert list(Watch(model, blocks=False)(torch.randn(1, 16000))) == [WHOLE]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_every_model_is_visited_in_every_round(monkeypatch):
    """What is known is not measured again; the fastest of the visits counts, of the whole and of each block."""
    visits = []

    def visit(model, blocks, device, seconds) -> dict[str, float]:
        visits.append(architecture(model.config))
        number = len(visits)
        return {WHOLE: float(number), **({"conv.0": 1.0 + number % 3} if blocks else {})}

    monkeypatch.setattr(block_times, "visit", visit)
    known = {"model 3, visit 0": {WHOLE: 60.0, "conv.0": 0.25}}
    designed, others = measure(wav2vec2_model(**TINY), "cpu", 1.0, 3, 1, known)
    assert (len(designed), len(others), len(visits), len(known)) == (25, 21, 137, 138)
    assert set(others[0].sizes.values()) == {12, 4, 40}, "the first of those that the table is tried on is whole"
    for i, sample in enumerate(designed):
        times = [known[f"model {i}, visit {n}"] for n in range(3)]
        assert sample.ms == {name: min(visited[name] for visited in times) for name in (WHOLE, "conv.0")}
    rounds = [visits[:45], visits[45:91], visits[91:]]
    shapes = [sample.found for sample in (*designed, *others)]
    for each in rounds[1:]:
        assert all(each.count(found) == shapes.count(found) for found in shapes), "in turns"
    assert rounds[1] != rounds[2], "in another order"


def test_whole_models_in_turns(monkeypatch):
    visits = []

    def visit(model, blocks, device, seconds) -> dict[str, float]:
        visits.append(model)
        assert (blocks, device, seconds) == (False, "cpu", 2.0)
        return {WHOLE: float(len(visits))}

    monkeypatch.setattr(block_times, "visit", visit)
    models = {name: wav2vec2_model(**TINY) for name in "abc"}
    times = whole_times(models, "cpu", 2.0, 3)
    assert all({id(m) for m in visits[i : i + 3]} == {id(m) for m in models.values()} for i in (0, 3, 6))
    assert times == {name: 1 + [id(m) for m in visits].index(id(model)) for name, model in models.items()}


# The command


def test_the_command(server, teacher_path, tmp_path):
    """Goes on after a stop, and leaves a table, a page, and nothing else."""
    out, journal = tmp_path / "latency.json", tmp_path / ".latency.jsonl"
    words = ["-m", "evaluation.latency", teacher_path, "--out", out, "--seconds", 0.5, "--rounds", 1, "--threads", 1]
    run = server.start(*words)
    run.until(lambda: journal.is_file() and len(journal.read_text().splitlines()) > 5)
    run.kill(signal.SIGTERM)
    stopped = run.wait()
    assert stopped.code == 75 and f"what was measured so far is in {journal}" in stopped.error and not out.exists()
    known = len(journal.read_text().splitlines()) - 1
    finished = server.run(*words)
    assert f"going on after {known} times" in finished.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latency.html", "latency.json"]
    content = json.loads(out.read_text())
    assert (content["model"], content["seconds"], content["device"], content["multiple_of"]) == (
        "teacher.pth", 0.5, "cpu", 1)  # fmt: skip
    assert content["measured"]["threads"] == 1 and content["measured"]["rounds"] == 1
    table, teacher = read_latency(out), load_model(teacher_path)
    table.check(teacher)
    (predicted, measured), *others = content["check"]
    assert len(others) == 20 and predicted == pytest.approx(table(teacher).item(), rel=1e-3)
    assert predicted > 0 and measured > 0  # so short a run is no measurement
    assert finished.stdout.startswith(describe(content)) and "20 other models of " in finished.stdout
    assert "<svg" in (tmp_path / "latency.html").read_text()


def test_the_command_refuses(teacher_path, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    masked = with_masks(load_model(teacher_path))
    save_model(tmp_path / "masked.pth", masked)
    config = load_model(teacher_path).config
    channels = [[[2, 3]] * heads for heads in config["encoder_num_heads"]]
    save_model(tmp_path / "uneven.pth", wav2vec2_model(**config, encoder_head_channels=channels))
    out = tmp_path / "x.json"
    for words, said in (
        ([teacher_path, "--out", tmp_path / "x.txt"], "x.txt: name a .json file"),
        ([teacher_path, "--seconds", 0.01], "--seconds 0.01: it must lie between 0.0"),
        ([teacher_path, "--seconds", ".inf"], "--seconds inf: it must lie between 0.0"),
        ([teacher_path, "--threads", 0], "--threads 0: it must lie between 1 and 1024"),
        ([teacher_path, "--threads", 10**11], "--threads 100000000000: it must lie between 1 and 1024"),
        ([teacher_path, "--rounds", 0], "--rounds 0: it must lie between 1 and 1000"),
        ([teacher_path, "--multiple_of", -8], "--multiple_of -8: it must lie between 1 and 1024"),
        ([teacher_path, "--multiple_of", 10**9 + 1], "--multiple_of 1000000001: it must lie between 1 and 1024"),
        ([teacher_path, "--device", "tpu"], "--device tpu: choose cpu or cuda"),
        ([teacher_path, "--device", "cuda"], "--device cuda: no GPU is visible"),
        ([tmp_path / "none.pth"], "none.pth: no such file"),
        ([tmp_path / "masked.pth"], "masked.pth: has masks; name a dense model"),
        ([tmp_path / "uneven.pth"], "uneven.pth: its heads are of unequal width"),
        ([], "model"),
    ):
        assert said in run_error("evaluation/latency.py", "--out", out, *words), words
    assert not out.exists() and not list(tmp_path.glob(".*"))
