"""What the page about one run or model says, as data, and what it has in common with the page about several."""

import importlib.metadata
import json
import logging
import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from distillation.config import Recipe
from distillation.errors import UserError
from distillation.latency import LatencyTable
from distillation.sparsity import PruningConfig, make_budget
from evaluation.cost import Cost, Speed, measure
from evaluation.held_out import Distance, HeldOut, evaluate, floor_of
from evaluation.subjects import TEACHER, HashedFile, Step, Subject
from evaluation.tables import format_table
from wav2vec2 import prune
from wav2vec2.architecture import Architecture, architecture
from wav2vec2.checkpoint import load_checkpoint

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "numpy", "pytorch-lightning", "jsonargparse", "soundfile")
SPEED_SECONDS, SPEED_BATCH = 10.0, 1
DIGITS = 6  # significant ones in the JSON


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
    table_ms: float | None = None  # milliseconds by the latency table of the page

    @property
    def loss(self) -> float | None:
        """On held-out audio, where it is known."""
        return self.held_out.loss if self.held_out is not None else None

    def speed(self, device: str) -> Speed | None:
        """On that device, where it was measured."""
        return next((speed for speed in self.cost.speed if speed.device == device), None)


@dataclass
class BudgetReport:
    """What a run was pruned to, and what came out: numbers of the cost, in parameters, MACs or milliseconds."""

    cost: str
    before: float  # of the teacher
    target: float
    sparsity: float
    reached: float  # of the last model
    unit: str  # for people
    text: str


@dataclass
class Page:
    """What the pages about one argument and about several have in common."""

    title: str
    made_with: dict[str, Any]  # names of the arguments, and the effort
    models: list[ModelReport] = field(default_factory=list)  # teachers first, where they are known
    files: list[HashedFile] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=lambda: versions())
    notes: list[str] = field(default_factory=list)  # what is missing, and why
    latency: str | None = None  # the table that predicts milliseconds, and their utterance
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
    budget: BudgetReport | None = None
    steps: list[Step] = field(default_factory=list)
    config: str | None = None  # resolved YAML

    @property
    def teacher(self) -> ModelReport | None:
        """What the last model is compared with."""
        return self.model(self.models[-1].teacher)


def made_with(subjects: Sequence[Subject], effort: Effort) -> dict[str, Any]:
    """What decides about the numbers besides the files."""
    return {"arguments": [subject.name for subject in subjects], **asdict(effort)}


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
    if subject.pruning is not None and subject.pruning.target is None:
        report.target_sparsity = subject.pruning.target_sparsity
    with subject.students() as students:
        known = {TEACHER: teacher} if teacher is not None else {}
        report.models = measure_models({**known, **students}, effort)
        if subject.latency is not None:
            predict_latency(report, subject.latency, {**known, **students})
        if subject.pruning is not None and teacher is not None:
            _set_budget(report, subject, subject.pruning, teacher, list(students.values())[-1])
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


def predict_latency(page: Page, table: LatencyTable, paths: Mapping[str, Path]) -> None:
    """Fill in what a latency table says of all models; a note names those that it is not of.

    Args:
        page: has all models.
        table: of the recipe.
        paths: model files by name.
    """
    name = Path(str(table.source)).name
    failed: dict[str, UserError] = {}
    for entry in page.models:
        model = load_checkpoint(paths[entry.name]).model
        try:
            table.check(model)
        except UserError as error:
            failed[entry.name] = error
        else:
            with torch.inference_mode():
                entry.table_ms = table(model).item()
                page.latency = f"{name}, {table.seconds:g} s"
    if failed:
        page.notes.append(f"No milliseconds by {name} for {', '.join(failed)}: {next(iter(failed.values()))}.")


def _set_budget(report: Report, subject: Subject, pruning: PruningConfig, teacher: Path, result: Path) -> None:
    """Say what the last model was to cost, and what it does."""
    entry, budget = report.model(TEACHER), subject.budget
    assert entry is not None
    if budget is None and pruning.cost == "milliseconds" and entry.table_ms is None:
        return  # there is a note on the table
    with torch.inference_mode():
        try:
            budget = budget or make_budget(pruning, load_checkpoint(teacher).model)
        except UserError as error:
            report.notes.append(f"No budget: {error}.")
            return
        reached = budget.cost(load_checkpoint(result).model).item()
    cost, before, target = budget.cost, budget.before, budget.target
    report.target_sparsity = budget.sparsity
    text = (
        f"Budget: {cost.text(target)} of the teacher's {cost.text(before)}, a sparsity of {budget.sparsity:.4g}; "
        f"reached: {cost.text(reached)}"
    )
    report.budget = BudgetReport(cost.name, before, target, budget.sparsity, reached, cost.unit, text)


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
            "-" if cpu is None else format_ms(cpu.milliseconds),
        ])  # fmt: skip
    header = ["model", "parameters", "GMACs (10 s)", "held-out loss", "CPU milliseconds (10 s)"]
    return format_table(header, rows)


def format_ms(value: float) -> str:
    """Milliseconds, about four digits."""
    return f"{value:,.1f}" if value >= 100 else f"{value:.2f}"


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
