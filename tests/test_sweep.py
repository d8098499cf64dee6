"""A sweep as typed: a run per value in its own folder, one page, and nothing twice."""

from __future__ import annotations

import json

import pytest
import yaml

from tests.helpers import run_shell
from wav2vec2.checkpoint import load_checkpoint


@pytest.mark.slow
def test_sweep(server, tiny_flags, corpus, tmp_path):
    exp = tmp_path / "sweep"
    flags = dict(zip(tiny_flags[::2], tiny_flags[1::2]))
    flags |= {
        "--exp_dir": exp,
        "--pruning.target_sparsity": "[0.2,0.3]",
        "--optim.max_steps": 4,
        "--final.max_steps": 2,
    }
    flags |= {"--pruning.warmup_steps": 2, "--optim.warmup_steps": 1, "--final.warmup_steps": 1}
    recipe = flags.pop("--config").stem
    words = [corpus, recipe, *(word for pair in flags.items() for word in pair)]
    out = run_shell("sweep.sh", *words, python=server.bin)
    runs = [exp / "target_sparsity=0.2", exp / "target_sparsity=0.3"]
    assert sorted(path for path in exp.iterdir() if path.is_dir()) == runs
    sparsities = []
    for run in runs:
        checkpoint = load_checkpoint(run / "final/final.pth")
        settings = checkpoint.extra["run"]["student"]["history"][0]["settings"]
        sparsities.append(settings["pruning.target_sparsity"])
        assert yaml.safe_load((run / "config.yaml").read_text())["exp_dir"] == str(run)
    assert sparsities == [0.2, 0.3]
    numbers = json.loads((exp / "compare.json").read_text())
    assert str(exp / "compare.html") in out
    assert numbers["settings"] == {"pruning.target_sparsity": {run.name: s for run, s in zip(runs, sparsities)}}

    left = [run / name for run in runs for name in ("ckpts/last.ckpt", "pruned.pth", "final/final.pth", "report.html")]
    left.append(exp / "compare.html")
    stamps = [path.stat().st_mtime_ns for path in left]
    assert "compare.html is up to date" in run_shell("sweep.sh", *words, python=server.bin)
    assert [path.stat().st_mtime_ns for path in left] == stamps


def test_mistakes_are_told_at_the_start(server, tmp_path):
    assert "AUDIO_DIR RECIPE" in run_shell("sweep.sh", "--help")
    assert "no such recipe; there are" in run_shell("sweep.sh", tmp_path, "none", "--seed", "[1,2]", code=2)
    words = (tmp_path, "demo", "--pruning.target_sparsity", "[0.5,1.5]")
    out = run_shell("sweep.sh", *words, code=2, python=server.bin)
    assert "pruning.target_sparsity is 1.5" in out and "==" not in out
