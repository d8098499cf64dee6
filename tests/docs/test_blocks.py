"""The blocks of README's "Use it in your project" run as they stand, in order."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEADING = "## Use it in your project"
# a few updates instead of the full fine-tuning
SHORTER = {"finetune_ctc.py": "--max_steps 4 --freeze_steps 2 --validate_every 2 --accelerator cpu --workers 0"}


def blocks(text: str) -> list[str]:
    """Indented blocks of the section."""
    section = text.partition(f"{HEADING}\n")[2].partition("\n## ")[0]
    found = re.findall(r"(?:^(?:    .*)?\n)*^    .*\n", section, flags=re.MULTILINE)
    return [textwrap.dedent(block).strip("\n") for block in found]


def write_speech(folder: Path, noise) -> None:
    """A LibriSpeech of noise."""
    for part in ("train-clean-100", "dev-clean"):
        for i, text in enumerate(("A CAB", "BAD", "A DAB")):
            noise(folder / part / "1" / "2" / f"1-2-{i:04d}.flac", 1.5, i)
            with (folder / part / "1" / "2" / "1-2.trans.txt").open("a") as file:
                file.write(f"1-2-{i:04d} {text}\n")


@pytest.mark.slow
def test_the_blocks_run(teacher_path, noise, tmp_path):
    pytest.importorskip("onnxscript")
    noise(tmp_path / "audio.wav", 1.5, 0)
    write_speech(tmp_path / "LibriSpeech", noise)
    (tmp_path / "final.pth").symlink_to(teacher_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    ran = []
    for block in blocks((ROOT / "README.md").read_text(encoding="utf-8")):
        if block.startswith("pip "):  # tests/test_install.py
            continue
        commands = [[sys.executable, "-c", block]]
        if block.startswith("python "):
            words = [shlex.split(line)[1:] for line in block.replace("\\\n", " ").splitlines()]
            commands = [
                [sys.executable, str(ROOT / name), *rest, *SHORTER.get(name, "").split()] for name, *rest in words
            ]
            ran += [name for name, *_ in words]
        for command in commands:
            result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert result.returncode == 0, f"{block}\n\n{result.stdout}\n{result.stderr}"
    assert {"export.py", "extract_features.py", "finetune_ctc.py"} <= set(ran)
    made = ("my_model", "model.onnx", "model.int8.onnx", "model.pt2", "model.safetensors", "feats", "recogniser")
    assert all((tmp_path / name).exists() for name in made)
