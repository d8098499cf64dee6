"""The shell recipes on models with random weights, one of the published widths: 2 updates of each step on the CPU."""

from __future__ import annotations

import re
import signal
import subprocess
import time

import pytest
import torch
import transformers
import yaml

from distillation.data.audio import read_header
from tests.helpers import ROOT, run_here, run_shell, shell_environment, write_batches, write_noise
from wav2vec2 import load_model

SMALL = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512, "conv_dim": [64] * 7,
         "num_conv_pos_embeddings": 32}  # fmt: skip
MODELS = {
    "run_dphubert.sh": (
        transformers.HubertModel,
        transformers.HubertConfig(num_hidden_layers=4),  # HuBERT Base's widths: 38 million parameters
        {},
    ),
    "run_dpwavlm.sh": (
        transformers.WavLMModel,
        transformers.WavLMConfig(**SMALL),
        {"objective.layer_to_layer.layers": "[[0],[4,8,12]]", "teacher_width": 128},
    ),
    "run_dphubert.sh dphubert_large": (
        transformers.HubertModel,
        transformers.HubertConfig(
            **SMALL, num_hidden_layers=24, do_stable_layer_norm=True, feat_extract_norm="layer", conv_bias=True
        ),
        {"teacher_width": 128},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_recipe(server, name, corpus, tmp_path):
    python = server.bin / "cold" if name == "run_dphubert.sh" else server.bin
    kind, config, flags = MODELS[name]
    torch.manual_seed(0)
    model = kind(config)
    model.save_pretrained(tmp_path / "hf")
    before = sum(p.numel() for key, p in model.named_parameters() if "masked_spec_embed" not in key)
    del model
    exp = tmp_path / "exp"
    flags = {
        "teacher_id": tmp_path / "hf",
        "teacher_ckpt": tmp_path / "teacher.pth",
        "exp_dir": exp,
        "data.tsv_dir": tmp_path / "data",
        "data.train": "train100.tsv",
        "data.min_frames": 16000,
        "data.seconds_per_batch": 2,
        "data.valid_seconds_per_batch": 8,
        "data.num_workers": 0,
        "optim.max_steps": 2,
        "pruning.warmup_steps": 1,
        "final.max_steps": 2,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.batches_per_update": 1,
        "trainer.log_every": 1,
        "trainer.validate_every": 2,
        **flags,
    }
    script, *recipe = name.split()
    args = [corpus, *recipe, *(word for key, value in flags.items() for word in (f"--{key}", value))]
    variables = {}
    if recipe:  # batches that fit_batch.py found on an earlier start
        variables["FIT_BATCH"] = "1"
        run_here("convert_hubert_from_hf.py", "--model", tmp_path / "hf", "--out", tmp_path / "teacher.pth")
        write_batches(exp, ["--config", f"conf/{recipe[0]}.yaml", *args[2:]], 2.5, 1)
    out = run_shell(script, *args, python=python, **variables)
    if recipe:
        assert "batch.yaml is up to date" in out
    for folder in (exp, exp / "final"):
        used = yaml.safe_load((folder / "config.yaml").read_text())["data"]
        assert used["seconds_per_batch"] == (2.5 if recipe else 2)
    assert ("over all layers" in out) != bool(recipe) and "FFN units" in out  # parity of the conversion, architecture
    final = exp / "final" / "final.pth"
    model = load_model(final)
    target = 0.30 if recipe else 0.25
    assert sum(p.numel() for p in model.parameters()) / before == pytest.approx(target, abs=0.003)
    hidden, _ = model.extract_features(torch.randn(1, 16000))
    assert all(torch.isfinite(state).all() for state in hidden)
    assert (exp / "report.html").stat().st_size > 10_000

    left = [exp / "config.yaml", exp / "pruned.pth", final, exp / "report.html"]
    stamps = [path.stat().st_mtime_ns for path in left]
    for path in (exp / "pruned.pth", exp / "ckpts" / "last.ckpt"):  # content counts, not when it was written
        path.touch()
        stamps[1] = left[1].stat().st_mtime_ns
    run_shell(script, *args, python=server.bin, **variables)  # again: nothing is left to do
    assert [path.stat().st_mtime_ns for path in left] == stamps
    if recipe:
        out = run_shell(script, *args, "--pruning.target_sparsity", 0.3, code=2, python=python, **variables)
        assert "pruning.target_sparsity 0.7 -> 0.3; pruning.target_sparsity cannot change" in out and "Done" not in out
        assert [path.stat().st_mtime_ns for path in left] == stamps


def test_usage_and_errors(tmp_path):
    assert "AUDIO_DIR [RECIPE]" in run_shell("run_dphubert.sh", "--help")
    assert "AUDIO_DIR [RECIPE]" in run_shell("run_dpwavlm.sh", code=2)
    assert "there are" in run_shell("run_dphubert.sh", tmp_path, "dphubert_huge", code=2)
    assert "comes first" in run_shell("run_dphubert.sh", "--dry_run", tmp_path, code=2)


def test_help_and_settings_of_a_recipe_start_nothing(server, tmp_path):
    assert "--pruning.target_sparsity" in run_shell("run_dphubert.sh", tmp_path, "--help", python=server.bin)
    printed = run_shell("run_dphubert.sh", tmp_path, "--print_config", "--seed", 7, python=server.bin)
    assert yaml.safe_load(printed)["seed"] == 7 and not list(tmp_path.iterdir())


def test_files_are_named_from_where_the_user_is(server, tmp_path, teacher_path):
    write_noise(tmp_path / "audio" / "a" / "1.flac", 2, 0)
    write_noise(tmp_path / "audio" / "b" / "1.flac", 2, 0)
    (tmp_path / "mine.yaml").write_text("pruning: {target_sparsity: 0.5}\n")
    for flags in (("--teacher_ckpt", "../t.pth", "--config", "../mine.yaml"),
                  ("--teacher_ckpt=../t.pth", "--config=../mine.yaml")):  # fmt: skip
        (tmp_path / "t.pth").write_bytes(teacher_path.read_bytes())
        words = ["bash", str(ROOT / "scripts" / "run_dphubert.sh"), ".", *flags, "--dry_run"]
        found = subprocess.run(
            words, cwd=tmp_path / "audio", env=shell_environment(server.bin), capture_output=True, text=True
        )
        assert found.returncode == 0 and "50.0% of the teacher's" in found.stdout, found.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_plans(server, tmp_path, number):
    """Also before anything listens."""
    (tmp_path / "audio").mkdir()
    words = [
        "bash",
        str(ROOT / "scripts" / "run_dphubert.sh"),
        str(tmp_path / "audio"),
        "--exp_dir",
        str(tmp_path / "e"),
    ]
    process = subprocess.Popen(words, cwd=ROOT, env=shell_environment(), stderr=subprocess.PIPE, text=True)
    time.sleep(0.7)
    process.send_signal(number)
    printed = process.communicate(timeout=60)[1]
    assert process.returncode == 75 and "stopped: " in printed and "Traceback" not in printed
    assert not (tmp_path / "e").exists()


def test_all_that_is_wrong_is_told_before_anything_is_made(server, tmp_path):
    flags = ("--data.tsv_dir", tmp_path / "lists", "--exp_dir", tmp_path / "exp", "--trainer.accelerator", "gpu")
    printed = run_shell(
        "run_dphubert.sh", tmp_path / "none", "--teacher_id", tmp_path / "hf", *flags, code=2, python=server.bin
    )
    assert printed.count("error: ") == 3
    for message in (f"{tmp_path / 'none'}: no such folder", f"{tmp_path / 'hf'}: no such folder", "none is visible"):
        assert f"error: {message}" in printed or message in printed
    assert not list(tmp_path.iterdir())


def test_lists_of_other_audio_are_not_trained_on(server, tmp_path, teacher_path):
    other = tmp_path / "other"
    for folder in (other, tmp_path / "lists", tmp_path / "audio" / "LibriSpeech" / "train-clean-100"):
        folder.mkdir(parents=True)
    flags = ("--data.tsv_dir", tmp_path / "lists", "--exp_dir", tmp_path / "exp", "--teacher_ckpt", teacher_path)
    for name in ("train100.tsv", "valid.tsv"):
        (tmp_path / "lists" / name).write_text(f"{other}\na.flac\t32000\n")
    printed = run_shell("run_dphubert.sh", tmp_path / "audio", *flags, code=2, python=server.bin)
    message = f"train100.tsv lists audio of {other}, not of {tmp_path / 'audio'}: name another folder"
    assert message in printed and printed.count("error: ") == 1


@pytest.mark.slow
def test_any_audio_and_any_teacher(server, tmp_path):
    """44.1 kHz stereo in folders of speakers, a teacher without a recipe: nothing else is asked."""
    for i in range(6):
        write_noise(tmp_path / "audio" / f"speaker {i % 3}" / f"{i}.mp3", 1.5, i, rate=44100, channels=2)
    torch.manual_seed(0)
    config = transformers.WavLMConfig(**SMALL | {"num_hidden_layers": 4})
    transformers.WavLMModel(config).save_pretrained(tmp_path / "my-wavlm")
    exp = tmp_path / "exp"
    words = [tmp_path / "audio", "--teacher_id", tmp_path / "my-wavlm", "--teacher_ckpt", tmp_path / "teacher.pth"]
    words += ["--optim.max_steps", 2, "--final.max_steps", 2, "--exp_dir", exp, "--data.tsv_dir", tmp_path / "lists"]
    words += ["--data.num_workers", 0]

    printed = run_shell("run_dphubert.sh", *words, "--dry_run", python=server.bin)
    rows = dict(re.findall(r"^(\w[\w ]{0,8}?)  +(.*)$", printed, re.MULTILINE))
    assert rows.keys() >= {"teacher", "audio", "update", "step 1", "step 2", "memory", "measured", "result", "folders"}
    assert "2 updates" in rows["step 1"] and "25.0% of the teacher's" in rows["result"]
    assert not exp.exists() and not (tmp_path / "lists").exists() and not (tmp_path / "teacher.pth").exists()

    printed = run_shell("run_dphubert.sh", *words, python=server.bin)
    assert "derived teacher_layers 4, teacher_width 128, objective.layer_to_layer.layers [[0], [1, 3, 4]]" in printed
    assert f"Done: {exp / 'final' / 'final.pth'}" in printed
    copies = sorted((tmp_path / "lists" / "audio").rglob("*.flac"))
    assert len(copies) == 6 and {read_header(path)[1:] for path in copies} == {(16000, 1)}
    used = yaml.safe_load((exp / "recipe.yaml").read_text())
    assert used["objective"]["layer_to_layer"]["layers"] == [[0], [1, 3, 4]] and used["optim"]["max_steps"] == 2
    assert yaml.safe_load((exp / "config.yaml").read_text())["teacher_layers"] == 4
    model = load_model(exp / "final" / "final.pth")
    before = sum(p.numel() for p in load_model(tmp_path / "teacher.pth").parameters())
    assert sum(p.numel() for p in model.parameters()) / before == pytest.approx(0.25, abs=0.003)
    assert (exp / "report.html").stat().st_size > 10_000

    left = [exp / "recipe.yaml", exp / "config.yaml", exp / "final" / "final.pth", exp / "report.html", *copies]
    stamps = [path.stat().st_mtime_ns for path in left]
    run_shell("run_dphubert.sh", *words, python=server.bin)  # again: nothing is left to do
    assert [path.stat().st_mtime_ns for path in left] == stamps
