"""What the report says, as data: gathered from the folder of a run, or from one model file."""

import csv
import hashlib
import importlib.metadata
import logging
import math
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from distillation.config import Recipe, parse_recipe
from distillation.distilled import read_distilled
from distillation.errors import UserError
from evaluation.cost import Cost, Speed, measure
from evaluation.held_out import Distance, evaluate, floor_of
from evaluation.tables import format_table
from wav2vec2 import prune, save_model
from wav2vec2.architecture import Architecture, architecture
from wav2vec2.checkpoint import load_checkpoint

logger = logging.getLogger(__name__)

TEACHER, MASKED, PRUNED, FINAL, STUDENT = "teacher", "after step 1", "pruned", "final", "student"
PACKAGES = ("torch", "numpy", "pytorch-lightning", "jsonargparse", "soundfile")
SPEED_SECONDS, SPEED_BATCH = 10.0, 1


@dataclass
class ModelReport:
    """One column of the before/after table."""

    name: str
    cost: Cost
    architecture: Architecture
    held_out: Distance | None = None

    @property
    def loss(self) -> float | None:
        """On held-out audio, where it is known."""
        return self.held_out.loss if self.held_out is not None else None

    def speed(self, device: str) -> Speed | None:
        """On that device, where it was measured."""
        return next((speed for speed in self.cost.speed if speed.device == device), None)


@dataclass
class Step:
    """Curves of one training step: column of metrics.csv -> [(update, value), ...]."""

    name: str
    curves: dict[str, list[tuple[int, float]]]


@dataclass
class HashedFile:
    """A file that the numbers depend on."""

    role: str
    path: str
    num_bytes: int
    sha256: str


@dataclass
class Report:
    """Everything on the page."""

    title: str
    models: list[ModelReport] = field(default_factory=list)  # the teacher first, where it is known
    held_out_data: str | None = None
    target_sparsity: float | None = None
    steps: list[Step] = field(default_factory=list)
    config: str | None = None  # resolved YAML
    files: list[HashedFile] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # what is missing, and why

    def model(self, name: str) -> ModelReport | None:
        """Model of that name."""
        return next((model for model in self.models if model.name == name), None)

    def as_json(self) -> dict[str, Any]:
        """Plain types; what is no finite number is null."""
        return _finite(asdict(self))


def collect(path: Path, *, max_seconds: float, devices: list[str], rounds: int) -> Report:
    """Gather a report.

    Args:
        path: the folder of a run, or a model file.
        max_seconds: of validation audio to compute the held-out numbers on.
        devices: to measure the speed on; the held-out numbers are computed on the last.
        rounds: timed runs per model.

    Raises:
        UserError: neither a run nor a model, or a file of the run is damaged.
        CheckpointError: a model file is damaged.
    """
    if path.is_dir():
        return _collect_run(path, max_seconds, devices, rounds)
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; name the folder of a run, or a model (.pth)")
    if path.suffix == ".ckpt":
        raise UserError(f"{path}: a training checkpoint; name the folder of its run, or a model (.pth)")
    report = Report(title=path.name, versions=versions())
    _measure(report, {path.stem: path}, devices, rounds)
    report.files = _hash({"model": path})
    return report


def _collect_run(run: Path, max_seconds: float, devices: list[str], rounds: int) -> Report:
    if not (run / "config.yaml").is_file() or not (run / "metrics.csv").is_file():
        raise UserError(
            f"{run}: no run in it (config.yaml, metrics.csv); name the --exp_dir of a stage, or a .pth file"
        )
    recipe, _ = parse_recipe(["--config", str(run / "config.yaml")])
    curves = read_curves(run / "metrics.csv")
    prunes, step_2 = "sparsity/expected" in curves, run / "final"  # the recipe of step 2 names the units, too
    report = Report(title=run.absolute().name, versions=versions())
    report.config = (run / "config.yaml").read_text(encoding="utf-8")
    names = ("Step 1: distillation and pruning", "Step 2: distillation") if prunes else ("Distillation", "")
    report.steps = [Step(names[0], curves)]
    if prunes:
        report.target_sparsity = recipe.pruning.target_sparsity
        if (step_2 / "metrics.csv").is_file():
            report.steps.append(Step(names[1], read_curves(step_2 / "metrics.csv")))
    with _models_of(run, recipe, prunes) as paths:
        if TEACHER not in paths:
            report.notes.append(f"The teacher {recipe.teacher_ckpt} was not found: nothing is compared with it.")
        _measure(report, paths, devices, rounds)
        if TEACHER in paths:
            _compare(report, recipe, paths, max_seconds, devices[-1])
        hashed = {name: path for name, path in paths.items() if path.is_relative_to(run) or name == TEACHER}
        lists = (recipe.data.train, recipe.data.valid)
        hashed.update({name: recipe.data.tsv_dir / name for name in lists if (recipe.data.tsv_dir / name).is_file()})
        report.files = _hash(hashed)
    return report


