from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from distillation.config import flat_settings, parse_recipe, save_resolved
from distillation.latency import read_latency
from evaluation import report_data, subjects
from evaluation.compare_data import Comparison, compare, differing
from evaluation.compare_page import render
from evaluation.report_data import Effort, closing_table, collect, to_json
from evaluation.subjects import hash_files, look_at
from tests.configs import TINY, first_layers
from tests.evaluation.pages import check_page, keep_step_1, write_run
from tests.helpers import run_here
from tests.latency import write_latency
from wav2vec2 import load_model, save_model, wav2vec2_model
from wav2vec2.checkpoint import fingerprint, load_checkpoint

pytestmark = pytest.mark.usefixtures("no_child_process")
EFFORT = Effort(900, ["cpu"], 1)


@pytest.fixture
def other(tmp_path, tiny_flags, student, teacher_path) -> Path:
    """A run with other settings of pruning and without its final step."""
    flags = [*tiny_flags, "--pruning.target_sparsity", 0.5, "--optim.lr", 3e-4, "--exp_dir", tmp_path / "elsewhere"]
    return keep_step_1(write_run(tmp_path / "other", flags, student, teacher_path))


def gather(*paths: Path, effort: Effort = EFFORT) -> Comparison:
    subjects = look_at(paths)
    return compare(subjects, hash_files(subjects), effort)


def resave(run: Path, tiny_flags: list[object], *flags: object) -> None:
    save_resolved(parse_recipe([str(word) for word in (*tiny_flags, *flags)])[1], run)


def test_two_runs_and_a_model(run, other, teacher_path, monkeypatch):
    calls, evaluate = [], report_data.evaluate

    def counted(recipe, teacher, students, *rest):
        calls.append(list(students))
        return evaluate(recipe, teacher, students, *rest)

    monkeypatch.setattr(report_data, "evaluate", counted)
    save_model(run / "bare.pth", load_model(other / "pruned.pth"))
    page = gather(run, other, run / "bare.pth")
    assert calls == [["a run", "other", "bare"]], "one pass over the audio for all"
    assert [m.name for m in page.models] == ["teacher", "a run", "other", "bare"]
    assert [m.stage for m in page.models] == [None, "final", "pruned", None]
    teacher, final, pruned, bare = page.models
    assert final.sparsity == 0 and teacher.sparsity is None and 0 < pruned.sparsity == bare.sparsity < 1
    assert page.quality == "loss" and page.one_objective
    assert page.quality_of("a run") == pytest.approx(-1, abs=1e-6) == page.quality_of("teacher")
    assert page.quality_of("other") > -0.99
    assert bare.loss is None and bare.held_out.l1 == pytest.approx(pruned.held_out.l1)
    assert page.notes == ["No held-out loss for bare: its file has no distillation heads."]
    assert page.settings == {
        "optim.lr": {"a run": 0.001, "other": 0.0003}, "pruning.target_sparsity": {"a run": 0.3, "other": 0.5}
    }  # fmt: skip
    assert [step.name[:6] for step in page.steps["a run"]] == ["Step 1", "Step 2"]
    assert [step.name[:6] for step in page.steps["other"]] == ["Step 1"] and "bare" not in page.steps
    assert set(page.steps["other"][0].curves) == {"train/distill", "valid/distill", "sparsity/expected",
                                                  "sparsity/target"}  # fmt: skip
    headings = check_page(text := render(page))
    assert headings == ["Side by side", "Quality against cost", "Distance to the teacher, layer by layer",
                        "Architecture", "Training", "Settings that differ", "Versions and files"]  # fmt: skip
    for name in ("teacher", "a run", "other"):
        cost, loss = page.model(name).cost, f"{page.quality_of(name):.4g}"
        for at in (cost.num_params / 1e6, cost.macs_10s / 1e9, cost.speed[0].milliseconds):
            assert f"<title>{name}, {at:g}: {loss}</title>" in text, "every point says what it is"
    for x_label, count in (("parameters, M", 1 + 3), ("GMACs, 10 s", 1), ("CPU milliseconds, 10 s", 1)):
        assert text.count(f">{x_label}</text>") == count, "the loss against every cost, its three terms against one"
    assert "share of the teacher&#39;s parameters; dashed" in text and "milliseconds by" not in text
    rows = closing_table(page.models).splitlines()[2:]
    assert [row.split("  ")[0] for row in rows] == ["teacher", "a run", "other", "bare"]


