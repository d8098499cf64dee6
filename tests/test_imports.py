"""The house: imports point down, run in no circle, cost commands little, and the model package needs torch alone."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

# a package may import those that stand in a lower row, and itself
ROWS = [
    ["wav2vec2"],
    ["distillation"],
    ["exporting", "evaluation", "demo"],
    ["lightning"],
    ["root"],  # the scripts, which nothing imports
    ["benchmarks", "docs"],  # stand beside the scripts
]
ROW = {name: row for row, names in enumerate(ROWS) for name in names}
PACKAGES = [name for name in ROW if (ROOT / name).is_dir()]
SCRIPTS = sorted(path.stem for path in ROOT.glob("*.py") if path.name != "lightning.py")
HEAVY = ("pytorch_lightning", "transformers", "matplotlib")


def files() -> dict[str, Path]:
    """Module name -> file, of all product code."""
    found = {path.stem: path for path in ROOT.glob("*.py")}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


FILES = files()


def named(module: str, at_start: bool = False) -> set[str]:
    """Modules that a file names in imports, wherever they stand, or in those that run when it is imported itself."""
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = set()
    for node in tree.body if at_start else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


def imported(module: str) -> set[str]:
    """Modules of this repository that a file names in an import: in functions and for types too."""
    return {name for name in named(module) if name in FILES or name.partition(".")[0] == "tests"}


def row(module: str) -> int:
    first = module.partition(".")[0]
    return ROW[first] if first in ROW else ROW["root"]


def test_every_package_has_a_place():
    folders = {path.parent.name for path in ROOT.glob("*/*.py")} - {"tests"}
    assert folders == set(PACKAGES)


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module):
    for other in imported(module):
        assert not other.startswith("tests"), f"{module} imports {other}: product code needs no test"
        if other.partition(".")[0] == module.partition(".")[0]:
            continue
        assert row(other) < row(module), f"{module} imports {other}, which stands above or beside it"
        assert row(other) != ROW["root"], f"{module} imports the script {other}"


def test_no_circles():
    below: dict[str, set[str]] = {module: imported(module) - {module} for module in FILES}
    for module, names in below.items():  # a package's face only hands names on
        names -= {name for name in names if module.startswith(f"{name}.") and FILES[name].name == "__init__.py"}
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, f"a circle: {' -> '.join([*path[path.index(module) :], module])}"
        if module not in done:
            for other in sorted(below[module]):
                visit(other, [*path, module])
            done.add(module)

    for module in FILES:
        visit(module, [])


def test_the_model_package_imports_torch_alone():
    allowed = {"torch", "wav2vec2", "huggingface_hub", *sys.stdlib_module_names}  # the hub is imported when asked for
    for module, path in FILES.items():
        if module.partition(".")[0] != "wav2vec2":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert {name.partition(".")[0] for name in names} <= allowed, f"{module} imports {names}"


# what a requirement consists of, and what exporting writes beside a model
BROUGHT = {"pytorch_lightning", "wav2vec2_ctc"}


def test_packages_that_are_imported_are_named_in_requirements():
    """Not only brought by others, whose next release may do without them."""
    packages = importlib.metadata.packages_distributions()
    paths = [ROOT / "requirements.txt", *(ROOT / "requirements").glob("*.txt")]
    lines = [line for path in paths for line in path.read_text().splitlines()]
    required = {_normalised(re.split(r"[^\w.-]", line)[0]) for line in lines}
    not_packages = {"", *BROUGHT, *sys.stdlib_module_names, *(module.partition(".")[0] for module in FILES)}
    for module in FILES:
        for name in {name.partition(".")[0] for name in named(module)} - not_packages:
            distributions = {_normalised(one) for one in packages.get(name, [name])}
            assert distributions & required, f"{module} imports {name}"


def _normalised(distribution: str) -> str:
    return distribution.lower().replace("_", "-")


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_scripts_import_at_their_start(script):
    """The setting of threads before torch, and nothing that takes seconds besides torch."""
    heavy = {"torch", "torchaudio", *HEAVY} & {name.partition(".")[0] for name in named(script, at_start=True)}
    assert not heavy, f"{script} imports {heavy} by itself: distillation must come before torch"
    waiting, seen = [script], {script}
    while waiting:
        module = waiting.pop()
        for name in named(module, at_start=True):
            assert name.partition(".")[0] not in HEAVY, f"{script} imports {name}, by {module}"
            if name in FILES and name not in seen:
                seen.add(name)
                waiting.append(name)


def test_the_walk_sees_what_it_looks_for(tmp_path, monkeypatch):
    """Relative ones, those inside functions, and those for types alone."""
    (tmp_path / "x.py").write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from lightning import DistillModule\n"
        "def f():\n    from .model import Wav2Vec2Model\n"
        "    import distillation.config\n    from tests import helpers\n"
    )
    monkeypatch.setitem(FILES, "wav2vec2.x", tmp_path / "x.py")
    assert imported("wav2vec2.x") == {"lightning", "wav2vec2.model", "distillation.config", "tests", "tests.helpers"}
    assert named("wav2vec2.x", at_start=True) == {"typing", "typing.TYPE_CHECKING"}
