"""The stages as real processes: the whole chain, interruptions, several processes, and bad input."""

from __future__ import annotations

import csv
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from tests.helpers import ROOT, assert_same_run, metrics, weights
from wav2vec2 import load_model


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
    assert set(content) == {"state_dict", "config", "distill_linear_projs"}
    assert set(content["distill_linear_projs"]) == {f"{i}.{name}" for i in range(3) for name in ("weight", "bias")}
    model = load_model(final / "final.pth")
    assert sum(p.numel() for p in model.parameters()) == count
    assert any(not torch.equal(p, q) for p, q in zip(model.parameters(), pruned.parameters()))
    hidden, lengths = model.extract_features(torch.randn(2, 8000), torch.tensor([8000, 5000]))
    assert len(hidden) == 5 and lengths.tolist() == [24, 15]
    assert metrics(final)[-1]["valid/distill"]

    # a finished run is left as it is
    before_time = (final / "ckpts/last.ckpt").stat().st_mtime_ns
    script("final_distill.py", *tiny_flags, "--student_ckpt", reference / "pruned.pth", "--exp_dir", final)
    assert (final / "ckpts/last.ckpt").stat().st_mtime_ns == before_time


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
    run.kill(signal.SIGTERM)
    assert run.wait().code == -signal.SIGTERM


def test_checkpoint_of_another_network_is_refused(reference, script_error, tiny_flags, tmp_path):
    exp = tmp_path / "run"
    shutil.copytree(reference, exp)
    message = script_error("distill.py", *tiny_flags, "--exp_dir", exp, "--pruning.units", "[head]",
                           "--pruning.target_sparsity", 0.1, "--optim.max_steps", 20)  # fmt: skip
    assert "another network" in message and "last.ckpt" in message
    assert (exp / "config.yaml").read_text() == (reference / "config.yaml").read_text()
    message = script_error(
        "final_distill.py", *tiny_flags, "--exp_dir", exp, "--student_ckpt", reference / "pruned.pth"
    )
    assert "another network" in message  # --exp_dir of step 1 by mistake
    assert (exp / "config.yaml").read_text() == (reference / "config.yaml").read_text()


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
    (tmp_path / "cut.ckpt").write_bytes(last.read_bytes()[:5000])
    assert "truncated" in script_error("prune.py", "--distilled_ckpt", tmp_path / "cut.ckpt")


def test_final_distill_refuses(script_error, reference, tiny_flags, tmp_path):
    args = [*tiny_flags, "--exp_dir", tmp_path / "final"]
    assert "--student_ckpt" in script_error("final_distill.py", *args)
    last = reference / "ckpts/last.ckpt"
    assert "prune.py" in script_error("final_distill.py", *args, "--student_ckpt", last)
