"""Every command as a user starts it: help without Lightning, and threads that do not spin while they wait."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if path.name != "lightning.py")
HEAVY = ("pytorch_lightning", "transformers", "matplotlib")
PACKAGES = ("evaluation", "exporting", "finetuning", "demo", "benchmarks")
LOADED = """
import runpy, sys
try:
    runpy.run_path(sys.argv[1], run_name="__main__")
except SystemExit as stop:
    assert stop.code == 0, stop.code
finally:
    print("LOADED", sorted({"pytorch_lightning", "transformers", "matplotlib"} & sys.modules.keys()))
"""


def imports(path: Path) -> list[str]:
    """Modules that a file imports when it is imported itself, in order."""
    names = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*path.relative_to(ROOT).parent.parts, *([base] if base else [])])
            names += [base, *(f"{base}.{alias.name}" for alias in node.names)]
    return names


def file_of(module: str) -> Path | None:
    path = ROOT.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_scripts_import_at_their_start(script):
    """The setting of threads before torch, and nothing that takes seconds besides torch."""
    first = [name.partition(".")[0] for name in imports(ROOT / script)]
    heavy = {"torch", "torchaudio", *HEAVY} & set(first)
    assert not heavy, f"{script} imports {heavy} by itself: distillation must come before torch"
    waiting, seen = [ROOT / script], set()
    while waiting:
        path = waiting.pop()
        for name in imports(path):
            assert name.partition(".")[0] not in HEAVY, f"{script} imports {name}, by {path.relative_to(ROOT)}"
            file = file_of(name)
            if file is not None and file not in seen:
                seen.add(file)
                waiting.append(file)


def start(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    environment |= {"OMP_DISPLAY_ENV": "VERBOSE", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300
    )


def spins(printed: str) -> set[str]:
    """How often threads of OpenMP look before they sleep, as libgomp tells when it is loaded."""
    return set(re.findall(r"GOMP_SPINCOUNT = '(\w+)'", printed))


@pytest.mark.slow
@pytest.mark.parametrize("script", ["distill.py", "report.py", "extract_features.py"])
def test_help_of_scripts(script):
    result = start("-c", LOADED, script, "--help")
    assert result.returncode == 0 and "usage: " in result.stdout, result.stderr
    assert result.stdout.splitlines()[-1] == "LOADED []"
    assert spins(result.stderr) <= {"0"}


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_of_packages(package):
    """``python -m evaluation.cost`` runs the face of the package first."""
    first = next(line for line in (ROOT / package / "__init__.py").read_text().splitlines() if "import " in line)
    assert first.startswith("import distillation")


@pytest.mark.slow
def test_without_the_setting_they_would_spin():
    assert spins(start("-c", "import torch").stderr) not in (set(), {"0"})
    assert spins(start("-m", "evaluation.cost", "--help").stderr) == {"0"}
