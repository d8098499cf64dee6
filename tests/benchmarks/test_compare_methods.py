"""The comparison of methods: its distance, the sizes of its students, and a run as a process."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.compare_methods import METHODS, Comparison, Result, find_rows, settings_of, table
from benchmarks.compare_plot import draw
from benchmarks.linear_distance import Moments
from benchmarks.plots import as_svg
from benchmarks.runs import CPU_SECONDS, cpu_seconds, fit_thin, merged, read_row, scaled, used_params
from distillation.config import RECIPES, flat_settings, parse_recipe
from distillation.errors import UserError
from distillation.objectives import Objectives
from distillation.students import CopiedLayers, StudentConfig, build_student
from tests.helpers import ROOT
from wav2vec2 import load_model, save_model, wav2vec2_model


@pytest.fixture(scope="module")
def demo(tiny_config, tsv_dir, tmp_path_factory) -> Path:
    """A folder as scripts/demo.sh leaves it, with a random teacher of the demo's size."""
    torch.manual_seed(0)
    config = tiny_config | {
        "extractor_conv_layer_config": [(40, *layer[1:]) for layer in tiny_config["extractor_conv_layer_config"]],
        "encoder_embed_dim": 144,
        "encoder_num_layers": 6,
        "encoder_use_attention": [True] * 6,
        "encoder_use_feed_forward": [True] * 6,
        "encoder_num_heads": [6] * 6,
        "encoder_head_dim": 24,
        "encoder_ff_interm_features": [576] * 6,
    }
    folder = tmp_path_factory.mktemp("demo")
    save_model(folder / "teacher.pth", wav2vec2_model(**config), mask_embedding=torch.rand(144))
    (folder / "data").symlink_to(tsv_dir)
    return folder


# The distance


def test_unexplained_variance_is_that_of_a_linear_fit():
    torch.manual_seed(0)
    x, y = torch.randn(400, 6, dtype=torch.float64), torch.randn(400, 8, dtype=torch.float64)
    y[:, :4] += 2 * x[:, :4] + 3
    moments = Moments(1, 2)
    for part in (slice(0, 150), slice(150, 400)):
        moments.add([x[None, part]], [y[None, part, :4], y[None, part, 4:]], None)
    design = np.concatenate([x.numpy(), np.ones((400, 1))], axis=1)
    fit, *_ = np.linalg.lstsq(design, y.numpy(), rcond=None)
    residual = ((y.numpy() - design @ fit) ** 2).sum(0)
    expected = [residual[c].sum() / (400 * y.numpy()[:, c].var(0).sum()) for c in (slice(0, 4), slice(4, 8))]
    np.testing.assert_allclose(moments.unexplained(moments.fit())[0], expected, rtol=1e-3)
    assert expected[0] < 0.3 < 0.9 < expected[1]


def test_padding_does_not_count():
    x, y = torch.randn(2, 30, 3), torch.randn(2, 30, 4)
    valid = torch.arange(30) < torch.tensor([30, 11])[:, None]
    padded, alone = Moments(1, 1), Moments(1, 1)
    padded.add([x], [y], valid)
    alone.add([x[:1]], [y[:1]], None)
    alone.add([x[1:, :11]], [y[1:, :11]], None)
    assert padded.num_frames == alone.num_frames == 41
    torch.testing.assert_close(padded.unexplained(padded.fit()), alone.unexplained(alone.fit()))


# Sizes and recipes


