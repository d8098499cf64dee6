"""The speed benchmarks at tiny sizes: what they compute from their times, and that their steps are the real ones."""

from __future__ import annotations

import itertools
import json
import math
import signal
from types import SimpleNamespace

import pytest
import torch
import torchaudio

from benchmarks import gpu, speed, steps
from benchmarks.plots import as_svg
from benchmarks.speed import Row, Training, schedule_total
from benchmarks.steps import Ours, kept_bytes, set_sparsity, states
from distillation.config import RECIPES, parse_recipe
from distillation.errors import UserError
from distillation.journal import Journal
from distillation.sparsity import make_prunable
from distillation.stopping import Signalled, Stopped
from evaluation.timing import in_turns
from tests.configs import TINY
from wav2vec2 import kernels, wav2vec2_model
from wav2vec2.importers.torchaudio import import_torchaudio

PEER: dict = {
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": [(8, 10, 5), (8, 3, 2), (8, 3, 2), (8, 3, 4), (8, 2, 4)],
    "extractor_conv_bias": False, "encoder_embed_dim": 24, "encoder_projection_dropout": 0.1,
    "encoder_pos_conv_kernel": 8, "encoder_pos_conv_groups": 4, "encoder_num_layers": 12, "encoder_num_heads": 4,
    "encoder_attention_dropout": 0.1, "encoder_ff_interm_features": 48, "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.1, "encoder_layer_norm_first": False, "encoder_layer_drop": 0.0, "aux_num_out": None,
}  # fmt: skip


def tiny_peer() -> torch.nn.Module:
    """A torchaudio HuBERT of 12 layers, as the peers match layers 0, 4, 8 and 12, but narrow."""
    return torchaudio.models.wav2vec2_model(**PEER)


def ours(objective_layers: list[list[int]], waveforms: torch.Tensor) -> Ours:
    recipe, _ = parse_recipe(["--config", str(RECIPES / "dphubert_base.yaml")])
    recipe.objective.layer_to_layer.layers = objective_layers
    teacher = wav2vec2_model(**TINY).eval()
    return Ours(make_prunable(teacher, recipe.pruning), teacher, waveforms, recipe.objective)


@pytest.mark.parametrize("sparsity", [0.25, 0.7])
def test_masks_of_a_wanted_sparsity(sparsity):
    step = ours([[0], [2, 4]], torch.randn(1, 4000))
    set_sparsity(step.student, sparsity)
    total = sum(p.numel() for name, p in step.student.named_parameters() if not name.endswith("log_alpha"))
    assert step.student.get_num_params().item() == pytest.approx((1 - sparsity) * total, rel=1e-3)
    before = {name: p.clone() for name, p in step.student.named_parameters()}
    step.step()
    step.step(torch.bfloat16)
    moved = {name for name, p in step.student.named_parameters() if not torch.equal(before[name], p)}
    assert moved and not any(name.endswith("log_alpha") for name in moved)  # the sparsity stays


def test_the_peer_sees_the_states_that_we_see():
    peer = tiny_peer().eval()
    imported = import_torchaudio(PEER, peer.state_dict(), normalize_waveform=False)
    model = wav2vec2_model(**imported.config)
    model.load_state_dict({**model.state_dict(), **imported.state_dict})
    waveforms = torch.randn(2, 6000)
    with torch.no_grad():
        for left, right in zip(states(peer, waveforms), states(model.eval(), waveforms), strict=True):
            torch.testing.assert_close(left, right, atol=2e-5, rtol=1e-4)


def test_kept_bytes_by_hand():
    layer = torch.nn.Linear(6, 5)
    x = torch.randn(7, 6, requires_grad=True)
    # the input of the product, and the result of the exponential; the weight is a parameter
    assert kept_bytes(lambda: layer(x).exp().sum(), layer) == 4 * (7 * 6 + 7 * 5)


