from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import signal
import tempfile
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import yaml

from distillation.budget import Budget, MultiplyAccumulates
from distillation.config import parse_recipe, save_resolved
from distillation.data.manifest import read_tsv
from distillation.errors import UserError
from distillation.latency import read_latency
from docs import two_steps
from evaluation import report_data
from evaluation.cost import Speed
from evaluation.held_out import compare_layers
from evaluation.report_data import Effort, Report, closing_table, collect, format_ms, to_json
from evaluation.report_page import render
from evaluation.subjects import MAX_POINTS, hash_files, look_at, read_curves, thinned
from evaluation.svg import Series, bar_chart, line_chart, nice_axis
from tests.configs import TINY
from tests.evaluation.pages import CSV_STEP_2, check_page, keep_step_1, log_cost
from tests.helpers import run_here
from tests.latency import write_latency
from wav2vec2 import load_model, prune, save_model
from wav2vec2.architecture import architecture
from wav2vec2.checkpoint import CheckpointError

pytestmark = pytest.mark.usefixtures("no_child_process")


def gather(path: Path, seconds: float = 900) -> Report:
    subjects = look_at([path])
    return collect(subjects[0], hash_files(subjects), Effort(seconds, ["cpu"], 1))


def test_finished_run(run, teacher_path):
    report = gather(run)
    assert [m.name for m in report.models] == ["teacher", "pruned", "final"]
    teacher, pruned, final = report.models
    assert final.cost.num_params == teacher.cost.num_params > pruned.cost.num_params
    assert pruned.cost.speed[0].peak_bytes == 123 << 20
    # a perfect student has the teacher's loss, and no distance in any layer
    assert teacher.held_out.loss == pytest.approx(-1, abs=1e-6) == final.held_out.loss
    assert final.held_out.terms["l1"] == pytest.approx(0, abs=1e-6)
    assert final.held_out.terms["cos"] == pytest.approx(-1, abs=1e-6)
    assert max(final.held_out.cosine + final.held_out.l1) < 1e-5 and len(final.held_out.l1) == 5
    assert pruned.held_out.loss > -0.99 and min(pruned.held_out.l1) > 0.01
    assert report.held_out_data.startswith("4 utterances")
    assert report.notes == []
    assert {f.role for f in report.files} == {
        "teacher", "pruned", "final", "train100.tsv", "valid.tsv", "config.yaml", "metrics.csv", "final/metrics.csv"
    }  # fmt: skip
    assert [step.name for step in report.steps] == ["Step 1: distillation and pruning", "Step 2: distillation"]
    headings = check_page(page := render(report))
    assert "share of the teacher&#39;s parameters that is gone" in page and "Expected cost" not in page
    assert "Milliseconds by" not in page and report.latency is None
    assert headings == ["Before and after", "Architecture", "Distance to the teacher, layer by layer", "Training",
                        "Configuration", "Versions and files"]  # fmt: skip


def test_hashes_are_those_of_sha256sum(run, teacher_path):
    import hashlib

    found = {f.role: f.sha256 for f in gather(run, seconds=1).files}
    assert found["teacher"] == hashlib.sha256(teacher_path.read_bytes()).hexdigest()


def test_fewer_seconds_take_fewer_utterances(run):
    assert gather(run, seconds=2.9).held_out_data.startswith(("1 utterances", "2 utterances"))


def test_closing_table(run):
    report = gather(run)
    header, _, *rows = closing_table(report.models).splitlines()
    assert header.split("  ")[0] == "model" and "held-out loss" in header and "CPU milliseconds (10 s)" in header
    assert [row.split()[0] for row in rows] == ["teacher", "pruned", "final"]
    assert rows[2].split()[3] == "-1.0000"
    assert [row.split()[4] for row in rows] == [format_ms(m.cost.speed[0].milliseconds) for m in report.models]


def test_milliseconds_by_hand():
    assert Speed("cpu", 10, 2, 0.00123, None).milliseconds == pytest.approx(24.6)
    assert [format_ms(ms) for ms in (0.1234, 34.567, 1234.56)] == ["0.12", "34.57", "1,234.6"]