NAMES = sorted(path.stem for path in METHODS.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_students_have_the_budget(demo, name, tmp_path):
    teacher = load_model(demo / "teacher.pth")
    teacher.mask_embedding = torch.zeros(144)
    budget = used_params(build_student(StudentConfig(layers=CopiedLayers()), teacher))
    (path,) = find_rows([name]).values()
    settings = settings_of(path, teacher, budget, 3, Comparison(demo=tmp_path, steps=100))
    (tmp_path / "recipe.yaml").write_text(json.dumps(settings | {"base": os.path.relpath(path, tmp_path)}))
    recipe, _ = parse_recipe(["--config", str(tmp_path / "recipe.yaml")])
    student = build_student(recipe.student, teacher)
    Objectives(recipe.objective, student, teacher)
    assert recipe.seed == 3
    if recipe.pruning.units:
        assert (1 - recipe.pruning.target_sparsity) * used_params(teacher) == pytest.approx(budget)
        assert recipe.optim.max_steps + recipe.final.max_steps == 100
    else:
        assert used_params(student) == pytest.approx(budget, rel=0.01)
        assert recipe.optim.max_steps == 100 and recipe.final is None


def test_plus_is_what_its_recipe_says():
    """The row on the demo's teacher changes in DPHuBERT what the recipe changes in the published one."""
    changed = []
    for path, base in (
        (METHODS / "plus.yaml", METHODS / "dphubert.yaml"),
        (RECIPES / "dphubert_plus.yaml", RECIPES / "dphubert_base.yaml"),
    ):
        mine, other = (flat_settings(read_row(one)) for one in (path, base))
        both = {name: mine.get(name) for name in mine.keys() | other.keys() if mine.get(name) != other.get(name)}
        both.pop("exp_dir", None)
        changed.append(both)
    assert changed[0] == changed[1]
    assert changed[0] == {"student.dropout": 0.0, "pruning.units": ["conv", "head_channel", "interm"]}


def test_thin_students_keep_the_published_shape(demo):
    teacher = load_model(demo / "teacher.pth")
    budget = used_params(build_student(StudentConfig(layers=CopiedLayers()), teacher))
    wanted = {
        name: read_row(METHODS / f"{name}.yaml").student.thin for name in ("fithubert", "starhubert", "armhubert")
    }
    thin = {name: fit_thin(one, teacher, budget) for name, one in wanted.items()}
    assert thin["fithubert"].time_reduction == 2 and thin["armhubert"].reuse_attention
    assert thin["fithubert"].width > thin["starhubert"].width  # FFN units: 1 and 2.3 times the width
    for name, student in thin.items():
        assert 0.6 < student.ffn / student.width * wanted[name].width / wanted[name].ffn < 1.6


def test_all_lengths_of_a_recipe_are_scaled_and_short_runs_move_their_masks_faster(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"base: {os.path.relpath(ROOT / 'conf' / 'demo.yaml', tmp_path)}\n"
        "optim: {max_steps: 600, warmup_steps: 60, freeze_steps: 30}\nfinal: {max_steps: 200, warmup_steps: 50}\n"
        "pruning: {warmup_steps: 450, lr_masks: 0.04, lr_lagrangian: 0.02}\n"
    )
    recipe = read_row(path)
    short, long = scaled(recipe, 80), scaled(recipe, 8000)
    assert short["optim"] == {"max_steps": 60, "warmup_steps": 6, "freeze_steps": 3}
    assert short["final"] == {"max_steps": 20, "warmup_steps": 5, "freeze_steps": 0}
    assert short["pruning"] == pytest.approx({"warmup_steps": 45, "lr_masks": 0.4, "lr_lagrangian": 0.2})
    assert long["pruning"] == pytest.approx({"warmup_steps": 4500, "lr_masks": 0.04, "lr_lagrangian": 0.02})
    assert merged({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}, {"d": 4}) == {"a": {"b": 1, "c": 3}, "d": 4}
    path.write_text("optim: {max_epochs: 3}")
    with pytest.raises(UserError, match="its length is in epochs"):
        scaled(read_row(path), 80)


def test_recipes_that_prune_nothing_have_one_step_whatever_final_says(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("optim: {max_steps: 50}\npruning: {units: []}\nfinal: {max_steps: 20}\n")
    settings = scaled(read_row(path), 1000)
    assert settings["optim"]["max_steps"] == 1000 and "final" not in settings
    path.write_text("optim: {max_steps: 50}\nfinal: {max_steps: 50000}\n")
    with pytest.raises(UserError, match="100 updates leave none for step 1"):
        scaled(read_row(path), 100)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("pruning: {cost: macs}", "pruning.cost is macs, and the students are to have as many parameters"),
        ("pruning: {units: []}\nfinal: null", "prunes nothing, and its student is the whole teacher"),
    ],
)
def test_recipes_that_cannot_have_the_size_are_refused(demo, tmp_path, content, complaint):
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(UserError, match=f"{path}: .*{complaint}"):
        settings_of(path, load_model(demo / "teacher.pth"), 400_000, 1, Comparison(demo=demo))


def test_seconds_of_all_stages_that_ran_are_added_up(tmp_path):
    assert math.isnan(cpu_seconds(tmp_path))
    (tmp_path / CPU_SECONDS).write_text("1.5 distill.py\n2.0 distill.py\n0.5 prune.py\n")
    assert cpu_seconds(tmp_path) == 4.0
    (tmp_path / CPU_SECONDS).write_text("nan distill.py\n2.0 distill.py\n0.5 prune.py\n")  # was killed
    assert math.isnan(cpu_seconds(tmp_path))