@contextmanager
def _models_of(run: Path, recipe: Recipe, prunes: bool) -> Iterator[dict[str, Path]]:
    """Model files by name, in the order of the stages. Before prune.py has run, the eval masks make the model."""
    paths = {TEACHER: recipe.teacher_ckpt} if recipe.teacher_ckpt.is_file() else {}
    last = run / "ckpts" / "last.ckpt"
    with tempfile.TemporaryDirectory() as folder:
        if not prunes and (run / "final.pth").is_file():
            paths[STUDENT] = run / "final.pth"
        elif (run / "pruned.pth").is_file():
            paths[PRUNED] = run / "pruned.pth"
            if (run / "final" / "final.pth").is_file():
                paths[FINAL] = run / "final" / "final.pth"
        elif last.is_file():
            name = MASKED if prunes else STUDENT
            paths[name] = Path(folder) / "student.pth"
            _save_student(last, paths[name])
        else:
            raise UserError(f"{run}: no model in it yet (ckpts/last.ckpt, pruned.pth or final.pth)")
        yield paths


def _save_student(last: Path, out: Path) -> None:
    student = read_distilled(last, pruned=False)
    model = prune(student.model)[0] if student.model.masks() else student.model
    save_model(out, model, student.heads)


def _measure(report: Report, paths: dict[str, Path], devices: list[str], rounds: int) -> None:
    costs = measure(paths, seconds=[SPEED_SECONDS], batch=[SPEED_BATCH], devices=devices, rounds=rounds)
    for cost, path in zip(costs, paths.values()):
        model = load_checkpoint(path).model
        found = prune(model)[1] if model.masks() else model.config
        report.models.append(ModelReport(cost.name, cost, architecture(found)))


def _compare(report: Report, recipe: Recipe, paths: dict[str, Path], max_seconds: float, device: str) -> None:
    """Held-out numbers; a run whose data has gone still has a report."""
    teacher = load_checkpoint(paths[TEACHER]).model
    students = {name: load_checkpoint(path) for name, path in paths.items() if name != TEACHER}
    try:
        held_out = evaluate(recipe, teacher, students, max_seconds, device)
    except UserError as error:
        logger.warning("no held-out numbers: %s", error)
        report.notes.append(f"No held-out numbers: {error}.")
        return
    report.held_out_data = held_out.data
    for name, distance in held_out.students.items():
        entry = report.model(name)
        assert entry is not None
        entry.held_out = distance
    entry = report.model(TEACHER)
    assert entry is not None
    entry.held_out = Distance(loss=floor_of(recipe, teacher))


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Columns of a metrics.csv without their gaps; values that are no finite number are left out.

    Raises:
        UserError: the file is no table of metrics.
    """
    curves: dict[str, list[tuple[int, float]]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                step = int(row.pop("step"))
                for name, text in row.items():
                    if text and math.isfinite(value := float(text)):
                        curves.setdefault(name, []).append((step, value))
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path}: not the metrics of a run ({error}); remove it or train again") from None
    return curves


def closing_table(report: Report) -> str:
    """Teacher, pruned and final model side by side: size, compute, held-out loss and speed."""
    rows = []
    for model in report.models:
        cpu = model.speed("cpu")
        rows.append([
            model.name,
            f"{model.cost.num_params:,}",
            f"{model.cost.macs_10s / 1e9:.2f}",
            "-" if model.loss is None else f"{model.loss:.4f}",
            "-" if cpu is None else f"{cpu.real_time_factor:.4f}",
        ])  # fmt: skip
    header = ["model", "parameters", "GMACs (10 s)", "held-out loss", "CPU real-time factor"]
    return format_table(header, rows)


def versions() -> dict[str, str]:
    """Of what computed the numbers."""
    found = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    threads = torch.get_num_threads()
    found["platform"] = f"{platform.system()} {platform.machine()}, {threads} CPU thread{'s' if threads > 1 else ''}"
    if torch.cuda.is_available():
        found["GPU"] = torch.cuda.get_device_name()
    return found


def _hash(paths: dict[str, Path]) -> list[HashedFile]:
    hashed = []
    total = sum(path.stat().st_size for path in paths.values())
    with tqdm(total=total, desc="sha256", unit="B", unit_scale=True, dynamic_ncols=True, delay=3) as bar:
        for role, path in paths.items():
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
                    bar.update(len(block))
            hashed.append(HashedFile(role, str(path), path.stat().st_size, digest.hexdigest()))
    return hashed


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
