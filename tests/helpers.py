"""What several test files share: equality of runs, noise, lists, tiny transformers models, ways to run scripts."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import soundfile
import torch

from distillation.config import parse_recipe
from distillation.training.memory import searched_for
from exporting import runner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROOT = Path(__file__).parent.parent

# Runs


def weights(path: Path) -> dict[str, torch.Tensor]:
    """The state of a checkpoint or model file."""
    return torch.load(path, weights_only=True)["state_dict"]


def metrics(exp: Path) -> list[dict[str, str]]:
    """Rows of a run's metrics.csv but for the speeds."""
    with (exp / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if not k.startswith("speed/")} for row in csv.DictReader(file)]


def assert_same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different


def assert_same_run(a: Path, b: Path) -> None:
    assert_same_tensors(weights(a / "ckpts/last.ckpt"), weights(b / "ckpts/last.ckpt"))
    assert metrics(a) == metrics(b)
    assert not [path.name for path in b.rglob(".*") if path.is_file()], "a lock or temporary file is left"


# Audio


def write_noise(path: Path, seconds: float, seed: int, rate: int = 16000, channels: int = 1) -> Path:
    """Low-passed noise in the format of the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    noise = random.standard_normal((int(seconds * rate), channels)).cumsum(0)
    noise -= noise.mean(0)
    soundfile.write(path, 0.3 * noise / np.abs(noise).max(), rate)
    return path


def copy_lists(tsv_dir: Path, root: Path, out: Path) -> None:
    """The lists of ``tsv_dir`` for a copy of its corpus at ``root``."""
    for name in ("train100.tsv", "valid.tsv"):
        _, *lines = (tsv_dir / name).read_text().splitlines()
        (out / name).write_text("\n".join([str(root), *lines]) + "\n")


# Models of transformers

HF_SIZE = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 36,
    "conv_dim": (16, 20, 20),
    "conv_kernel": (10, 3, 3),
    "conv_stride": (5, 2, 2),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "vocab_size": 7,
}
# as the published models of the Base and the Large size, wav2vec 2.0 Base and XLS-R, WavLM Base+ and Large
HF_BASE = {"feat_extract_norm": "group", "do_stable_layer_norm": False, "conv_bias": False}
HF_LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}

# of torchaudio's models, in two conv layers at the usual 320 samples per frame
TORCHAUDIO_SIZE = {
    "extractor_conv_layer_config": [(16, 10, 5), (20, 64, 64)],
    "encoder_embed_dim": 24,
    "encoder_num_layers": 2,
    "encoder_num_heads": 3,
    "encoder_ff_interm_features": 36,
    "encoder_pos_conv_groups": 4,
    "encoder_pos_conv_kernel": 16,
}


def tiny_hf(model_class: type[PreTrainedModel], config_class: type, **options: object) -> PreTrainedModel:
    """Random weights of ordinary size everywhere; the library's own start hides biases, norms and position."""
    torch.manual_seed(0)
    model = model_class(config_class(**(HF_SIZE | options))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + name.endswith("norm.weight"))
    return model


# Exports


def run_exported_here(kind: str, exported: Path, batches: list) -> Iterator[dict[str, np.ndarray]]:
    """What verify.run_exported gives, without the start of a process; use the fixture ``exported_here``."""
    return itertools.starmap(getattr(runner, kind)(str(exported)), batches)


# Batches that fit a GPU


def write_batches(exp_dir: Path, flags: Sequence[object], seconds: float, count: int) -> None:
    """What fit_batch.py leaves on a machine with a GPU.

    Args:
        exp_dir: folder of the run.
        flags: of its recipe, ``--config`` included; its teacher is there.
        seconds: of a micro-batch.
        count: micro-batches in an update.
    """
    searched = searched_for(parse_recipe([str(word) for word in flags])[0])
    exp_dir.mkdir(parents=True, exist_ok=True)
    content = f"data: {{seconds_per_batch: {seconds}}}\ntrainer: {{batches_per_update: {count}}}\n"
    (exp_dir / "batch.yaml").write_text(f"{searched} of a GPU\n{content}")


# Scripts; as processes of their own: client.py


def run_here(name: str, *args: object, code: int = 0) -> str:
    """Run a root script in this process, to save the start-up: what it wrote to stderr."""
    stderr, found = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(stderr):
        patch.setattr(sys, "argv", [name, *map(str, args)])
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as stop:
            found = stop.code
    assert found == code, stderr.getvalue()
    return stderr.getvalue()


def run_error(name: str, *args: object) -> str:
    """The one line that a root script ends with on bad input."""
    stderr = run_here(name, *args, code=2)
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert lines[-1].startswith("error: ") and "Traceback" not in stderr, stderr
    return lines[-1]


def shell_environment(python: Path | None = None, **variables: str) -> dict[str, str]:
    """For the shell scripts: on the CPU, with this Python or another folder that holds a ``python``."""
    return {
        **os.environ,
        "NO_VENV": "1",
        "PATH": f"{python or Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        **variables,
    }


def run_shell(script: str, *args: object, code: int = 0, python: Path | None = None, **variables: str) -> str:
    """Run a script of scripts/: what it printed."""
    result = subprocess.run(
        ["bash", str(ROOT / "scripts" / script), *map(str, args)],
        capture_output=True, text=True, cwd=ROOT, env=shell_environment(python, **variables), timeout=1800,
    )  # fmt: skip
    assert result.returncode == code, f"{result.stdout[-4000:]}\n{result.stderr[-4000:]}"
    return result.stdout + result.stderr