def test_schedule_by_hand():
    rows = [
        Row("step1", f"{s}, f32", 1 / ratio, 1.0, extra={"sparsity": s})
        for s, ratio in ((0.0, 1.0), (0.75, 3.0), (0.85, 9.0))
    ]
    # the ramp costs (1 + 1/3) / 2 of dense on average, the rest a third
    total = schedule_total(rows, "f32")
    assert total.ratio == pytest.approx(50_000 / (5_000 * 2 / 3 + 45_000 / 3))
    assert total.goal == 2.4


def test_hours_by_hand():
    assert gpu.hours({0.0: 640.0, 0.75: 640.0}) == pytest.approx(50_000 / 3600)
    assert gpu.hours({0.0: 640.0, 0.75: 1280.0}) == pytest.approx((5_000 * math.log(2) + 45_000 / 2) / 3600, rel=0.01)


@pytest.mark.parametrize("limit", [0, 1, 5, 8, 13, 99])
def test_largest_batch(limit):
    tried = []

    def fits(count: int) -> bool:
        tried.append(count)
        return count <= limit

    assert gpu.largest_batch(fits, 20) == min(limit, 20)
    assert len(tried) == len(set(tried)) <= 10


@pytest.mark.slow
def test_training_rows(monkeypatch, tmp_path):
    config = {**TINY, "encoder_num_layers": 12}
    for key in ("encoder_use_attention", "encoder_use_feed_forward", "encoder_num_heads", "encoder_ff_interm_features"):
        config[key] = TINY[key][:1] * 12
    monkeypatch.setattr(steps, "HEAD_WIDTH", 24)
    peaks = {None: 1e9, torch.bfloat16: 1e9}
    what = Training("step1", config, tiny_peer, 1, 0.5, (speed.START, 0.0, 0.7))
    known = Journal(tmp_path / "known.jsonl", {}, "points")
    rows = speed.training_rows(what, 1, peaks, known)
    assert [row.name for row in rows] == [
        f"HuBERT Base, step 1, 1 x 0.5 s, {s}, {p}"
        for s in ("start", "0% pruned", "70% pruned") for p in ("f32", "bf16")
    ]  # fmt: skip
    assert 0.05 < rows[0].extra["sparsity"] < 0.15  # the recipe's drop rates of 0.01 and 0.5
    assert all(row.seconds > 0 and row.ratio > 0 and row.share_of_peak > 0 for row in rows)
    assert 0 < rows[4].extra["kept"] < 1.5
    text = speed.table(rows)
    assert text.count("\n") == 7 and "step 1, 1 x 0.5 s, 70% pruned, bf16" in text
    assert "<svg" in as_svg(speed.draw(rows))
    monkeypatch.setattr(speed, "Ours", None)  # nothing is built for what is known
    assert speed.training_rows(what, 1, peaks, Journal(known.path, {}, "points")) == rows


def test_goals_are_found_by_name():
    names = [
        "HuBERT Base, step 1, 4 x 5 s, start, bf16",
        "HuBERT Base, step 1, 4 x 5 s, 70% pruned, f32",
        "HuBERT Base, step 2, 4 x 5 s, bf16",
        "student against teacher, 10 s, bf16",
        "HuBERT Base, step 1, 4 x 5 s, 75% pruned, f32",
        "student against teacher, 1 s, bf16",
    ]
    assert [Row("", name, 1.0, 1.0).goal for name in names] == [2.7, 2.6, 2.5, 7.0, None, None]


@pytest.fixture
def forms_taken(monkeypatch) -> list[tuple[torch.dtype | None, frozenset[str]]]:
    """Of every step in the section forms: its type, and the forms that it did without."""
    seen: list = []

    class Steps:
        def step(self, dtype: torch.dtype | None) -> None:
            seen.append((dtype, frozenset(name for name in kernels.FORMS if not kernels.takes(name))))

    monkeypatch.setattr(speed, "HUBERT_BASE", TINY)
    monkeypatch.setattr(speed, "Ours", lambda student, teacher, _: Steps())
    return seen


