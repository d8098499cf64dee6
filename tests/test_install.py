"""``pip install .`` gives the model package alone, which needs torch alone."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile

import pytest

from tests.helpers import ROOT

USE = """
import importlib.abc, sys

class OnlyTorch(importlib.abc.MetaPathFinder):
    refused = "distillation lightning pytorch_lightning transformers safetensors soundfile huggingface_hub".split()

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in self.refused:
            raise AssertionError(f"{name} imported")

sys.meta_path.insert(0, OnlyTorch())
import torch, wav2vec2
assert wav2vec2.__file__.startswith(sys.prefix), wav2vec2.__file__
model = wav2vec2.load_model(sys.argv[1])
wav2vec2.save_model(sys.argv[2], model)
model = wav2vec2.load_model(sys.argv[2])
print([tuple(f.shape) for f in model.embed([torch.randn(16000), torch.randn(8000)])], model.frame_times(1).item())
"""


@pytest.mark.slow
def test_a_fresh_environment_has_the_model_and_nothing_else(teacher_path, tmp_path):
    def run(*words: object) -> str:
        return subprocess.run([*map(str, words)], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    # without a copy, setuptools leaves its build folder in the repository
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "wav2vec2", "distillation", "lightning.py"):
        (source / name).symlink_to(ROOT / name)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"wav2vec2"}
    assert "wav2vec2/py.typed" in names
    required = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:")]
    assert len(required) == 1 and required[0].startswith("Requires-Dist: torch>=")

    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "fresh")
    python = tmp_path / "fresh" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    (installed,) = (tmp_path / "fresh").glob("lib/python*/site-packages")
    (installed / "torch_from_here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    printed = run(python, "-c", USE, teacher_path, tmp_path / "copy.safetensors")
    assert printed.strip() == "[(49, 24), (24, 24)] 0.0125"
