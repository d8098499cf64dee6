"""s3prl itself with a model of ours: phone recognition and keyword spotting, by its runner and by its recipes.

Needs requirements/s3prl.txt; scripts/test_s3prl.sh makes an environment with it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.helpers import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("s3prl") is None, reason="scripts/test_s3prl.sh runs these"),
]
WORDS = {"A": "AH", "CAB": "K AE B", "BAD": "B AE D", "DAB": "D AE B"}
KEYWORDS = ("yes", "no", "up", "marvin", "sheila")  # the last two are unknown words
LEXICON_URLS = [
    f"https://huggingface.co/datasets/s3prl/g2p/raw/main/lexicon/librispeech-lexicon-{part}-g2p.txt"
    for part in ("200k", "allothers")
]
RUNNER = {
    "total_steps": 4, "gradient_clipping": 1, "gradient_accumulate_steps": 1, "log_step": 2, "eval_step": 2,
    "save_step": 2, "max_keep": 1, "eval_dataloaders": ["dev", "test"],
}  # fmt: skip
OPTIMIZER = {"name": "TorchOptim", "torch_optim_name": "Adam", "lr": 1e-3}


@pytest.fixture(scope="module")
def libri(tmp_path_factory, noise) -> Path:
    root = tmp_path_factory.mktemp("libri") / "LibriSpeech"
    for part in ("train-clean-100", "dev-clean", "test-clean"):
        folder = root / part / "1" / "2"
        lines = []
        for i, text in enumerate(("A CAB", "BAD DAB", "A DAB", "CAB")):
            noise(folder / f"1-2-{i:04d}.flac", 1 + 0.2 * i, i)
            lines.append(f"1-2-{i:04d} {text}")
        (folder / "1-2.trans.txt").write_text("\n".join(lines) + "\n")
    (root / "SPEAKERS.TXT").write_text(";ID |SEX| SUBSET |MINUTES| NAME\n1 | F | train-clean-100 | 1.0 | Nobody\n")
    lexicon = "".join(f"{word}\t{phones}\n" for word, phones in WORDS.items())
    (root.parent / "lexicon.txt").write_text(lexicon)
    (root.parent / "phoneme.txt").write_text("\n".join(sorted({p for ps in WORDS.values() for p in ps.split()})) + "\n")
    cache = root.parent / "home" / ".cache" / "s3prl" / "download"  # where s3prl keeps what it has fetched
    cache.mkdir(parents=True)
    for url in LEXICON_URLS:
        (cache / f"{hashlib.sha256(url.encode()).hexdigest()}.{Path(url).name}").write_text(lexicon)
    return root


@pytest.fixture(scope="module")
def commands(tmp_path_factory, noise) -> Path:
    """Speech Commands: the split is a hash of the speaker's name, so enough speakers for all parts."""
    root = tmp_path_factory.mktemp("commands")
    for word in KEYWORDS:
        for speaker in range(24):
            noise(root / "train" / word / f"s{speaker}_nohash_0.wav", 0.8, speaker)
    for word in ("yes", "no", "up", "_unknown_", "_silence_"):
        noise(root / "test" / word / "s0_nohash_0.wav", 1.0, 3)
    noise(root / "train" / "_background_noise_" / "hum.wav", 3.0, 5)
    return root


def run(libri: Path, cwd: Path, *words: object) -> str:
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "HOME": str(libri.parent / "home"), "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "evaluation.s3prl_upstream", *map(str, words)]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-3000:]}\n{result.stderr[-6000:]}"
    return result.stdout + result.stderr


def downstream(libri: Path, cwd: Path, model: Path, task: str, config: dict, *words: object) -> str:
    path = cwd / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return run(libri, cwd, "s3prl.run_downstream", "-m", "train", "-u", "dphubert", "-k", model, "-d", task, "-c", path,
               "-p", cwd / "exp", "--device", "cpu", *words)  # fmt: skip


