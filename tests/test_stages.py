"""The stages as real processes: the whole chain, interruptions, several processes, and bad input."""

from __future__ import annotations

import csv
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from distillation.budget import Budget
from tests.configs import first_layers
from tests.helpers import ROOT, assert_same_run, assert_same_tensors, copy_lists, metrics, run_here, weights
from tests.latency import write_latency
from wav2vec2 import load_model, save_model
from wav2vec2.architecture import architecture
from wav2vec2.checkpoint import load_checkpoint


def test_chain(reference, script, tiny_flags, teacher_path, tmp_path):
    last, pruned_path = reference / "ckpts/last.ckpt", tmp_path / "pruned.pth"
    result = script("prune.py", "--distilled_ckpt", last, "--out", pruned_path)
    pruned = load_model(pruned_path)
    before = sum(p.numel() for p in load_model(teacher_path).parameters())
    count = sum(p.numel() for p in pruned.parameters())
    # the largest unit of this teacher is a head: 4 * 24 * 6 + 3 * 6 weights
    assert abs(count - 0.7 * before) <= 4 * 24 * 6 + 3 * 6 + 24
    assert f"{count:,} parameters" in result.stdout
    assert "the target is 0.3000: the ranking decides" in result.stderr  # 12 updates do not get there
    near = script("prune.py", "--distilled_ckpt", last, "--out", tmp_path / "near.pth",
                  "--target_sparsity", re.search(r"step 1 ended at sparsity ([\d.]+)", result.stderr)[1])  # fmt: skip
    assert "the ranking decides" not in near.stderr

    script("prune.py", "--distilled_ckpt", last, "--out", tmp_path / "rule.pth", "--faithful")
    by_rule = sum(p.numel() for p in load_model(tmp_path / "rule.pth").parameters())
    assert by_rule != count

    final = reference / "final"
    content = torch.load(final / "final.pth", weights_only=True)
    assert set(content) == {"state_dict", "config", "distill_linear_projs", "run"}
    assert content["run"]["update"] == 6 and content["run"]["student"]["update"] == 12
    assert set(content["distill_linear_projs"]) == {f"{i}.{name}" for i in range(3) for name in ("weight", "bias")}
    model = load_model(final / "final.pth")
    assert sum(p.numel() for p in model.parameters()) == count
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), pruned.parameters()))
    hidden, lengths = model.extract_features(torch.randn(2, 8000), torch.tensor([8000, 5000]))
    assert len(hidden) == 5 and lengths.tolist() == [24, 15]
    assert metrics(final)[-1]["valid/distill"]

    # a finished run is left as it is
    files = [reference / "pruned.pth", *(final / name for name in ("ckpts/last.ckpt", "final.pth", "config.yaml"))]
    before_times = [path.stat().st_mtime_ns for path in files]
    again = script("final_distill.py", *tiny_flags, "--student_ckpt", reference / "pruned.pth", "--exp_dir", final)
    assert "final is complete: it has made all of its 6 updates" in again.stderr
    assert "pruned.pth is up to date" in script("prune.py", "--distilled_ckpt", last).stderr
    script("final_distill.py", *tiny_flags, "--student_ckpt", reference / "pruned.pth", "--exp_dir", final,
           "--trainer.log_every", 3)  # fmt: skip  # nothing ran with it
    assert [path.stat().st_mtime_ns for path in files] == before_times


def test_run_folder(reference):
    assert (reference / "config.yaml").is_file() and list(reference.glob("events.out.tfevents.*"))
    rows = metrics(reference)
    assert [int(row["step"]) for row in rows] == [2, 4, 6, 8, 10, 12]
    assert [bool(row["valid/distill"]) for row in rows] == [False, True, False, True, False, True]
    assert float(rows[0]["sparsity/target"]) == pytest.approx(0.1)
    assert float(rows[-1]["sparsity/target"]) == pytest.approx(0.3)
    assert {"train/l1", "train/cos", "train/loss", "lagrangian/lambda1", "lr/weights", "lr/log_alpha"} <= rows[0].keys()
    checkpoint = torch.load(reference / "ckpts/last.ckpt", weights_only=True)
    prefixes = {key.split(".")[0] for key in checkpoint["state_dict"]}
    assert prefixes == {"student", "objectives", "lagrangian"}, "the teacher must not be in checkpoints"