def test_form_rows(forms_taken, tmp_path):
    """A step without each form runs without it, and all others in it."""
    seen, rows = forms_taken, speed.form_rows(1, Journal(tmp_path / "known.jsonl", {}, "points"))
    off = [*(frozenset([name]) for name in kernels.FORMS), frozenset(kernels.FORMS), frozenset()]
    assert set(seen) == {(dtype, names) for dtype in (None, torch.bfloat16) for names in off}
    assert [row.name.split("without ")[1] for row in rows] == [
        f"{what}, {precision}" for precision in ("f32", "bf16") for what in [*kernels.FORMS.values(), "any"]
    ]
    assert all(map(kernels.takes, kernels.FORMS))


def test_a_stopped_benchmark_goes_on_after_the_last_point(forms_taken, tmp_path, monkeypatch, capsys, caplog):
    caplog.set_level("INFO")
    peaks: list[float] = []

    def peak(dtype: torch.dtype) -> float:
        peaks.append(1e9 + len(peaks))
        return peaks[-1]

    def stop_in_bfloat16(steps: dict, rounds: int, title: str) -> dict:
        if "bf16" in title:
            raise Signalled(signal.SIGINT)
        return in_turns(steps, rounds, title)

    monkeypatch.setattr(speed, "matmul_peak", peak)
    journal = tmp_path / ".speed.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(speed, "in_turns", stop_in_bfloat16)
        with pytest.raises(Stopped) as stopped:
            speed.run(["forms"], rounds=2, threads=1, out=tmp_path)
    assert str(stopped.value) == f"SIGINT: the points measured so far are in {journal}; the same command goes on"
    before = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [line.get("key") for line in before] == [None, "matmul peak", "forms, f32"]
    assert {"cores", "cpu", "torch", "numpy", "threads", "rounds"} < before[0]["of"].keys()
    forms_taken.clear()
    rows = speed.run(["forms"], rounds=2, threads=1, out=tmp_path)
    assert {dtype for dtype, _ in forms_taken} == {torch.bfloat16} and peaks == [1e9, 1e9 + 1]
    assert [vars(row) for row in rows[: len(rows) // 2]] == before[2]["value"]
    content = json.loads((tmp_path / "speed.json").read_text())
    assert len(content["rows"]) == len(rows) and content["peak_gmacs"]["f32"] == 1.0 and not journal.exists()
    speed.run(["forms"], rounds=1, threads=1, out=tmp_path)
    assert len(peaks) == 4  # a finished one is measured again
    with monkeypatch.context() as patch:
        patch.setattr(speed, "in_turns", stop_in_bfloat16)
        with pytest.raises(Stopped):
            speed.run(["forms"], rounds=2, threads=1, out=tmp_path)
    speed.run(["forms"], rounds=3, threads=1, out=tmp_path)
    assert "holds points with other settings (rounds 2 -> 3), starting afresh" in caplog.text


def test_phases_of_a_step():
    step = ours([[0], [2, 4]], torch.randn(1, 4000))
    step.step()
    assert list(step.watch.seconds) == ["teacher", "student, forward", "student, backward", "update"]
    assert all(seconds > 0 for seconds in step.watch.seconds.values())


@pytest.mark.slow
def test_gpu_at_a_tiny_size_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "loader_rate", lambda seconds: 1234.0)
    known = Journal(tmp_path / "known.jsonl", {}, "points")
    result = gpu.measure(TINY, "cpu", 1.0, 1, known)
    assert json.loads(json.dumps(result))["hours"]["step 1"] > 0
    assert [point["what"] for point in result["points"]] == [
        *(f"step 1, {s:.0%} pruned, ours" for s in gpu.SPARSITIES), "step 2, ours",
        *(f"largest batch, {s} pruned, ours" for s in ("0%", "75%")),
    ]  # fmt: skip
    assert result["largest_batch"]["seconds"] == 30.0 and result["largest_batch"]["hours of step 1"] > 0
    page = gpu.page(result)
    assert "| step 1, 25% pruned, ours | 1 | " in page and "\nlargest batch: 30 s; step 1 with nine tenths" in page
    assert "; of A100, as published: 18 + 6\nthe loader gives 1,234 s" in page
    assert all(point["audio_per_second"] > 0 and point["share_of_peak"] > 0 for point in result["points"])


@pytest.mark.slow
def test_a_stopped_gpu_benchmark_goes_on(tmp_path, monkeypatch):
    measure, timed = gpu.measure, []

    def stop_at_third(steps: dict, rounds: int, title: str) -> dict:
        timed.append(title)
        if len(timed) == 3:
            raise Signalled(signal.SIGUSR1)
        return in_turns(steps, rounds, title)

    monkeypatch.setattr(gpu, "measure", lambda config, *rest: measure(TINY, *rest))
    monkeypatch.setattr(gpu, "loader_rate", lambda seconds: 100.0)
    monkeypatch.setattr(gpu, "in_turns", stop_at_third)
    out = tmp_path / "gpu.json"
    with pytest.raises(Stopped, match="SIGUSR1: the points measured so far are in"):
        gpu.run(out, batch_seconds=1.0, rounds=1, device="cpu")
    lines = [json.loads(line) for line in (tmp_path / ".gpu.jsonl").read_text().splitlines()]
    gpu.run(out, batch_seconds=1.0, rounds=1, device="cpu")
    points = json.loads(out.read_text())["points"]
    assert [point["seconds"] for point in points[:2]] == [line["value"]["ours"]["seconds"] for line in lines[2:]]
    steps = [f"step 1, {s} pruned" for s in ("0%", "25%", "50%", "50%", "75%")]
    assert timed == [*steps, "step 2", "largest batch, 0% pruned", "largest batch, 75% pruned"]
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]