def test_budgets_of_other_costs(run, other, tiny_flags, tmp_path):
    table = write_latency(tmp_path / "latency.json", TINY)
    resave(run, tiny_flags, "--pruning.cost", "milliseconds", "--pruning.latency", table)
    resave(other, tiny_flags, "--pruning.cost", "macs", "--pruning.target", "0.02GMACs", "--pruning.macs_seconds", 5)
    effort = Effort(1, ["cpu"], 1)
    page = gather(run, other, effort=effort)
    assert page.costs == ["milliseconds", "macs"] and page.latency == "latency.json, 1 s" and page.notes == []
    assert page.settings["pruning.cost"] == {"a run": "milliseconds", "other": "macs"}
    assert page.settings["pruning.target"] == {"a run": None, "other": "0.02GMACs"}
    found = read_latency(table)
    assert page.model("other").table_ms == pytest.approx(found(load_model(other / "pruned.pth")).item())
    check_page(text := render(page))
    assert "share of each run&#39;s own cost; dashed" in text
    assert text.count(">milliseconds by latency.json, 1 s</text>") == 1 and "Milliseconds by latency.json, 1 s" in text
    another = write_latency(tmp_path / "another.json", TINY, 2.0)
    resave(other, tiny_flags, "--pruning.cost", "milliseconds", "--pruning.latency", another)
    page = gather(run, other, effort=effort)
    assert page.notes == ["The runs have different latency tables: no milliseconds by them."]
    assert page.latency is None and page.costs == ["milliseconds"]


def test_numbers_are_those_of_the_reports_alone(run, other):
    page = gather(run, other)
    for path in (run, other):
        subjects = look_at([path])
        alone = collect(subjects[0], hash_files(subjects), EFFORT).models[-1]
        together = page.model(path.name)
        assert together.held_out == alone.held_out and together.architecture == alone.architecture
        assert together.cost.macs_superb == alone.cost.macs_superb


def test_same_teacher_and_list_in_other_places(run, other, tiny_flags, teacher_path, tsv_dir, tmp_path):
    shutil.copy(teacher_path, tmp_path / "copy.pth")
    shutil.copytree(tsv_dir, tmp_path / "lists")
    resave(other, tiny_flags, "--teacher_ckpt", tmp_path / "copy.pth", "--data.tsv_dir", tmp_path / "lists")
    page = gather(run, other)
    assert [group.members for group in page.groups] == [["a run", "other"]]
    assert page.quality == "loss" and [m.name for m in page.models] == ["teacher", "a run", "other"]


@pytest.mark.parametrize(
    "flags", [("--objective.layer_to_layer.cos", 5), ("--data.max_frames", 26000), ("--data.valid", "train100.tsv")]
)
def test_losses_that_mean_other_things_are_not_compared(run, other, tiny_flags, flags):
    resave(other, tiny_flags, *flags)
    page = gather(run, other)
    assert [group.members for group in page.groups] == [["a run"], ["other"]]
    assert page.quality == "distance" and page.one_objective == (flags[0] != "--objective.layer_to_layer.cos")
    assert (
        page.quality_of("other") == pytest.approx(sum(page.model("other").held_out.cosine) / 5)
        and page.quality_of("teacher") is None
    )
    assert any("not comparable" in note and "a run; other" in note for note in page.notes)
    assert any("same audio" in note for note in page.notes) == flags[0].startswith("--data")
    assert "Quality against cost" in check_page(render(page))


def test_two_teachers(run, other, tiny_flags, teacher_path, tmp_path):
    torch.manual_seed(7)
    save_model(tmp_path / "second.pth", wav2vec2_model(**TINY))
    resave(other, tiny_flags, "--teacher_ckpt", tmp_path / "second.pth")
    page = gather(run, other)
    assert [m.name for m in page.models] == ["teacher of a run", "teacher of other", "a run", "other"]
    assert [m.teacher for m in page.models[2:]] == ["teacher of a run", "teacher of other"]
    assert page.quality == "distance"
    check_page(render(page))