def test_resolved_recipe_repeats_the_run(reference, script, tmp_path):
    result = script("distill.py", "--config", reference / "config.yaml", "--exp_dir", tmp_path / "again")
    assert "FFN units" in result.stdout and "expected:" in result.stdout
    assert result.stderr.count("s of audio per second, training takes") == 1
    assert_same_run(reference, tmp_path / "again")


def test_two_processes_equal_accumulation(reference, script, tiny_flags, tmp_path):
    script("distill.py", *tiny_flags, "--exp_dir", tmp_path / "ddp", "--trainer.devices", 2)
    assert metrics(tmp_path / "ddp") == metrics(reference)
    left, right = weights(tmp_path / "ddp/ckpts/last.ckpt"), weights(reference / "ckpts/last.ckpt")
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=1e-6)


def test_channels_of_heads_one_by_one(script, tiny_flags, teacher_path, tmp_path):
    """All stages, on one process and on two."""
    flags = [*tiny_flags, "--pruning.units", "[conv,head_channel,interm]"]
    one, two = tmp_path / "one", tmp_path / "two"
    printed = script("distill.py", *flags, "--exp_dir", one).stdout
    assert "their channels" in printed
    script("distill.py", *flags, "--exp_dir", two, "--trainer.devices", 2)
    assert metrics(two) == metrics(one)
    left, right = (weights(exp / "ckpts/last.ckpt") for exp in (one, two))
    assert sum("_channels.log_alpha" in name for name in left) == 8
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-5, atol=1e-6)
    script("prune.py", "--distilled_ckpt", one / "ckpts/last.ckpt")
    script("final_distill.py", *flags, "--student_ckpt", one / "pruned.pth", "--exp_dir", one / "final")
    final, before = (
        load_model(one / "final" / "final.pth"),
        sum(p.numel() for p in load_model(teacher_path).parameters()),
    )
    assert (
        0 <= 0.7 * before - sum(p.numel() for p in final.parameters()) < 4 * 24 + 3 + 2
    )  # a query with its key, and a value
    assert len({tuple(pair) for layer in final.config["encoder_head_channels"] for pair in layer}) > 1


def test_workers_change_nothing(reference, script, tiny_flags, tmp_path):
    script("distill.py", *tiny_flags, "--exp_dir", tmp_path / "workers", "--data.num_workers", 2)
    assert_same_run(reference, tmp_path / "workers")
    with (tmp_path / "workers" / "metrics.csv").open(newline="") as file:
        rates = [float(row["speed/loader_audio_seconds_per_second"]) for row in csv.DictReader(file)]
    assert min(rates) > 0


def test_recompute_changes_nothing(reference, script, tiny_flags, tmp_path):
    script("distill.py", *tiny_flags, "--exp_dir", tmp_path / "again", "--trainer.recompute", "true")
    assert_same_run(reference, tmp_path / "again")


