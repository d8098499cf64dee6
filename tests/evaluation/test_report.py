from __future__ import annotations

import json
import shutil
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from distillation.config import parse_recipe, save_resolved
from distillation.errors import UserError
from distillation.sparsity import PruningConfig, make_prunable
from docs import two_steps
from evaluation import cost
from evaluation.held_out import compare_layers
from evaluation.report_data import closing_table, collect, read_curves
from evaluation.report_page import render
from evaluation.svg import Series, bar_chart, line_chart, nice_axis
from wav2vec2 import load_model, prune, save_model
from wav2vec2.architecture import architecture
from wav2vec2.checkpoint import CheckpointError

VOID = {"meta", "br"}
CSV = """step,train/loss,train/distill,train/l1,train/cos,sparsity/expected,sparsity/target,lagrangian/lambda1,\
lagrangian/lambda2,lr/weights,lr/biases_norms,lr/log_alpha,speed/audio_seconds_per_second,valid/distill,valid/l1
2,1.5,0.5,0.9,-0.4,0.02,0.1,0.0,0.0,1e-4,1e-4,0.02,30,,
3,,,,,,,,,,,,,-0.1,0.7
4,1.2,nan,0.8,-0.5,0.05,0.3,-0.1,0.2,2e-4,2e-4,0.02,33,,
"""
CSV_STEP_2 = """step,train/loss,train/distill,lr/weights,speed/audio_seconds_per_second
2,0.1,0.1,1e-4,50
"""


@pytest.fixture(autouse=True)
def no_child_process(monkeypatch):
    """Memory is measured in a process of its own, which test_cost.py tests."""
    monkeypatch.setattr(cost, "peak_memory", lambda path, cases: [123 << 20] * len(cases))


@pytest.fixture
def student(teacher_path):
    """The teacher with masks, some of which drop units."""
    torch.manual_seed(1)
    masked = make_prunable(load_model(teacher_path), PruningConfig(units=["conv", "head", "interm"]))
    for mask in masked.masks().values():
        mask.log_alpha.data = torch.linspace(-6, 6, len(mask.log_alpha))
    return masked.eval()


@pytest.fixture
def run(tmp_path, teacher_path, tiny_flags, student) -> Path:
    """What a finished run leaves. Its final model is the teacher itself, with identity heads."""
    folder = tmp_path / "a run"
    (folder / "final").mkdir(parents=True)
    _, resolved = parse_recipe([str(word) for word in tiny_flags])
    for part, table in ((folder, CSV), (folder / "final", CSV_STEP_2)):
        save_resolved(resolved, part)
        (part / "metrics.csv").write_text(table)
    heads = {f"{i}.{k}": v for i in range(3) for k, v in {"weight": torch.eye(24), "bias": torch.zeros(24)}.items()}
    save_model(folder / "pruned.pth", prune(student)[0], heads)
    save_model(folder / "final" / "final.pth", load_model(teacher_path), heads)
    state = {f"student.{name}": value for name, value in student.state_dict().items()}
    checkpoint = {"student_config": student.config, "state_dict": state, "heads": heads}
    (folder / "ckpts").mkdir()
    torch.save(checkpoint, folder / "ckpts" / "last.ckpt")
    return folder


def gather(path: Path, max_seconds: float = 900):
    return collect(path, max_seconds=max_seconds, devices=["cpu"], rounds=1)


class Page(HTMLParser):
    """Fails on unbalanced tags; collects headings and anything that a browser would fetch or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.outside: list[str] = []
        self.headings: list[str] = []
        self.optional = {"th", "tr", "td", "li"}
        self.feed(text)
        assert not [tag for tag in self.open if tag not in self.optional]

    def handle_starttag(self, tag, attrs):
        if tag in ("script", "link", "img", "iframe"):
            self.outside.append(tag)
        self.outside += [value for name, value in attrs if name in ("src", "href") or name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open[-1] != tag and self.open[-1] in self.optional:
            self.open.pop()
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def check_page(text: str) -> list[str]:
    page = Page(text)
    assert page.outside == [] and "@import" not in text and "url(" not in text and "http" not in text
    for drawing in text.split("<svg")[1:]:
        for value in ElementTree.fromstring("<svg" + drawing.split("</svg>")[0] + "</svg>").iter():
            assert all("nan" not in v and "inf" not in v for k, v in value.attrib.items() if k != "aria-label")
    return page.headings


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
    assert {f.role for f in report.files} == {"teacher", "pruned", "final", "train100.tsv", "valid.tsv"}
    assert [step.name for step in report.steps] == ["Step 1: distillation and pruning", "Step 2: distillation"]
    headings = check_page(render(report))
    assert headings == ["Before and after", "Architecture", "Distance to the teacher, layer by layer", "Training",
                        "Configuration", "Versions and files"]  # fmt: skip


def test_hashes_are_those_of_sha256sum(run, teacher_path):
    import hashlib

    found = {f.role: f.sha256 for f in gather(run, max_seconds=1).files}
    assert found["teacher"] == hashlib.sha256(teacher_path.read_bytes()).hexdigest()


def test_fewer_seconds_take_fewer_utterances(run):
    assert gather(run, max_seconds=2.9).held_out_data.startswith(("1 utterances", "2 utterances"))


def test_closing_table(run):
    header, _, *rows = closing_table(gather(run)).splitlines()
    assert header.split("  ")[0] == "model" and "held-out loss" in header and "CPU real-time factor" in header
    assert [row.split()[0] for row in rows] == ["teacher", "pruned", "final"]
    assert rows[2].split()[3] == "-1.0000"


def test_step_1_only(run, student):
    shutil.rmtree(run / "final")
    (run / "pruned.pth").unlink()
    report = gather(run)
    assert [m.name for m in report.models] == ["teacher", "after step 1"]
    assert report.models[1].architecture == architecture(prune(student)[1])
    assert {f.role for f in report.files} == {"teacher", "train100.tsv", "valid.tsv"}
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


def test_without_teacher_or_data_there_is_still_a_report(run, teacher_path, tiny_flags):
    flags = [str(word) for word in tiny_flags]
    save_resolved(parse_recipe([*flags, "--teacher_ckpt", "gone.pth"])[1], run)
    report = gather(run)
    assert [m.name for m in report.models] == ["pruned", "final"] and "gone.pth" in report.notes[0]
    assert "gone.pth" in render(report)
    save_resolved(parse_recipe([*flags, "--data.valid", "gone.tsv"])[1], run)
    report = gather(run)
    assert report.models[2].held_out is None and "gone.tsv" in report.notes[0]
    check_page(render(report))


def test_names_from_outside_are_escaped(run):
    named = run.rename(run.parent / "<b>&amp;'\"x")
    (named / "config.yaml").write_text((named / "config.yaml").read_text() + "# <script>alert(1)</script>\n")
    page = render(gather(named, max_seconds=1))
    check_page(page)
    assert "&lt;b&gt;&amp;amp;" in page and "<script>" not in page


def test_read_curves(tmp_path, run):
    curves = read_curves(run / "metrics.csv")
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


def test_command_writes_page_and_numbers(run, script_error, monkeypatch, capsys, tmp_path):
    import runpy
    import sys

    out = tmp_path / "out" / "page.html"
    root = Path(__file__).parents[2]
    monkeypatch.setattr(sys, "argv", ["report.py", str(run), "--out", str(out), "--rounds", "1", "--device", "cpu"])
    runpy.run_path(str(root / "report.py"), run_name="__main__")
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