def test_step_1_only(run, student):
    shutil.rmtree(run / "final")
    (run / "pruned.pth").unlink()
    report = gather(run)
    assert [m.name for m in report.models] == ["teacher", "after step 1"]
    assert report.models[1].architecture == architecture(prune(student)[1])
    assert {f.role for f in report.files} == {
        "teacher", "ckpts/last.ckpt", "train100.tsv", "valid.tsv", "config.yaml", "metrics.csv"
    }  # fmt: skip
    assert "Training" in check_page(render(report))


def test_model_alone(run, student):
    save_model(run / "masked.pth", student)
    report = gather(run / "masked.pth")
    assert report.models[0].architecture == architecture(prune(student)[1])
    assert check_page(render(report)) == ["Cost", "Architecture", "Versions and files"]


def test_fixed_student(run):
    for name in ("pruned.pth", "ckpts/last.ckpt"):
        (run / name).unlink()
    (run / "final" / "final.pth").rename(run / "final.pth")
    shutil.rmtree(run / "final")
    (run / "metrics.csv").write_text(CSV_STEP_2)
    report = gather(run)
    assert [m.name for m in report.models] == ["teacher", "student"] and report.target_sparsity is None
    page = render(report)
    assert "Sparsity" not in page and "Lagrange" not in page and "Throughput" in page
    assert check_page(page)[0] == "Before and after"