def test_killed_run_resumes_exactly(reference, tiny_flags, tmp_path, script):
    """From a Python of its own, with another order of sets than the other runs."""
    exp = tmp_path / "killed"
    args = ["distill.py", *tiny_flags, "--exp_dir", exp, "--trainer.checkpoint_every", 1]
    process = subprocess.Popen([sys.executable, *map(str, args)], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (exp / "ckpts/last.ckpt").is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped_at = torch.load(exp / "ckpts/last.ckpt", weights_only=True)["global_step"]
    assert 0 < stopped_at < 12, "the run ended before it could be killed"
    script(*args)
    assert_same_run(reference, exp)


def test_a_stop_while_other_machines_are_awaited(server, tiny_flags, tmp_path):
    """Nothing is there to be saved yet, and nobody would ever look at a note that a signal came."""
    run = server.start("distill.py", *tiny_flags, "--exp_dir", tmp_path / "run", "--trainer.num_nodes", 2)
    run.until(lambda: "micro-batches each per update" in run.logs[1].read_text())
    time.sleep(3)
    run.kill(signal.SIGUSR1)
    finished = run.wait()
    assert finished.code == 75 and finished.error == "stopped: SIGUSR1: all that was saved stays; run it again"


def left_as_it_was(exp, reference):
    """Nothing that did not run is recorded."""
    names = ["config.yaml", "history.yaml", "metrics.csv", "ckpts/last.ckpt"]
    return all((exp / name).read_bytes() == (reference / name).read_bytes() for name in names)


def test_another_run_in_the_same_folder_is_refused(reference, script_error, tiny_flags, corpus, teacher_path, tmp_path):
    exp = tmp_path / "run"
    shutil.copytree(reference, exp)
    step_1 = ["distill.py", *tiny_flags, "--exp_dir", exp]
    other = load_model(teacher_path)
    with torch.no_grad():
        other.encoder.transformer.layers[0].attention.q_proj.weight[0, 0] += 1
    save_model(tmp_path / "other.pth", other)
    copy_lists(Path(tiny_flags[tiny_flags.index("--data.tsv_dir") + 1]), corpus, tmp_path)
    lines = (tmp_path / "train100.tsv").read_text().splitlines()
    (tmp_path / "train100.tsv").write_text("\n".join(lines[:-1]) + "\n")
    for changes, said in (
        (["--teacher_ckpt", tmp_path / "other.pth", "--seed", 7], ["teacher ", "seed 2022 -> 7; "]),
        (["--data.tsv_dir", tmp_path], ["train list 14 utterances of 0.01 h, ", " -> 13 utterances of 0.01 h, "]),
        (["--pruning.target_sparsity", 0.2, "--optim.max_steps", 20], ["pruning.target_sparsity 0.3 -> 0.2"]),
        (["--objective.layer_to_layer.cos", 2], ["objective.layer_to_layer.cos 1.0 -> 2.0"]),
    ):
        for on_request in ([], ["--continue_with_changes"]):
            message = script_error(*step_1, *changes, *on_request)
            assert "last.ckpt is of a run with other settings: " in message and "use another --exp_dir" in message
            assert all(words in message for words in said)
    assert "optim.max_steps 12 -> 20; to go on with the new ones after update 12 give --continue_with_changes" in (
        script_error(*step_1, "--optim.max_steps", 20)
    )
    assert "stands at update 12, after the last of 5" in script_error(
        *step_1, "--optim.max_steps", 5, "--continue_with_changes"
    )
    assert left_as_it_was(exp, reference)
    message = script_error("final_distill.py", *tiny_flags, "--exp_dir", exp, "--student_ckpt", exp / "pruned.pth")
    assert "cannot change in the middle of a run: " in message  # --exp_dir of step 1 by mistake
    assert "student model " in message
    assert left_as_it_was(exp, reference)


def test_changes_on_request_take_effect(reference, script, tiny_flags, tmp_path):
    """They are used from the next update on, and the folder says which ran when."""
    exp = tmp_path / "run"
    shutil.copytree(reference, exp)
    changes = ["--optim.max_steps", 16, "--optim.lr", 0.02, "--trainer.log_every", 1, "--continue_with_changes"]
    result = script("distill.py", *tiny_flags, "--exp_dir", exp, *changes)
    assert (
        "after update 12: optim.max_steps 12 -> 16; optim.lr 0.001 -> 0.02; trainer.log_every 2 -> 1" in result.stderr
    )
    assert "the last of 16 updates is made" in result.stderr
    rows = {int(row["step"]): row for row in metrics(exp)}
    for step in range(13, 17):
        assert float(rows[step]["lr/weights"]) == pytest.approx(0.02 * (16 - (step - 1)) / 14)
    assert float(rows[12]["lr/weights"]) == pytest.approx(0.001 * (12 - 11) / 10)  # what the update had, not the next
    checkpoint = torch.load(exp / "ckpts/last.ckpt", weights_only=True)
    assert checkpoint["lr_schedulers"][0]["base_lrs"][:2] == [0.02, 0.02]
    history = yaml.safe_load((exp / "history.yaml").read_text())
    assert history == checkpoint["run"]["history"] and [entry["update"] for entry in history] == [0, 12]
    used = yaml.safe_load((exp / "config.yaml").read_text())
    assert used["optim"]["lr"] == 0.02 and history[0]["settings"]["optim.lr"] == 0.001
    # without the changes it is another run now
    assert "optim.lr 0.02 -> 0.001" in script("distill.py", *tiny_flags, "--exp_dir", exp, code=2).error


def test_stages_take_what_belongs_to_their_recipe(reference, script_error, server, tiny_flags, tmp_path):
    final = ["final_distill.py", *tiny_flags, "--exp_dir", tmp_path / "final", "--student_ckpt"]
    message = script_error(*final, reference / "pruned.pth", "--pruning.target_sparsity", 0.5)
    assert "pruned.pth was made by another recipe: pruning.target_sparsity 0.3 -> 0.5; run distill.py" in message
    other = tmp_path / "pruned.pth"
    run_here("prune.py", "--distilled_ckpt", reference / "ckpts/last.ckpt", "--out", other, "--target_sparsity", 0.2)
    assert "pruning.target_sparsity 0.2 -> 0.3" in script_error(*final, other)
    exp = tmp_path / "run"
    shutil.copytree(reference, exp)
    shutil.copy(other, exp / "pruned.pth")
    message = script_error(
        "final_distill.py", *tiny_flags, "--exp_dir", exp / "final", "--student_ckpt", exp / "pruned.pth",
        "--continue_with_changes",
    )  # fmt: skip
    assert "student model cannot change in the middle of a run" in message and f"move {exp / 'final'} away" in message
    assert left_as_it_was(exp / "final", reference / "final")
    message = script_error(
        "final_distill.py", *tiny_flags, "--exp_dir", exp / "final", "--final", "null", "--student_ckpt",
        reference / "pruned.pth",
    )  # fmt: skip
    assert "holds a run, and this recipe has no step 2" in message
    assert "run distill.py, then prune.py first" in script_error(*final, tmp_path / "none" / "pruned.pth")
    (exp / "pruned.pth").unlink()
    message = script_error(*final, exp / "pruned.pth")
    assert f"no such file; run prune.py --distilled_ckpt {exp / 'ckpts/last.ckpt'} first" in message
    assert "run distill.py first" in script_error("prune.py", "--distilled_ckpt", tmp_path / "ckpts" / "last.ckpt")


def test_prune_waits_for_the_end_of_step_1(server, script_error, tiny_flags, tmp_path):
    last = tmp_path / "run/ckpts/last.ckpt"
    server.run("distill.py", *tiny_flags, "--exp_dir", tmp_path / "run", fault=["SIGTERM", "update", 4], code=75)
    message = script_error("prune.py", "--distilled_ckpt", last)
    assert "stands at update 5 of 12: run distill.py to its end first, or give --unfinished" in message
    run_here("prune.py", "--distilled_ckpt", last, "--unfinished")
    pruned = tmp_path / "run/pruned.pth"
    assert load_checkpoint(pruned).extra["run"]["update"] == 5
    message = script_error("final_distill.py", *tiny_flags, "--exp_dir", tmp_path, "--student_ckpt", pruned)
    assert "pruned.pth was made by another recipe: updates of step 1 5 -> 12" in message


def multiples(path: Path, multiple_of: int) -> bool:
    found = architecture(load_model(path).config)
    return all(n % multiple_of == 0 for n in [*found.conv, *found.interm])


@pytest.mark.parametrize("cost", ["macs", "milliseconds"])
def test_other_budgets(cost, server, script_error, tiny_flags, tiny_config, tmp_path):
    """Through all stages; a run that was killed is one that never was, and what makes a budget cannot change in it."""
    table, exp = write_latency(tmp_path / "latency.json", tiny_config), tmp_path / "killed"
    asked = {
        "macs": ["--pruning.target", "7MMACs", "--pruning.macs_seconds", 3],
        "milliseconds": ["--pruning.latency", table, "--pruning.target", "45ms", "--pruning.multiple_of", 4],
    }[cost]
    flags = [*tiny_flags, "--pruning.cost", cost, *asked, "--optim.max_steps", 4, "--final.max_steps", 1,
             "--trainer.log_every", 1, "--trainer.checkpoint_every", 1]  # fmt: skip
    server.run("distill.py", *flags, "--exp_dir", exp, fault=["kill", "update", 2], code=-signal.SIGKILL)
    run = server.run("distill.py", *flags, "--exp_dir", exp)
    target = {"macs": "0.007 GMACs (3 s)", "milliseconds": "45 ms"}[cost]
    assert f"budget: {target} of the teacher's" in run.stderr and f"; target {target}, 0." in run.stdout
    assert re.search(rf"cost=[\d.]+ {re.escape(target.partition(' ')[2])}", run.stderr)
    server.run("distill.py", *flags, "--exp_dir", tmp_path / "whole")
    assert_same_run(tmp_path / "whole", exp)
    last, pruned = exp / "ckpts/last.ckpt", exp / "pruned.pth"
    budget = Budget.read(torch.load(last, weights_only=True)["budget"], last)
    row = metrics(exp)[-1]
    assert budget.sparsity_of(float(row[f"cost/{cost}"])) == pytest.approx(float(row["sparsity/expected"]), abs=1e-6)

    for changes, named in (
        (["--pruning.cost", "params", "--pruning.target", "null"], f"pruning.cost {cost} -> params"),
        (["--pruning.multiple_of", 8], f"pruning.multiple_of {4 if cost == 'milliseconds' else 1} -> 8"),
    ):
        message = script_error("distill.py", *flags, *changes, "--exp_dir", exp, "--continue_with_changes")
        assert named in message and "cannot change in the middle of a run" in message
    if cost == "milliseconds":
        write_latency(table, tiny_config, factor=1.01)
        message = script_error("distill.py", *flags, "--exp_dir", exp, "--continue_with_changes")
        assert "latency table " in message and "cannot change in the middle of a run" in message
        write_latency(table, first_layers(tiny_config, 3))
        message = script_error("distill.py", *flags, "--exp_dir", tmp_path / "none")
        assert "latency.json is of another model (encoder_num_layers 3, not 4)" in message
        table.unlink()  # a checkpoint has what prune.py needs

    run_here("prune.py", "--distilled_ckpt", last)
    found = budget.cost(load_model(pruned)).item()
    assert 0.97 * budget.target < found <= budget.target and multiples(pruned, 4) == (cost == "milliseconds")
    others = {"--target": {"macs": "6MMACs", "milliseconds": "40ms"}[cost], "--multiple_of": 3}
    run_here("prune.py", "--distilled_ckpt", last, "--out", tmp_path / "other.pth", *sum(others.items(), ()))
    found = budget.cost(load_model(tmp_path / "other.pth")).item()
    wanted = {"macs": 6e6, "milliseconds": 40}[cost]
    assert 0.97 * wanted < found <= wanted and multiples(tmp_path / "other.pth", 3)
    run_here("prune.py", "--distilled_ckpt", last, "--out", tmp_path / "multiples.pth", "--multiple_of", 2)
    final = ["final_distill.py", *flags, "--exp_dir", exp / "final", "--student_ckpt"]
    message = script_error(*final, tmp_path / "multiples.pth")
    assert f"was made by another recipe: pruning.multiple_of 2 -> {4 if cost == 'milliseconds' else 1}; run" in message
    assert f"pruning.target {others['--target']} -> " in script_error(*final, tmp_path / "other.pth")
    server.run(*final, pruned)
    assert budget.cost(load_model(exp / "final/final.pth")) == budget.cost(load_model(pruned))


def test_checkpoints_of_older_versions_are_pruned(reference, tmp_path):
    """They say how many parameters the teacher has, and their recipe which share of these goes."""
    content = torch.load(reference / "ckpts/last.ckpt", weights_only=True)
    content["num_params_before"] = int(content.pop("budget")["before"])
    recipe = yaml.safe_load(content["recipe"])
    for name in ("cost", "target", "macs_seconds", "latency", "multiple_of"):
        del recipe["pruning"][name]
    (tmp_path / "ckpts").mkdir()
    torch.save({**content, "recipe": yaml.safe_dump(recipe)}, tmp_path / "ckpts/last.ckpt")
    run_here("prune.py", "--distilled_ckpt", tmp_path / "ckpts/last.ckpt")
    assert_same_tensors(weights(tmp_path / "pruned.pth"), weights(reference / "pruned.pth"))


def test_no_step_2(reference, script, tiny_flags, tmp_path):
    script("prune.py", "--distilled_ckpt", reference / "ckpts/last.ckpt", "--out", tmp_path / "pruned.pth")
    script("final_distill.py", *tiny_flags, "--final", "null", "--student_ckpt", tmp_path / "pruned.pth",
           "--exp_dir", tmp_path / "final")  # fmt: skip
    load_model(tmp_path / "final" / "final.pth")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--teacher_ckpt", "nowhere.pth"], "nowhere.pth: no such file"),
        (["--teacher_layers", 12], "layers 4, but the recipe is for a teacher of layers 12"),
        (["--teacher_width", 768], "width 24, but the recipe is for a teacher of width 768"),
        (["--objective.layer_to_layer.layers", "[[0],[4,8]]"], "layers [8], but the teacher has layers 0 to 4"),
        (["--objective.layer_to_layer", "null"], "sets no objective"),
        (["--pruning.units", "[conv,neuron]"], "unknown unit 'neuron', choose from conv, head"),
        (["--pruning.target_sparsity", 1.0], "target_sparsity is 1.0"),
        (["--pruning.target_sparsity", -0.1], "target_sparsity is -0.1"),
        (["--pruning.nothing", 1], "--pruning.nothing"),
        (["--pruning.units", "[head]", "--pruning.target_sparsity", 0.75], "without any head units"),
        (["--pruning.target", "0.2k"], "the target is 200 parameters, a sparsity of 0.9909: without any conv, head"),
        (["--pruning.target", "30k"], "pruning.target is 30k: the teacher has 21,948 parameters, there is nothing to"),
        (["--pruning.target", 500], "pruning.target is 500, and its unit is missing: write 23.6M (parameters), 500GM"),
        (["--pruning.target", "35ms"], "pruning.cost is params: set --pruning.cost milliseconds"),
        (["--pruning.cost", "macs", "--pruning.target", "1TMACs"], "the teacher has 1.666 GMACs (SUPERB), there is"),
        (["--pruning.cost", "macs", "--pruning.target_sparsity", 0.999], "units 0.001001 GMACs (10 s) of 0.07419 GM"),
        # each convolution keeps one multiple: with 12 channels of 12 nothing is left to give
        (
            ["--pruning.units", "[conv]", "--pruning.target_sparsity", 0.05, "--pruning.multiple_of", 12],
            "any conv units",
        ),
        (["--pruning.cost", "milliseconds"], "name the table by --pruning.latency"),
        (["--pruning.cost", "milliseconds", "--pruning.latency", "none.json"], "none.json: no such latency table"),
        (["--optim.clip", 0], "clip is 0.0: it must be positive, or null for no clipping"),
        (["--objective.layer_to_layer.l1", 0, "--objective.layer_to_layer.cos", 0], "every weight of the"),
        (["--trainer.accelerator", "gpu"], "asks for a GPU"),
        (["--trainer.devices", 3], "do not spread evenly over 3 processes"),
        (["--data.train", "none.tsv"], "none.tsv"),
        (["--data.min_frames", 100000, "--data.max_frames", 200000], "none of the 14 utterances"),
        (["--data.seconds_per_batch", 1], "seconds_per_batch"),
        (["--config", "conf/none.yaml"], "no such recipe; those in conf/ are"),
    ],
)
def test_bad_input(flags, message, script_error, tiny_flags, tmp_path):
    assert message in script_error("distill.py", *tiny_flags, "--exp_dir", tmp_path / "run", *flags)
    assert not list(tmp_path.rglob("*.ckpt")) and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("trouble", ["missing", "corrupt", "rate", "stereo"])