def test_models_alone(run, teacher_path):
    page = gather(teacher_path, run / "pruned.pth")
    assert [m.name for m in page.models] == ["teacher", "pruned"] and page.groups == [] and page.notes == []
    assert check_page(render(page)) == ["Side by side", "Architecture", "Versions and files"]


def test_model_of_another_depth(run, other, tmp_path):
    save_model(tmp_path / "shallow.pth", wav2vec2_model(**first_layers(TINY, 2)))
    page = gather(run, other, tmp_path / "shallow.pth")
    shallow = page.model("shallow")
    assert shallow.loss is None and shallow.held_out.l1 == [] and page.quality == "loss"
    assert any("No distances per layer for shallow" in note for note in page.notes)
    assert any("No held-out loss for shallow" in note for note in page.notes)
    check_page(render(page))


def test_missing_teacher_and_older_config(run, other, tiny_flags):
    resave(run, tiny_flags, "--teacher_ckpt", "gone.pth")
    config = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(config.replace("  masking: null\n", "  masking:\n    span_lengths: [1]\n"))
    page = gather(run, other)
    assert "gone.pth" in page.notes[0] and "objective.masking.span_lengths" in page.notes[1]
    assert [m.name for m in page.models] == ["a run", "other"] and page.settings == {} and not page.one_objective
    assert check_page(render(page)) == ["Side by side", "Architecture", "Training", "Versions and files"]


def test_run_whose_teacher_has_gone_beside_another(run, other, tiny_flags):
    resave(other, tiny_flags, "--teacher_ckpt", "gone.pth")
    page = gather(run, other)
    assert page.quality == "distance" and page.model("other").held_out is None
    assert page.notes[-1].startswith("Not compared with a teacher, ") and page.notes[-1].endswith(": other.")


def test_audio_that_has_gone(run, other, tiny_flags):
    resave(other, tiny_flags, "--data.valid", "gone.tsv")
    page = gather(run, other)
    assert page.incomplete and any("gone.tsv" in note and "other" in note for note in page.notes)
    assert page.model("a run").loss is not None
    check_page(render(page))


def test_differing_settings_by_hand(tiny_flags):
    flags = [str(word) for word in tiny_flags]
    recipes = {
        "a": parse_recipe(flags)[0],
        "b": parse_recipe([*flags, "--exp_dir", "x", "--final", "null", "--seed", "3"])[0],
    }
    found = differing({run: flat_settings(recipe) for run, recipe in recipes.items()})
    assert found["seed"] == {"a": 2022, "b": 3} and found["final"] == {"b": None}
    assert found["final.lr"] == {"a": 0.001} and all(name.startswith("final") or name == "seed" for name in found)


@pytest.mark.slow
def test_eight_models_fit(run, other, tmp_path, teacher_path):
    paths = [run, other]
    for i in range(3):
        (tmp_path / str(i)).mkdir()
        paths.append(shutil.copytree(run, tmp_path / str(i) / "<b>&\"'a run with a rather long name"))
        save_model(tmp_path / str(i) / "model.pth", load_model(teacher_path))
        paths.append(tmp_path / str(i) / "model.pth")
    page = gather(*paths, effort=Effort(2, ["cpu"], 1))
    names = [m.name for m in page.models]
    assert len(set(names)) == 9 and names[1:3] == ["a run", "other"] and names[3:] == [str(path) for path in paths[2:]]
    assert page.title == "a run, other and 6 more"
    text = render(page)
    check_page(text)
    assert "<b>&" not in text and "&lt;b&gt;&amp;" in text
    content = json.loads(to_json(page))
    assert content["made_with"]["arguments"] == names[1:]
    assert all(math.isfinite(model["cost"]["speed"][0]["real_time_factor"]) for model in content["models"])


def test_command(run, other, capsys, tmp_path):
    words = ["report.py", other, run, "--rounds", 1, "--device", "cpu", "--seconds", 2, "--if_changed"]
    run_here(*words)
    out = tmp_path / "compare.html"
    assert capsys.readouterr().out.splitlines()[-1] == f"-> {out}, {tmp_path / 'compare.json'}"
    content = json.loads((tmp_path / "compare.json").read_text())
    assert content["runs"] == ["other", "a run"]
    roles = [file["role"] for file in content["files"]]
    assert roles[0] == "other, a run: teacher" and "other: pruned" in roles and "a run: pruned" not in roles
    assert {"other: config.yaml", "a run: metrics.csv", "a run: final/metrics.csv"} <= set(roles)
    run_here(*words)
    assert capsys.readouterr().out == f"-> {out} is up to date\n"
    (other / "metrics.csv").write_text((other / "metrics.csv").read_text() + "6,1,1,1,1,1,1,1,1,1,1,1,1,,\n")
    run_here(*words)
    assert "up to date" not in capsys.readouterr().out


