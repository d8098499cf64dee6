"""Shared fixtures: a tiny teacher, a folder of noise that looks like LibriSpeech, and the scripts as subprocesses."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from tests.configs import TINY
from wav2vec2 import save_model, wav2vec2_model

ROOT = Path(__file__).parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: a long one that starts last would run alone at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def tiny_config() -> dict:
    return dict(TINY)


@pytest.fixture(scope="session")
def teacher_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random teacher of 4 layers, 24 wide."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    save_model(path, wav2vec2_model(**TINY))
    return path


def write_noise(path: Path, seconds: float, seed: int, rate: int = 16000, channels: int = 1) -> Path:
    """Low-passed noise as FLAC."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    noise = random.standard_normal((int(seconds * rate), channels)).cumsum(0)
    noise -= noise.mean(0)
    soundfile.write(path, 0.3 * noise / np.abs(noise).max(), rate)
    return path


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LibriSpeech-shaped: 14 training and 4 validation utterances of 1 to 2 s."""
    root = tmp_path_factory.mktemp("corpus")
    for split, count in (("train-clean-100", 14), ("dev-clean", 4)):
        for i in range(count):
            write_noise(root / split / f"{i % 3}" / "1" / f"{i}.flac", 1 + (i * 7 % 10) / 10, i)
    return root


@pytest.fixture(scope="session")
def tsv_dir(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Lists of the noise corpus, made by prepare_data.py."""
    out = tmp_path_factory.mktemp("data")
    run_script("prepare_data.py", "--data", corpus, "--out", out)
    return out


def run_script(name: str, *args: object, code: int = 0, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run a script of the repository as a process; on another exit code than ``code`` show what it printed."""
    result = subprocess.run(
        [sys.executable, str(ROOT / name), *map(str, args)],
        capture_output=True, text=True, cwd=ROOT, timeout=timeout, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert result.returncode == code, f"{name} exited with {result.returncode}\n{result.stdout}\n{result.stderr}"
    return result


def run_error(name: str, *args: object) -> str:
    """The one line that a script ends with on bad input, run in this process to save the start-up."""
    stderr = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(stderr):
        patch.setattr(sys, "argv", [name, *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / name), run_name="__main__")
    assert stop.value.code == 2, stderr.getvalue()
    lines = [line for line in stderr.getvalue().splitlines() if line.strip()]
    assert lines[-1].startswith("error: ") and "Traceback" not in stderr.getvalue(), stderr.getvalue()
    return lines[-1]


@pytest.fixture(scope="session")  # the package that a process imports from it has one place
def modules_cache(tmp_path_factory):
    """Where transformers copies the code of folders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        yield


@pytest.fixture(scope="session")
def script():
    return run_script


@pytest.fixture(scope="session")
def script_error():
    return run_error


@pytest.fixture(scope="session")
def noise():
    return write_noise


@pytest.fixture(scope="session")
def tiny_flags(teacher_path: Path, tsv_dir: Path) -> list[object]:
    """Flags that fit conf/demo.yaml to the tiny teacher and the noise corpus: 12 updates of 2 micro-batches."""
    flags = {
        "config": ROOT / "conf" / "demo.yaml",
        "teacher_ckpt": teacher_path,
        "teacher_layers": 4,
        "teacher_width": 24,
        "data.tsv_dir": tsv_dir,
        "data.seconds_per_batch": 5,
        "objective.layer_to_layer.layers": "[[0],[2,4]]",
        "pruning.warmup_steps": 6,
        "pruning.target_sparsity": 0.3,
        "optim.max_steps": 12,
        "optim.warmup_steps": 2,
        "final.max_steps": 6,
        "trainer.batches_per_update": 2,
        "trainer.log_every": 2,
        "trainer.validate_every": 4,
        "trainer.checkpoint_every": 3,
    }
    return [word for name, value in flags.items() for word in (f"--{name}", value)]