def test_bad_audio(trouble, script_error, tiny_flags, corpus, noise, tmp_path):
    data = tmp_path / "corpus"
    shutil.copytree(corpus / "dev-clean", data)
    bad = sorted(data.rglob("*.flac"))[1]
    frames = {path: int(path.stat().st_size > 0) for path in data.rglob("*.flac")}
    lines = [f"{path.relative_to(data)}\t16000" for path in sorted(frames)]
    (tmp_path / "train.tsv").write_text("\n".join([str(data), *lines]) + "\n")
    if trouble == "missing":
        bad.unlink()
    elif trouble == "corrupt":
        bad.write_bytes(b"not audio at all")
    else:
        noise(bad, 1.5, 0, rate=8000 if trouble == "rate" else 16000, channels=2 if trouble == "stereo" else 1)
    shutil.copy(tmp_path / "train.tsv", tmp_path / "valid.tsv")
    message = script_error("distill.py", *tiny_flags, "--exp_dir", tmp_path / "run", "--data.tsv_dir", tmp_path,
                           "--data.train", "train.tsv")  # fmt: skip
    assert str(bad) in message


def test_prune_refuses(script_error, reference, teacher_path, tmp_path):
    assert "no such file" in script_error("prune.py", "--distilled_ckpt", tmp_path / "none.ckpt")
    assert "not a checkpoint of step 1" in script_error("prune.py", "--distilled_ckpt", teacher_path)
    last, out = reference / "ckpts/last.ckpt", tmp_path / "x.pth"
    message = script_error("prune.py", "--distilled_ckpt", last, "--out", out, "--target_sparsity", 0.999)
    assert "no choice of units" in message and not out.exists()
    for flags, said in (
        (["--target", "500"], "--target is 500, and its unit is missing"),
        (["--target", "35ms"], "--target is 35ms, and pruning.cost is params"),
        (["--target", "300 params"], "no choice of units gives 300 parameters: pruning everything leaves "),
        (["--target", "30k"], "--target 30k: the teacher has 21,948 parameters"),
        (["--target", "15k", "--target_sparsity", 0.3], "--target and --target_sparsity are two ways to say one thing"),
        (["--target_sparsity", 1], "--target_sparsity 1.0: it must lie in [0, 1)"),
        (["--faithful", "--multiple_of", 8], "--faithful keeps the rule per layer: leave --multiple_of out"),
        (["--multiple_of", 0], "--multiple_of 0: it must be at least 1"),
    ):
        assert said in script_error("prune.py", "--distilled_ckpt", last, "--out", out, *flags) and not out.exists()
    (tmp_path / "cut.ckpt").write_bytes(last.read_bytes()[:5000])
    assert "truncated" in script_error("prune.py", "--distilled_ckpt", tmp_path / "cut.ckpt")


def test_final_distill_refuses(script_error, reference, tiny_flags, tmp_path):
    args = [*tiny_flags, "--exp_dir", tmp_path / "final"]
    assert "--student_ckpt" in script_error("final_distill.py", *args)
    last = reference / "ckpts/last.ckpt"
    assert "prune.py" in script_error("final_distill.py", *args, "--student_ckpt", last)
