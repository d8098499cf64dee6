"""What the page says, as data: gathered from the folder of a run, or from one model file.

An argument of the command is first looked at (:func:`look_at`), which reads its tables and says what files the numbers
will depend on; then their hashes are taken, and only then something is measured.
"""

import csv
import hashlib
import importlib.metadata
import json
import logging
import math
import platform
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
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
from evaluation.held_out import Distance, HeldOut, evaluate, floor_of
from evaluation.tables import format_table
from wav2vec2 import prune, save_model
from wav2vec2.architecture import Architecture, architecture
from wav2vec2.checkpoint import load_checkpoint

logger = logging.getLogger(__name__)

TEACHER, MASKED, PRUNED, FINAL, STUDENT = "teacher", "after step 1", "pruned", "final", "student"
STEP_1, STEP_2, ONE_STEP = "Step 1: distillation and pruning", "Step 2: distillation", "Distillation"
PACKAGES = ("torch", "numpy", "pytorch-lightning", "jsonargparse", "soundfile")
SPEED_SECONDS, SPEED_BATCH = 10.0, 1
MAX_POINTS = 400  # of a curve; charts are 288 pixels wide inside
DIGITS = 6  # significant ones in the JSON

Curve = list[tuple[int, float]]  # (update, value)


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    Attributes:
        seconds: most held-out audio to compute losses and distances on.
        devices: to measure the speed on; losses and distances are computed on the last.
        rounds: timed runs per model.
    """

    seconds: float
    devices: list[str]
    rounds: int


@dataclass
class ModelReport:
    """One model: a column of the table."""

    name: str
    cost: Cost
    architecture: Architecture
    stage: str | None = None  # of its run, where the name is that of the run
    teacher: str | None = None  # name of the model that it is compared with
    sparsity: float | None = None  # share of the teacher's parameters that it lacks
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
    """Curves of one training step."""

    name: str
    rows: int  # of its metrics.csv, where all points are
    thinned: str | None  # how the curves were thinned; None where they are whole
    curves: dict[str, Curve]  # by column of metrics.csv


@dataclass
class HashedFile:
    """A file that the numbers depend on."""

    role: str
    path: str
    num_bytes: int
    sha256: str


@dataclass
class Page:
    """What the pages about one argument and about several have in common."""

    title: str
    made_with: dict[str, Any]  # names of the arguments, and the effort
    models: list[ModelReport] = field(default_factory=list)  # teachers first, where they are known
    files: list[HashedFile] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: versions())
    notes: list[str] = field(default_factory=list)  # what is missing, and why
    incomplete: bool = False  # audio could not be read: worth another try with the same files

    def model(self, name: str | None) -> ModelReport | None:
        """Model of that name."""
        return next((model for model in self.models if model.name == name), None)

    def as_json(self) -> dict[str, Any]:
        """Plain types: floats with six significant digits, null for what is no finite number."""
        return _plain(asdict(self))


@dataclass
class Report(Page):
    """Everything on the page about one run or one model."""

    held_out_data: str | None = None
    target_sparsity: float | None = None
    steps: list[Step] = field(default_factory=list)
    config: str | None = None  # resolved YAML

    @property
    def teacher(self) -> ModelReport | None:
        """What the last model is compared with."""
        return self.model(self.models[-1].teacher)


@dataclass
class Subject:
    """An argument of the command, before anything is measured: the folder of a run, or a model file.

    Attributes:
        name: unique among the arguments.
        path: the argument.
        models: stage -> file in the order of the stages; ``ckpts/last.ckpt`` stands for the model that its masks make.
        is_run: or a model file.
        config: resolved YAML of a run.
        recipe: what the config says; None where it cannot be read.
        steps: curves of a run.
        tables: files that the steps were read from.
        notes: what is missing, and why.
    """

    name: str
    path: Path
    models: dict[str, Path]
    is_run: bool = False
    config: str | None = None
    recipe: Recipe | None = None
    steps: list[Step] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def teacher(self) -> Path | None:
        """The teacher of a run, where it is there."""
        return self.recipe.teacher_ckpt if self.recipe is not None and self.recipe.teacher_ckpt.is_file() else None

    def files(self) -> dict[str, Path]:
        """Everything that the page depends on, by its role."""
        if not self.is_run:
            return {"model": self.path}
        found = {TEACHER: self.teacher} if self.teacher is not None else {}
        for stage, path in self.models.items():
            found[str(path.relative_to(self.path)) if path.suffix == ".ckpt" else stage] = path
        if self.recipe is not None:
            data = self.recipe.data
            found |= {name: data.tsv_dir / name for name in (data.train, data.valid) if (data.tsv_dir / name).is_file()}
        own = (self.path / "config.yaml", *self.tables)
        return found | {str(path.relative_to(self.path)): path for path in own}

    @contextmanager
    def students(self) -> Iterator[dict[str, Path]]:
        """Model files by stage. Before prune.py has run, the eval masks of the checkpoint make the model."""
        with tempfile.TemporaryDirectory() as folder:
            found = {}
            for stage, path in self.models.items():
                found[stage] = path
                if path.suffix == ".ckpt":
                    found[stage] = Path(folder) / "student.pth"
                    _save_student(path, found[stage])
            yield found


def look_at(paths: Sequence[Path]) -> list[Subject]:
    """Look at the arguments of the command.

    Args:
        paths: folders of runs, and model files; equal names get their whole paths. Of several runs only the last models
            count.

    Raises:
        UserError: one is neither a run nor a model, is named twice, or a table of a run is damaged.
    """
    for i, path in enumerate(paths):
        if not path.exists():
            raise UserError(f"{path}: no such file or folder; name the folder of a run, or a model (.pth)")
        if any(path.samefile(other) for other in paths[:i]):
            raise UserError(f"{path}: named twice; name each run or model once")
        if path.suffix == ".ckpt":
            raise UserError(f"{path}: a training checkpoint; name the folder of its run, or a model (.pth)")
    names = [path.absolute().name if path.is_dir() else path.stem for path in paths]
    names = [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths)]
    subjects = [
        _look_at_run(name, path) if path.is_dir() else Subject(name, path, {name: path})
        for name, path in zip(names, paths)
    ]
    if len(subjects) > 1:
        for subject in subjects:
            subject.models = dict([list(subject.models.items())[-1]])
    return subjects


def _look_at_run(name: str, run: Path) -> Subject:
    config, table = run / "config.yaml", run / "metrics.csv"
    if not config.is_file() or not table.is_file():
        raise UserError(
            f"{run}: no run in it (config.yaml, metrics.csv); name the --exp_dir of a stage, or a .pth file"
        )
    found = Subject(name, run, {}, is_run=True, config=config.read_text(encoding="utf-8", errors="replace"))
    try:
        found.recipe, _ = parse_recipe(["--config", str(config)])
    except UserError as error:  # of an older version
        found.notes.append(f"{error}. Left out: the teacher, and what is compared with it.")
    else:
        if found.teacher is None:
            missing = found.recipe.teacher_ckpt
            found.notes.append(f"The teacher {missing} of {name} was not found: nothing is compared with it.")
    curves, rows = read_curves(table)
    prunes = "sparsity/expected" in curves  # the recipe of step 2 names the units, too
    found.tables.append(table)
    found.steps.append(_step(STEP_1 if prunes else ONE_STEP, curves, rows))
    if prunes and (table := run / "final" / "metrics.csv").is_file():
        found.tables.append(table)
        found.steps.append(_step(STEP_2, *read_curves(table)))
    if not prunes and (run / "final.pth").is_file():
        found.models[STUDENT] = run / "final.pth"
    elif (run / "pruned.pth").is_file():
        found.models[PRUNED] = run / "pruned.pth"
        if (run / "final" / "final.pth").is_file():
            found.models[FINAL] = run / "final" / "final.pth"
    elif (run / "ckpts" / "last.ckpt").is_file():
        found.models[MASKED if prunes else STUDENT] = run / "ckpts" / "last.ckpt"
    else:
        raise UserError(f"{run}: no model in it yet (ckpts/last.ckpt, pruned.pth or final.pth)")
    return found


def _save_student(last: Path, out: Path) -> None:
    student = read_distilled(last, pruned=False)
    model = prune(student.model)[0] if student.model.masks() else student.model
    save_model(out, model, student.heads)


def made_with(subjects: Sequence[Subject], effort: Effort) -> dict[str, Any]:
    """What decides about the numbers besides the files."""
    return {"arguments": [subject.name for subject in subjects], **asdict(effort)}


def hash_files(subjects: Sequence[Subject]) -> list[HashedFile]:
    """SHA-256 of everything that the page depends on; what several arguments share is there once."""
    users: dict[tuple[str, Path], list[str]] = {}
    for subject in subjects:
        for role, path in subject.files().items():
            users.setdefault((role, path), []).append(subject.name)
    roles = {(role if len(subjects) == 1 else f"{', '.join(names)}: {role}"): path
             for (role, path), names in users.items()}  # fmt: skip
    hashed = []
    total = sum(path.stat().st_size for path in roles.values())
    with tqdm(total=total, desc="sha256", unit="B", unit_scale=True, dynamic_ncols=True, delay=3) as bar:
        for role, path in roles.items():
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(1 << 22):
                    digest.update(block)
                    bar.update(len(block))
            hashed.append(HashedFile(role, str(path), path.stat().st_size, digest.hexdigest()))
    return hashed


def is_up_to_date(page: Path, files: Sequence[HashedFile], made_with: dict[str, Any]) -> bool:
    """Whether a page was made from files with this content, in the same way; whatever their dates are.

    Args:
        page: the .html file; its numbers stand beside it.
        files: of the arguments.
        made_with: of :func:`made_with`.
    """
    try:
        found = json.loads(page.with_suffix(".json").read_text(encoding="utf-8"))
        before = [(file["role"], file["sha256"]) for file in found["files"]]
        same = before == [(file.role, file.sha256) for file in files] and found["made_with"] == _plain(made_with)
        return same and found["incomplete"] is False and page.is_file()
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # none, or that of an older version
        return False


def collect(subject: Subject, files: list[HashedFile], effort: Effort) -> Report:
    """Gather the report of one run or model.

    Args:
        subject: of :func:`look_at`.
        files: of :func:`hash_files`.
        effort: how much is measured.

    Raises:
        UserError: a file of the run is damaged.
        CheckpointError: a model file is damaged.
    """
    report = Report(
        subject.name if subject.is_run else subject.path.name, made_with([subject], effort), files=files,
        notes=list(subject.notes), steps=subject.steps, config=subject.config,
    )  # fmt: skip
    recipe, teacher = subject.recipe, subject.teacher
    if recipe is not None and subject.steps[0].name == STEP_1:
        report.target_sparsity = recipe.pruning.target_sparsity
    with subject.students() as students:
        known = {TEACHER: teacher} if teacher is not None else {}
        report.models = measure_models({**known, **students}, effort)
        if recipe is not None and teacher is not None:
            set_teacher(report, TEACHER, students)
            held_out = compare_with_teacher(report, recipe, (TEACHER, teacher), students, effort)
            report.held_out_data = held_out.data if held_out is not None else None
    return report


def measure_models(paths: Mapping[str, Path], effort: Effort) -> list[ModelReport]:
    """Sizes, cost, speed in turns, and architectures of model files by name."""
    costs = measure(
        paths, seconds=[SPEED_SECONDS], batch=[SPEED_BATCH], devices=effort.devices, rounds=effort.rounds
    )  # fmt: skip
    models = []
    for cost, path in zip(costs, paths.values()):
        model = load_checkpoint(path).model
        found = prune(model)[1] if model.masks() else model.config
        models.append(ModelReport(cost.name, cost, architecture(found)))
    return models


def set_teacher(page: Page, teacher: str, students: Mapping[str, Path]) -> None:
    """Say which model others are compared with."""
    reference = page.model(teacher)
    assert reference is not None
    for model in page.models:
        if model.name in students:
            model.teacher = teacher
            model.sparsity = 1 - model.cost.num_params / reference.cost.num_params


def compare_with_teacher(
    page: Page, recipe: Recipe, teacher: tuple[str, Path], students: Mapping[str, Path], effort: Effort
) -> HeldOut | None:
    """Fill in the held-out numbers; where the audio has gone there is still a page, with a note.

    Args:
        page: has all models.
        recipe: objective and validation list.
        teacher: its name, and its file.
        students: model files by name.
        effort: how much audio.
    """
    network = load_checkpoint(teacher[1]).model
    loaded = {name: load_checkpoint(path) for name, path in students.items()}
    try:
        held_out = evaluate(recipe, network, loaded, effort.seconds, effort.devices[-1])
    except UserError as error:
        logger.warning("no held-out numbers: %s", error)
        page.notes.append(f"No held-out numbers for {', '.join(students)}: {error}.")
        page.incomplete = True
        return None
    for name, distance in held_out.students.items():
        entry = page.model(name)
        assert entry is not None
        entry.held_out = distance
    page.notes += [f"No held-out loss for {name}: {reason}." for name, reason in held_out.without_loss.items()]
    page.notes += [f"No distances per layer for {name}: its depth, width or frame rate is not that of the teacher."
                   for name, distance in held_out.students.items() if not distance.cosine]  # fmt: skip
    entry = page.model(teacher[0])
    assert entry is not None
    entry.held_out = Distance(loss=floor_of(recipe, network))
    return held_out


def read_curves(path: Path) -> tuple[dict[str, Curve], int]:
    """Columns of a metrics.csv without their gaps, and its number of rows; what is no finite number is left out.

    Raises:
        UserError: the file is no table of metrics.
    """
    curves: dict[str, Curve] = {}
    rows = 0
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                rows += 1
                step = int(row.pop("step"))
                for name, text in row.items():
                    if text and math.isfinite(value := float(text)):
                        curves.setdefault(name, []).append((step, value))
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path}: not the metrics of a run ({error}); remove it or train again") from None
    return curves, rows


def _step(name: str, curves: dict[str, Curve], rows: int) -> Step:
    thin = {column: thinned(points) for column, points in curves.items()}
    how = None
    if any(len(points) < len(curves[column]) for column, points in thin.items()):
        how = f"at most {MAX_POINTS} points per curve: first, last, lowest and highest of equal stretches of rows"
    return Step(name, rows, how, thin)


def thinned(points: Curve, most: int = MAX_POINTS) -> Curve:
    """At most ``most`` points of a curve: first, last, and the lowest and highest of equal stretches between them."""
    if len(points) <= most:
        return points
    inner, stretches = points[1:-1], (most - 2) // 2
    kept = {points[0], points[-1]}
    for i in range(stretches):
        stretch = inner[i * len(inner) // stretches : (i + 1) * len(inner) // stretches]
        kept |= {min(stretch, key=lambda point: point[1]), max(stretch, key=lambda point: point[1])}
    return sorted(kept)


def closing_table(models: Sequence[ModelReport]) -> str:
    """Models side by side for the terminal: size, compute, held-out loss and speed."""
    rows = []
    for model in models:
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


def to_json(page: Page) -> str:
    """The numbers of a page as text, lists of numbers on one line each."""
    text = json.dumps(page.as_json(), indent=1, allow_nan=False)
    # there is no line break in a string of JSON
    return re.sub(r'\[\n[^]["{}]+\]', lambda numbers: f"[{' '.join(numbers[0][1:-1].split())}]", text)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