def test_table_and_plot():
    results = [
        Result(name, seed, 100, 7, 90.0, [0.1 * seed, 0.5], [0, 1]) for name in ("dphubert", "slice") for seed in (1, 2)
    ]
    results.append(Result("slice", 3, 100, 7, math.nan, [0.1, 0.5], [0, 1]))  # of what is not known, no mean
    assert "| slice | 100 | 7 | 1.5 |" in table(results) and "| slice | 100 | 7 | nan |" in table(results[-1:])
    text = table(results[:-1])
    assert "| dphubert | 100 | 7 | 1.5 | 15.0 ± 7.1 | 50.0 ± 0.0 | 32.5 ± 3.5 |" in text and text.count("\n") == 3
    figure = draw({"a": [[0.1, 0.5], [0.2, 0.4]], "b < c": [[0.3, 0.3], [0.3, 0.3]]}, 100)
    (axis,) = figure.axes
    line, band = axis.lines[0].get_xydata(), axis.collections[0].get_paths()[0].vertices
    np.testing.assert_allclose(line, [[0, 15], [1, 45]])
    assert {(0, 10), (0, 20), (1, 40), (1, 50)} <= set(map(tuple, band.round(6)))
    assert len(axis.lines) == len(axis.collections) == 2
    assert "b < c" in {text.get_text() for text in axis.get_legend().get_texts()}
    assert "100 updates, 2 seeds (bands" in axis.get_title("left") and axis.get_xlabel() == "teacher layer"
    xml.etree.ElementTree.fromstring(as_svg(figure))


# As a process


@pytest.fixture
def run(server):
    """Runs the comparison as a process, whose stages go through the server too."""

    def call(*args: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [server.bin / "python", "-m", "benchmarks.compare_methods", *map(str, args)]
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)
        assert result.returncode == code, result.stdout + result.stderr
        return result

    return call


@pytest.mark.slow
def test_two_methods_as_a_process(run, demo, tmp_path):
    other = tmp_path / "mine.yaml"
    other.write_text(f"base: {os.path.relpath(METHODS / 'starhubert.yaml', tmp_path)}\n")
    args = ["--demo", demo, "--out", tmp_path / "out", "--recipes", f"[dphubert,{other}]", "--seeds", 1, "--steps", 10]
    result = run(*args)
    assert "| dphubert | " in result.stdout and "| mine | " in result.stdout
    kept = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [row["method"] for row in kept] == ["dphubert", "mine"]
    assert all(len(row["unexplained"]) == 7 and min(row["unexplained"]) > 0 for row in kept)
    stages = (tmp_path / "out" / "dphubert" / "seed1" / CPU_SECONDS).read_text().split()[1::2]
    assert stages == ["distill.py", "prune.py", "final_distill.py"]
    assert (tmp_path / "out" / "compare.svg").is_file()
    assert run(*args).stdout == result.stdout  # nothing is trained again
    line = run(*args[:-1], 20, code=2).stderr.strip().splitlines()[-1]
    assert "made with other settings; use another --out" in line
    # nor is a finished run that of its recipe once this is another
    other.write_text(other.read_text() + "optim: {lr: 0.5}\n")
    line = run(*args, code=2).stderr.strip().splitlines()[-1]
    assert "made with other settings, optim.lr 0.001 -> 0.5; use another --out" in line


@pytest.mark.slow
def test_a_stop_reaches_the_stage_and_the_same_command_goes_on(server, demo, tmp_path):
    out = tmp_path / "out"
    words = ["-m", "benchmarks.compare_methods", "--demo", demo, "--out", out, "--recipes", "[slice]"]
    words += ["--seeds", 1, "--steps", 30]
    exp = out / "slice" / "seed1"
    process = server.start(*words)
    process.until(lambda: (exp / "log.txt").is_file() and "training data" in (exp / "log.txt").read_text())
    assert (exp / CPU_SECONDS).read_text() == "nan distill.py\n"  # as it stays if nobody is left to count
    process.kill(signal.SIGUSR1)
    stopped = process.wait()
    assert stopped.code == 75
    assert stopped.error.startswith(f"stopped: SIGUSR1: the runs, also the one that was training, are in {out}; the ")
    assert not (exp / "final.pth").exists()  # the stage, for which the command waits, has stopped too
    assert (exp / CPU_SECONDS).read_text().endswith(" distill.py\n") and not math.isnan(cpu_seconds(exp))  # it counts
    assert "| slice |" in server.run(*words).stdout
    assert (exp / "final.pth").is_file() and not list(exp.glob(".*"))


def test_mistakes_are_one_line(run, demo, tmp_path):
    assert (
        "no recipe 'hubert'; give a path that ends in .yaml, or one of all_layers,"
        in run("--demo", demo, "--recipes", "[hubert]", code=2).stderr
    )
    assert "--recipes is empty" in run("--demo", demo, "--recipes", "[]", code=2).stderr
    assert "--num_params is 0: it must be at least 1" in run("--demo", demo, "--num_params", 0, code=2).stderr
    assert "two of them are named 'slice'" in run("--demo", demo, "--recipes", "[slice,slice]", code=2).stderr
    assert "leave it out of --recipes" in run("--demo", demo, "--num_params", 400_000, code=2).stderr
    assert "run scripts/demo.sh" in run("--demo", tmp_path, code=2).stderr