def test_a_batch_too_large_for_a_kernel_costs_nothing_else(tmp_path, monkeypatch):
    def breaks(has_room: object, most: int) -> int:
        raise RuntimeError("integer out of range\nmore")

    monkeypatch.setattr(gpu, "largest_batch", breaks)
    monkeypatch.setattr(gpu, "loader_rate", lambda seconds: 1234.0)
    result = gpu.measure(TINY, "cpu", 1.0, 1, Journal(tmp_path / "known.jsonl", {}, "points"))
    assert result["largest_batch"] == {"error": "integer out of range"} and result["hours"]["step 1"] > 0
    page = gpu.page(result)
    assert page.endswith("the largest batch was not found: integer out of range")


def test_loader_rate():
    assert gpu.loader_rate(0.2) > 1


@pytest.mark.slow
def test_a_late_gpu_benchmark_leaves_parts_out(tmp_path):
    known = Journal(tmp_path / "known.jsonl", {}, "points")
    result = gpu.measure(TINY, "cpu", 1.0, 1, known, late=lambda: True)
    assert result["hours"]["step 1"] > 0 and result["hours"]["step 2"] is result["largest_batch"] is None
    assert gpu.page(result).endswith("\nno time for all")
    gpu.run(tmp_path / "gpu.json", batch_seconds=1.0, rounds=1, device="cpu", size="small", seconds=0.0)
    assert json.loads((tmp_path / "gpu.json").read_text())["loader_audio_per_second"] is None


def test_new_sizes_stay_new():
    lengths = []
    model = SimpleNamespace(waveforms=None)
    turns = itertools.count()
    for _ in range(3):  # points of one run
        step = gpu.varied(model, torch.zeros(1, 64_000), lambda: lengths.append(model.waveforms.shape[1]), turns)
        for _ in range(8):
            step()
    assert len(set(lengths)) == 24 and abs(sum(lengths) / 24 - 64_000) < 320


def test_mistakes(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no section 'step3'; there are step1, phases"):
        speed.run(["step3"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no GPU is visible"):
        gpu.run(tmp_path / "gpu.json")