def test_bad_input_is_one_line_before_anything_is_measured(run, other, script_error, monkeypatch, tmp_path):
    monkeypatch.setattr(report_data, "measure", lambda *args, **options: pytest.fail("measured"))
    monkeypatch.setattr(subjects, "hash_files", lambda *args: pytest.fail("read"))
    name = "report.py"
    assert f"{tmp_path / 'none'}: no such file or folder" in script_error(name, run, tmp_path / "none")
    assert "named twice" in script_error(name, run, other, run / "ckpts" / "..")
    assert "named twice" in script_error(name, run / "pruned.pth", other, run / "pruned.pth")
    assert "a training checkpoint" in script_error(name, run, run / "ckpts" / "last.ckpt")
    assert "no run in it" in script_error(name, run, run / "ckpts")
    assert "name an .html file" in script_error(name, run, other, "--out", tmp_path / "x.json")


def test_nothing_stale_is_compared(run, teacher_path):
    """A teacher file that holds another model now, another list, and a final model of an earlier pruned one."""
    start = {"update": 0, "settings": {"teacher": fingerprint(load_model(teacher_path)), "optim.lr": 0.001}}
    change = {"update": 2, "changed": {"optim.lr": [0.001, 0.01]}}
    pruned = load_checkpoint(run / "pruned.pth")
    step_2 = {"update": 0, "settings": {"student model": fingerprint(pruned.model, pruned.heads), "final.lr": 0.5}}

    def look(*changes: dict) -> subjects.Subject:
        for folder, history in ((run, [start, change]), (run / "final", [step_2])):
            (folder / "history.yaml").write_text(yaml.safe_dump(history))
        (found,) = subjects.look_at([run])
        return found

    found = look()
    assert found.teacher == teacher_path and not found.notes
    assert found.settings["optim.lr"] == "0.001, after update 2 0.01" and found.settings["final.lr"] == 0.5
    content = torch.load(run / "pruned.pth", weights_only=True)
    content["run"] = {"update": 4, "pruned": {"pruning.target_sparsity": 0.4, "prune.py --faithful": True}}
    torch.save(content, run / "pruned.pth")
    assert look().settings["prune.py --faithful"] and look().settings["pruning.target_sparsity"] == 0.4
    start["settings"]["valid list"], step_2["settings"]["student model"] = "2 utterances", "1" * 64
    notes = look().notes
    assert "valid.tsv holds other utterances now than a run was validated on" in notes[0]
    assert "final.pth of a run was not made of its pruned.pth" in notes[1]
    start["settings"]["teacher"] = "0" * 64
    found = look()
    assert found.teacher is None
    assert "is another teacher now than a run had: nothing is compared with it" in found.notes[0]
    (run / "history.yaml").write_text("- settings: [1]")  # for people: nothing depends on it alone
    assert subjects.look_at([run])[0].teacher == teacher_path


def test_a_model_of_another_teacher_or_objective_is_not_compared(run, teacher_path, tmp_path, tiny_flags):
    settings = {"teacher": fingerprint(load_model(teacher_path)), "objective.layer_to_layer.cos": 1.0}
    model = load_checkpoint(run / "final/final.pth")
    for name, changes in (
        ("same", {}),
        ("objective", {"objective.layer_to_layer.cos": 0.0}),
        ("teacher", {"teacher": "0"}),
    ):
        entry = {"update": 4, "history": [{"update": 0, "settings": settings | changes}]}
        save_model(tmp_path / f"{name}.pth", model.model, model.heads, run=entry)
    page = gather(run, *(tmp_path / f"{name}.pth" for name in ("same", "objective", "teacher")))
    assert [group.members for group in page.groups] == [["a run", "same"]]
    assert any(note.endswith("objective is another: objective, teacher.") for note in page.notes)
