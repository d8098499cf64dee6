"""Every command as a user starts it: help without Lightning, and threads that do not spin while they wait."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT

PACKAGES = ("evaluation", "exporting", "demo", "benchmarks")
LOADED = """
import runpy, sys
try:
    runpy.run_path(sys.argv[1], run_name="__main__")
except SystemExit as stop:
    assert stop.code == 0, stop.code
finally:
    print("LOADED", sorted({"pytorch_lightning", "transformers", "matplotlib"} & sys.modules.keys()))
"""


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