def test_phone_recognition_by_the_runner(libri, teacher_path, tmp_path):
    config = {
        "runner": RUNNER,
        "optimizer": OPTIMIZER,
        "downstream_expert": {
            "corpus": {
                "name": "LibriPhone", "path": str(libri), "lexicon": [str(libri.parent / "lexicon.txt")],
                "train": ["train-clean-100"], "dev": ["dev-clean"], "test": ["test-clean"], "bucketing": True,
                "batch_size": 2, "num_workers": 0,
            },
            "text": {"mode": "word", "vocab_file": str(libri.parent / "phoneme.txt")},
            "model": {"project_dim": 8, "zero_infinity": True, "select": "FrameLevel", "FrameLevel": {"hiddens": None}},
            "save_best_on": "dev", "metric": ["per"], "metric_higher_better": False,
        },
    }  # fmt: skip
    printed = downstream(libri, tmp_path, teacher_path, "ctc", config)
    rates = [float(x) for x in re.findall(r"test per: ([0-9.]+)", printed)]
    assert len(rates) == 2 and all(rate > 0 for rate in rates)
    assert "Take a list of 5 features" in printed and "downsample rate is 320" in printed
    best = tmp_path / "exp" / "dev-best.ckpt"
    again = run(libri, tmp_path, "s3prl.run_downstream", "-m", "evaluate", "-e", best, "--device", "cpu")
    assert re.findall(r"test per: ([0-9.]+)", again)


def test_keyword_spotting_by_the_runner(libri, commands, teacher_path, tmp_path):
    config = {
        "runner": RUNNER,
        "optimizer": OPTIMIZER,
        "downstream_expert": {
            "datarc": {
                "speech_commands_root": str(commands / "train"), "speech_commands_test_root": str(commands / "test"),
                "num_workers": 0, "batch_size": 8,
            },
            "modelrc": {
                "projector_dim": 8, "select": "UtteranceLevel",
                "UtteranceLevel": {"pooling": "MeanPooling", "post_net": {"select": "FrameLevel"}},
            },
        },
    }  # fmt: skip
    printed = downstream(libri, tmp_path, teacher_path, "speech_commands", config)
    assert [0 <= float(x) <= 1 for x in re.findall(r"test acc: ([0-9.]+)", printed)] == [True, True]
    # a run that was stopped goes on: its checkpoint holds a Namespace
    resumed = run(libri, tmp_path, "s3prl.run_downstream", "-m", "train", "-e", tmp_path / "exp", "--device", "cpu",
                  "-o", "config.runner.total_steps=6")  # fmt: skip
    assert "Resume from" in resumed
    trained = downstream(libri, tmp_path, teacher_path, "speech_commands", config, "-f", "-a")
    assert "Traceback" not in trained


def recipe(libri: Path, cwd: Path, model: Path, name: str, *words: object) -> Path:
    run(libri, cwd, "s3prl.main", name, "--target_dir", cwd / "exp", "--build_upstream.name", "dphubert",
        "--build_upstream.path_or_url", model, "--train.total_steps", 4, "--train.log_step", 2,
        "--train.eval_step", 2, "--train.save_step", 2, "--device", "cpu", *words)  # fmt: skip
    (result,) = (cwd / "exp").rglob("result.yaml")
    return result


def test_keyword_spotting_by_the_recipe(libri, commands, teacher_path, tmp_path):
    result = recipe(
        libri, tmp_path, teacher_path, "SuperbKS", "--prepare_data.gsc1", commands / "train",
        "--prepare_data.gsc1_test", commands / "test", "--build_batch_sampler.train.batch_size", 8,
    )  # fmt: skip
    assert 0 <= yaml.safe_load(result.read_text())["accuracy"] <= 1


def test_phone_recognition_by_the_recipe(libri, teacher_path, tmp_path):
    result = recipe(libri, tmp_path, teacher_path, "SuperbPR", "--prepare_data.dataset_root", libri,
                    "--build_batch_sampler.train.batch_size", 2)  # fmt: skip
    assert yaml.safe_load(result.read_text())["per"] > 0
