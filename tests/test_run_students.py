"""scripts/run_students.sh: from a folder of audio and a Hugging Face teacher to the file and the report."""

from __future__ import annotations

import pytest
import torch
import transformers
import yaml

from tests.helpers import run_here, run_shell, write_batches
from wav2vec2 import load_model


@pytest.mark.slow
def test_from_audio_to_report(server, corpus, tmp_path):
    """ARMHuBERT, whose teacher must bring its mask embedding along."""
    torch.manual_seed(0)
    config = transformers.HubertConfig(
        hidden_size=32,
        num_hidden_layers=12,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=[8] * 7,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
    )
    transformers.HubertModel(config).save_pretrained(tmp_path / "hf")
    flags = {
        "teacher_id": tmp_path / "hf",
        "teacher_ckpt": tmp_path / "teacher.pth",
        "teacher_width": 32,
        "exp_dir": tmp_path / "exp",
        "data.tsv_dir": tmp_path / "data",
        "data.min_frames": 16000,
        "data.num_workers": 0,
        "student.thin.width": 16,
        "student.thin.channels": "[4,8,16]",
        "student.thin.heads": 2,
        "student.thin.ffn": 16,
        "optim.max_epochs": 2,
        "trainer.accelerator": "cpu",
        "trainer.precision": "32-true",
        "trainer.batches_per_update": 1,
        "trainer.log_every": 1,
    }
    args = ["armhubert_s_100h", corpus, *(word for key, value in flags.items() for word in (f"--{key}", value))]
    run_here("convert_hubert_from_hf.py", "--model", tmp_path / "hf", "--out", tmp_path / "teacher.pth")
    write_batches(tmp_path / "exp", ["--config", "conf/armhubert_s_100h.yaml", *args[2:]], 2.5, 2)
    out = run_shell("run_students.sh", *args, python=server.bin, FIT_BATCH="1")
    used = yaml.safe_load((tmp_path / "exp" / "config.yaml").read_text())
    assert (used["data"]["seconds_per_batch"], used["trainer"]["batches_per_update"]) == (2.5, 2)
    final = tmp_path / "exp" / "final.pth"
    assert f"Done: {final}" in out and "batch.yaml is up to date" in out
    model = load_model(final)
    assert model.config["encoder_reuse_attention"] == [False, True] * 6
    assert (tmp_path / "exp" / "report.html").stat().st_size > 10_000
    stamp = final.stat().st_mtime_ns
    run_shell("run_students.sh", *args, python=server.bin, FIT_BATCH="1")  # again: nothing is left to do
    assert final.stat().st_mtime_ns == stamp
    without = run_shell("run_students.sh", *args, code=2, python=server.bin)
    assert "update cannot change in the middle of a run" in without  # batch.yaml cut it in another way


def test_usage_and_unknown_names(tmp_path):
    assert "NAME LIBRISPEECH_DIR" in run_shell("run_students.sh", "--help")
    assert "NAME LIBRISPEECH_DIR" in run_shell("run_students.sh", "fithubert", code=2)
    names = run_shell("run_students.sh", "fithuber", tmp_path, code=2)
    assert "no such recipe; there are" in names and "starhubert_xs.yaml" in names
    assert "no such folder" in run_shell("run_students.sh", "fithubert", tmp_path / "none", code=2)
