"""The shell recipes on models with random weights, one of the published size: 2 updates of each step on the CPU."""

from __future__ import annotations

import pytest
import torch
import transformers
import yaml

from tests.helpers import run_here, run_shell, write_batches
from wav2vec2 import load_model

SMALL = {"hidden_size": 128, "num_attention_heads": 4, "intermediate_size": 512, "conv_dim": [64] * 7,
         "num_conv_pos_embeddings": 32}  # fmt: skip
MODELS = {
    "run_dphubert.sh": (
        transformers.HubertModel,
        transformers.HubertConfig(),  # HuBERT Base
        {"objective.layer_to_layer.layers": "[[0],[4,8,12]]"},
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
    run_shell(script, *args, python=python, **variables)  # again: nothing is left to do
    assert [path.stat().st_mtime_ns for path in left] == stamps
    if recipe:
        out = run_shell(script, *args, "--pruning.target_sparsity", 0.3, code=2, python=python, **variables)
        assert "pruning.target_sparsity 0.7 -> 0.3; pruning.target_sparsity cannot change" in out and "Done" not in out
        assert [path.stat().st_mtime_ns for path in left] == stamps


def test_usage_and_errors(tmp_path):
    assert "LIBRISPEECH_DIR [RECIPE]" in run_shell("run_dphubert.sh", "--help")
    assert "LIBRISPEECH_DIR [RECIPE]" in run_shell("run_dpwavlm.sh", code=2)
    assert "no such folder" in run_shell("run_dphubert.sh", tmp_path / "none", code=2)
    assert "there are" in run_shell("run_dphubert.sh", tmp_path, "dphubert_huge", code=2)


def test_lists_of_other_audio_are_not_trained_on(server, tmp_path):
    other = tmp_path / "other"
    for folder in (other, tmp_path / "lists", tmp_path / "audio" / "LibriSpeech"):
        folder.mkdir(parents=True)
    flags = ("--data.tsv_dir", tmp_path / "lists", "--teacher_ckpt", tmp_path / "none.pth", "--teacher_id", tmp_path)
    for root, refused in ((other, True), (tmp_path / "audio", False), (tmp_path / "audio" / "LibriSpeech", False)):
        for name in ("train960.tsv", "valid.tsv"):
            (tmp_path / "lists" / name).write_text(f"{root}\n")
        printed = run_shell("run_dphubert.sh", tmp_path / "audio", *flags, code=2, python=server.bin)
        message = f"train960.tsv lists audio of {other}, not of {tmp_path / 'audio'}: remove"
        assert (message in printed) == refused and printed.count("error: ") == 1