def prune_by(run: Path, **settings: object) -> None:
    """Change how the recipe of the run prunes."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["pruning"] |= settings
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_budget_in_parameters(run):
    report = gather(run, seconds=1)
    before, after = report.models[0].cost.num_params, report.models[2].cost.num_params
    budget = report.budget
    assert (budget.cost, budget.before, budget.reached) == ("params", before, after)
    assert budget.target == round(0.7 * before) and report.target_sparsity == budget.sparsity == 0.3
    log_cost(run, "params", [0.98 * before, 0.95 * before])
    prune_by(run, target="20k")
    page = render(gather(run, seconds=1))
    assert f"Budget: 20,000 parameters of the teacher&#39;s {before:,} parameters, a sparsity of " in page
    assert f"; reached: {after:,} parameters." in page
    assert "<b>Expected cost</b> <span>parameters, M</span>" in page
    drawing = page[page.index("<b>Expected cost</b>") :].split("</svg>")[0]
    assert drawing.count("<polyline") == 2, "expected and target"


@pytest.mark.parametrize("target, of", [(None, "10 s"), ("0.05GMACs", "SUPERB")])
def test_budget_in_macs(run, target, of):
    keep_step_1(run)
    log_cost(run, "macs", [3e7, 2e7])
    prune_by(run, cost="macs", target=target)
    report = gather(run, seconds=1)
    teacher, pruned = (getattr(model.cost, f"macs_{'10s' if of == '10 s' else 'superb'}") for model in report.models)
    assert (round(report.budget.before), round(report.budget.reached)) == (teacher, pruned)
    assert report.target_sparsity == pytest.approx(1 - report.budget.target / teacher)
    assert report.budget.target == pytest.approx(0.7 * teacher if of == "10 s" else 5e7)
    page = render(report)
    check_page(page)
    assert f"GMACs ({of}), a sparsity of " in page and f"<b>Expected cost</b> <span>GMACs ({of})</span>" in page
    assert "share of the teacher&#39;s multiply-accumulates that is gone" in page


def test_budget_in_milliseconds(run, tmp_path):
    table = write_latency(tmp_path / "latency.json", TINY)
    log_cost(run, "milliseconds", [30.5, 20.5])
    prune_by(run, cost="milliseconds", latency=str(table))
    report = gather(run, seconds=1)
    assert report.notes == [] and report.latency == "latency.json, 1 s"
    assert "latency table" in {file.role for file in report.files}
    teacher, pruned, final = (model.table_ms for model in report.models)
    assert pruned == pytest.approx(read_latency(table)(load_model(run / "pruned.pth")).item())
    assert pruned < 0.8 * teacher and final == report.budget.reached == report.budget.before == teacher
    assert report.budget.target == pytest.approx(0.7 * teacher)
    page = render(report)
    check_page(page)
    assert "Milliseconds by latency.json, 1 s" in page and format_ms(pruned) in page and "<span>ms</span>" in page
    assert f"Budget: {0.7 * teacher:,.4g} ms of the teacher&#39;s {teacher:,.4g} ms, a sparsity of 0.3" in page
    assert json.loads(to_json(report))["budget"]["cost"] == "milliseconds"


def test_the_budget_is_what_prune_met(run):
    """In the measure of the run: its utterances, its table; whatever the recipe says by now."""
    keep_step_1(run)
    prune_by(run, cost="macs", target="0.05GMACs")
    met = Budget.of_target(MultiplyAccumulates([48_000]), 2e7, 5e6)
    content = torch.load(run / "pruned.pth", weights_only=True)
    torch.save(content | {"run": {"pruned": {"pruning.target": "5MMACs"}, "budget": met.state()}}, run / "pruned.pth")
    found = gather(run, seconds=1).budget
    assert (found.target, found.before, found.unit) == (5e6, 2e7, "GMACs (3 s)")
    assert found.reached == load_model(run / "pruned.pth").get_num_macs(48_000).item()
    torch.save(content | {"run": {"budget": {**met.state(), "before": 0}}}, run / "pruned.pth")
    with pytest.raises(UserError, match=r"pruned\.pth: damaged, its budget cannot be read"):
        gather(run, seconds=1)


def test_latency_table_that_does_not_fit(run, tmp_path):
    keep_step_1(run)
    table = write_latency(tmp_path / "latency.json", TINY | {"encoder_head_dim": 7})
    prune_by(run, cost="milliseconds", latency=str(table))

    def note() -> str:
        report = gather(run, seconds=1)
        assert report.budget is report.latency is None and {model.table_ms for model in report.models} == {None}
        page = render(report)
        assert report.target_sparsity == 0.3 and "Milliseconds by" not in page
        check_page(page)
        (found,) = report.notes
        return found

    assert re.search("by latency.json for teacher, pruned: .* is of another model", note())
    table.write_text("{}")
    assert "not a latency table" in note()
    table.unlink()
    assert f"{table}: no such latency table" in note()
    write_latency(table, TINY)
    (run / "history.yaml").write_text(f"- update: 0\n  settings: {{latency table: {'0' * 64}}}\n")
    assert f"{table} is another latency table now than a run had" in note()


def test_without_teacher_or_data_there_is_still_a_report(run, teacher_path, tiny_flags):
    flags = [str(word) for word in tiny_flags]
    save_resolved(parse_recipe([*flags, "--teacher_ckpt", "gone.pth"])[1], run)
    report = gather(run)
    assert [m.name for m in report.models] == ["pruned", "final"] and "gone.pth" in report.notes[0]
    assert report.budget is None and report.target_sparsity == 0.3
    assert "gone.pth" in render(report)
    save_resolved(parse_recipe([*flags, "--data.valid", "gone.tsv"])[1], run)
    report = gather(run)
    assert report.models[2].held_out is None and "gone.tsv" in report.notes[0]
    check_page(render(report))


def test_names_from_outside_are_escaped(run):
    named = run.rename(run.parent / "<b>&amp;'\"x")
    (named / "config.yaml").write_text((named / "config.yaml").read_text() + "# <script>alert(1)</script>\n")
    page = render(gather(named, seconds=1))
    check_page(page)
    assert "&lt;b&gt;&amp;amp;" in page and "<script>" not in page


def test_read_curves(tmp_path, run):
    curves, rows = read_curves(run / "metrics.csv")
    assert rows == 3
    assert curves["train/l1"] == [(2, 0.9), (4, 0.8)]
    assert curves["train/distill"] == [(2, 0.5)], "what is no number is no point"
    assert curves["valid/distill"] == [(3, -0.1)]
    (tmp_path / "bad.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match=r"bad\.csv"):
        read_curves(tmp_path / "bad.csv")


def test_compare_layers_ignores_padding(teacher_path, student):
    teacher = load_model(teacher_path)
    waveforms, lengths = torch.randn(2, 9000), torch.tensor([9000, 6000])
    waveforms[1, 6000:] = 0
    with torch.no_grad():
        rows = compare_layers(teacher.extract_features(waveforms, lengths)[0], student, waveforms, lengths)
        sums, frames = torch.zeros(5), 0
        for row, length in zip(waveforms, lengths):
            pair = [m.extract_features(row[None, :length])[0] for m in (teacher, student)]
            sums += torch.stack([(a - b).abs().mean(-1).sum() for a, b in zip(*pair)])
            frames += pair[0][0].shape[1]
    torch.testing.assert_close(rows["l1"], sums / frames, rtol=1e-4, atol=1e-5)


def test_command_writes_page_and_numbers(run, capsys, tmp_path):
    out = tmp_path / "out" / "page.html"
    run_here("report.py", run, "--out", out, "--rounds", 1, "--device", "cpu")
    assert sorted(p.name for p in out.parent.iterdir()) == ["page.html", "page.json"]
    numbers = json.loads(out.with_suffix(".json").read_text())
    table = capsys.readouterr().out
    page = out.read_text(encoding="utf-8")
    for model in numbers["models"]:
        assert f"{model['cost']['num_params']:,}" in table and f"{model['cost']['num_params']:,}" in page
    assert numbers["steps"][0]["curves"]["sparsity/expected"] == [[2, 0.02], [4, 0.05]]
    assert numbers["models"][2]["held_out"]["loss"] == pytest.approx(-1, abs=1e-6)


def test_bad_input_is_one_line(run, script_error, teacher_path, tmp_path):
    name, existing = "report.py", sorted(run.rglob("*"))
    assert "no such file or folder" in script_error(name, tmp_path / "none")
    assert "no run in it" in script_error(name, run / "ckpts")
    assert "a training checkpoint" in script_error(name, run / "ckpts" / "last.ckpt")
    assert "metrics.csv" in script_error(name, run / "metrics.csv")
    assert "name an .html file" in script_error(name, run, "--out", tmp_path / "x.json")
    assert "--seconds 0" in script_error(name, run, "--seconds", 0)
    assert "--rounds 0" in script_error(name, run, "--rounds", 0)
    assert sorted(run.rglob("*")) == existing
    for model in ("pruned.pth", "ckpts/last.ckpt"):
        (run / model).unlink()
    assert "no model in it yet" in script_error(name, run)
    (run / "metrics.csv").write_text("step,train/loss\nx,1\n")
    assert "not the metrics of a run" in script_error(name, run)


def test_damaged_model(run):
    (run / "pruned.pth").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(CheckpointError, match=r"pruned\.pth"):
        gather(run)


def test_model_that_is_called_teacher_has_none(teacher_path):
    assert teacher_path.stem == "teacher"
    report = gather(teacher_path)
    assert report.teacher is None and check_page(page := render(report))[0] == "Cost"
    assert "A model of" in page


def write_table(path: Path, rows: int, spike: int) -> None:
    """Metrics of a long run; one row is far off."""
    columns = ["train/loss", "train/distill", *(f"train/l{i}" for i in range(4)), "sparsity/expected",
               "sparsity/target", "lagrangian/lambda1", "lagrangian/lambda2", "lr/weights", "lr/log_alpha",
               "speed/audio_seconds_per_second", "valid/distill", "valid/l0"]  # fmt: skip
    draw = random.Random(0)
    lines = [",".join(["step", *columns])]
    for i in range(rows):
        values = [-987.25 if (i, c) == (spike, "train/distill") else draw.gauss(1, 0.1) for c in columns]
        lines.append(",".join([str(10 * (i + 1)), *(f"{value:.8g}" for value in values)]))
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.slow
def test_run_with_many_rows_has_a_small_report_in_its_shape(run):
    write_table(run / "metrics.csv", 50_000, 31_234)
    shutil.copy(run / "metrics.csv", run / "final" / "metrics.csv")
    report = gather(run, seconds=2)
    page, numbers = render(report), to_json(report)
    check_page(page)
    assert len(page) < 1_000_000 and len(numbers) < 1_000_000
    assert "50,000 rows" in page
    step = json.loads(numbers)["steps"][0]
    assert step["rows"] == 50_000 and f"at most {MAX_POINTS} points" in step["thinned"]
    for name, points in step["curves"].items():
        assert points[0][0] == 10 and points[-1][0] == 500_000 and len(points) <= MAX_POINTS, name
    assert [312_350, -987.25] in step["curves"]["train/distill"]
    assert "\u22121000" in page, "the axis of the loss reaches the spike"


def test_thinned_curve_keeps_every_extreme():
    draw = random.Random(0)
    curve = [(i, draw.random()) for i in range(1001)]
    for count in (3, 11, 40, 41, 1001):
        whole = curve[:count]
        thin = thinned(whole, 40)
        assert len(thin) <= 40 and thin == sorted(set(thin)) and set(thin) <= set(whole)
        assert {whole[0], whole[-1], min(whole, key=lambda p: p[1]), max(whole, key=lambda p: p[1])} <= set(thin)
    assert thinned(curve[:40], 40) == curve[:40]


def test_json_has_numbers_of_few_digits_on_one_line(run):
    report = gather(run, seconds=2)
    report.title = "a [\n1, 2]"
    report.models[0].cost.speed[0].real_time_factor = 0.123456789
    text = to_json(report)
    assert json.loads(text)["title"] == report.title and "[2, 0.02]" in text and "0.123457" in text


def test_config_of_an_older_version(run):
    config = (run / "config.yaml").read_text()
    for old, named in (("  masking: null\n", "objective.masking.span_lengths"), ("seed: 2022\n", "gelu")):
        assert old in config
        new = {"gelu": "gelu: true\n"}.get(named, "  masking:\n    span_lengths: [1, 2]\n")
        (run / "config.yaml").write_text(config.replace(old, new))
        report = gather(run)
        assert [m.name for m in report.models] == ["pruned", "final"] and report.target_sparsity is None
        assert str(run / "config.yaml") in report.notes[0] and named in report.notes[0]
        assert {f.role for f in report.files} == {"pruned", "final", "config.yaml", "metrics.csv", "final/metrics.csv"}
        assert {"Architecture", "Training", "Configuration"} <= set(check_page(render(report)))


def test_heads_of_another_objective_leave_the_distances(run):
    save_model(run / "pruned.pth", load_model(run / "pruned.pth"), {"0.weight": torch.eye(3)})
    report = gather(run)
    _, pruned, final = report.models
    assert pruned.loss is None and len(pruned.held_out.l1) == 5 and final.loss is not None
    assert len(report.notes) == 1 and "pruned" in report.notes[0] and "heads" in report.notes[0]
    assert not report.incomplete


def test_log_tells_once_what_is_left_out(run, caplog, tiny_flags, tsv_dir):
    flags = [str(word) for word in tiny_flags]
    save_resolved(parse_recipe([*flags, "--data.max_frames", "24000", "--data.min_frames", "17000"])[1], run)
    with caplog.at_level(logging.INFO):
        gather(run, seconds=1.5)
    lines = [message for message in caplog.messages if "utterances" in message]
    frames = read_tsv(tsv_dir / "valid.tsv").num_frames.tolist()
    kept = [n for n in frames if 17000 <= n <= 24000]
    short, long = sum(n < 17000 for n in frames), sum(n > 24000 for n in frames)
    assert len(lines) == 1 and short + long > 0 and len(kept) > 1
    assert f"kept {len(kept)} " in lines[0] and f"shorter dropped {short} " in lines[0]
    assert f"longer dropped {long} " in lines[0] and "; 1 of them are used" in lines[0]


@pytest.mark.slow
def test_only_what_changed_is_reported_again(run, teacher_path, capsys):
    def report(*words: object) -> bool:
        """Whether it was made."""
        run_here("report.py", run, "--if_changed", "--device", "cpu", "--seconds", 2, "--rounds", *(words or (1,)))
        said = capsys.readouterr().out.splitlines()
        fresh = said == [f"-> {run / 'report.html'} is up to date"]
        assert fresh or said[-1].startswith(f"-> {run / 'report.html'}, ")
        return not fresh

    assert report()
    made = (run / "report.html").stat().st_mtime_ns
    for path in run.rglob("*"):
        os.utime(path)
    assert not report() and not report()
    with (run / "final" / "metrics.csv").open("a") as file:
        file.write("4,0.1,0.1,1e-4,50\n")
    old = made - 10**12
    os.utime(run / "final" / "metrics.csv", ns=(old, old))
    assert report() and not report()
    (run / "config.yaml").write_text((run / "config.yaml").read_text() + "# a word\n")
    assert report() and not report()
    assert report(2) and not report(2), "other options"
    save_model(run / "pruned.pth", load_model(run / "pruned.pth"), {})
    assert report(2) and not report(2)
    (run / "report.html").unlink()
    assert report(2) and not report(2)
    for damage in ("{", "[]", "{}", '{"files": 3}'):
        (run / "report.json").write_text(damage)
        assert report(2)


def test_report_without_audio_is_tried_again(run, monkeypatch, capsys):
    def broken(*args: object) -> None:
        raise UserError("x.flac: no such file")

    words = (run, "--if_changed", "--device", "cpu", "--seconds", 2, "--rounds", 1)
    with monkeypatch.context() as patch:
        patch.setattr(report_data, "evaluate", broken)
        run_here("report.py", *words)
    run_here("report.py", *words)
    assert "up to date" not in capsys.readouterr().out
    assert json.loads((run / "report.json").read_text())["notes"] == []


def test_stop_leaves_nothing_half_written(run, tmp_path, monkeypatch):
    (run / "pruned.pth").unlink()  # the model of the checkpoint is made in a temporary folder
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    existing = sorted(run.rglob("*"))

    def stopped(paths: dict[str, Path], **options: object) -> None:
        assert list((tmp_path / "temporary").rglob("*.pth"))
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal came late")

    monkeypatch.setattr(report_data, "measure", stopped)
    said = run_here("report.py", run, "--rounds", 1, "--device", "cpu", code=75)
    assert said.splitlines()[-1].startswith("stopped: SIGTERM") and "Traceback" not in said
    assert sorted(run.rglob("*")) == existing and not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize(
    "low, high", [(0, 1), (-0.9, 0.31), (0.2501, 0.2502), (3, 3), (0, 0), (-5, -4.9), (0, 50000), (1e-7, 3e-7)]
)
def test_axis_covers_the_values_with_round_ticks(low, high):
    ticks, first, last = nice_axis(low, high)
    values = [value for value, _ in ticks]
    assert first <= low + 1e-12 and last >= high - 1e-12 and 2 <= len(ticks) <= 7
    steps = {round((b - a) / (values[1] - values[0]), 6) for a, b in pairwise(values)}
    assert steps == {1.0}
    assert len({label for _, label in ticks}) == len(ticks), "labels differ"


def test_axis_by_hand():
    assert [label for _, label in nice_axis(0, 0.74)[0]] == ["0.0", "0.2", "0.4", "0.6", "0.8"]
    assert [label for _, label in nice_axis(-5, 4.4)[0]] == [
        f"{m}{v}"
        for m, v in (("\N{MINUS SIGN}", "5.0"), ("\N{MINUS SIGN}", "2.5"), ("", "0.0"), ("", "2.5"), ("", "5.0"))
    ]
    assert [label for _, label in nice_axis(0, 12, 4, integers=True)[0]] == ["0", "5", "10", "15"]
    assert nice_axis(0, 50000)[0][-1][1] == "60k"


def test_charts():
    assert line_chart("t", [Series("a", [])], x_label="x") == ""
    assert line_chart("t", [Series("a", [(0, 0.0), (1, -1.0)])], x_label="x", log=True) == ""
    drawing = line_chart("t", [Series("a", [(0, 1.0), (10, 3.0)]), Series("b", [(5, 2.0)])], x_label="x")
    assert drawing.count("<polyline") == 2 and drawing.count("<circle") == 1 and drawing.count("<li>") == 2
    drawing = line_chart("<t>", [Series("<a>", [(0, 1.0)]), Series("<b>", [(5, 2.0)])], x_label="<x>", unit="<u>")
    assert not any(f"<{name}>" in drawing.replace("<b>&lt;t&gt;", "") for name in "tabxu"), "escaped"
    drawing = bar_chart("t", [3, 0], [4, 4], x_label="layer")
    assert drawing.count('class="outline"') == 2 and "layer 1: 3 of 4" in drawing
    svg = ElementTree.fromstring(drawing[drawing.index("<svg") : drawing.index("</figure>")])
    tall = [float(bar.get("height")) for bar in svg.iter("rect")]
    assert tall[1] / tall[0] == pytest.approx(0.75, abs=1e-3) and tall[3] == 0


def test_picture_in_the_readme_is_the_one_drawn():
    drawn = two_steps.draw()
    assert (Path(__file__).parents[2] / "docs" / "two_steps.svg").read_text(encoding="utf-8") == drawn
    texts = [
        "".join(text.itertext()) for text in ElementTree.fromstring(drawn).iter("{http://www.w3.org/2000/svg}text")
    ]
    for layer in (0, 4, 8, 12):
        assert texts.count(f"layer {layer}") == 2
    assert {"Student with masks", "Pruned student", "prune"} <= set(texts)
