"""Arguments of report.py: the folder of a run, or a model file; what is in them, before anything is measured.

An argument is first looked at (:func:`look_at`), which reads its tables and says what files the numbers will depend on;
then their hashes are taken, and only then something is measured.
"""

import contextlib
import csv
import hashlib
import logging
import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from distillation import identity
from distillation.budget import BUDGET, Budget
from distillation.config import Recipe, flat_settings, parse_recipe
from distillation.distilled import read_distilled
from distillation.errors import UserError
from distillation.latency import LatencyTable, read_latency
from distillation.lists import read_valid, wanted_vocabulary
from distillation.sparsity import PruningConfig
from distillation.training.record import RUN, Record, Settings
from wav2vec2 import prune, save_model
from wav2vec2.checkpoint import CheckpointError, fingerprint, load_checkpoint

logger = logging.getLogger(__name__)

TEACHER, MASKED, PRUNED, FINAL, STUDENT = "teacher", "after step 1", "pruned", "final", "student"
STEP_1, STEP_2, ONE_STEP = "Step 1: distillation and pruning", "Step 2: distillation", "Distillation"
MAX_POINTS = 400  # of a curve; charts are 288 pixels wide inside

Curve = list[tuple[int, float]]  # (update, value)


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
class Subject:
    """An argument of the command, before anything is measured: the folder of a run, or a model file.

    Attributes:
        name: unique among the arguments.
        path: the argument.
        models: stage -> file in the order of the stages; ``ckpts/last.ckpt`` stands for the model that its masks make.
        is_run: or a model file.
        config: resolved YAML of a run.
        recipe: what the config says; None where it cannot be read.
        settings: of both steps by dotted name, those that were changed in the middle of a run with their changes.
        teacher: that the run was trained with; None where it is not there.
        pruning: settings of the recipe; None where nothing is pruned.
        budget: what prune.py met; None before it has run, and where an older version of it has.
        latency: table that the recipe names; None where there is none, or it is another now.
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
    settings: Settings = field(default_factory=dict)
    teacher: Path | None = None
    pruning: PruningConfig | None = None
    budget: Budget | None = None
    latency: LatencyTable | None = None
    steps: list[Step] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

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
        if self.pruning is not None and self.pruning.latency is not None and self.pruning.latency.is_file():
            found[identity.LATENCY] = self.pruning.latency
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
    step_1, step_2 = Record.load(run), Record.load(run / "final")
    try:
        found.recipe, _ = parse_recipe(["--config", str(config)])
    except UserError as error:  # of an older version
        found.notes.append(f"{error}. Left out: the teacher, and what is compared with it.")
    else:
        _compare_content(found, found.recipe, step_1)
        found.settings = flat_settings(found.recipe)
        found.settings |= {k: v for k, v in (step_1.told() if step_1 else {}).items() if k in found.settings}
        found.settings |= {k: v for k, v in (step_2.told() if step_2 else {}).items() if k.startswith("final.")}
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
    _check_stages(found, step_2)
    if prunes and found.recipe is not None:
        found.pruning = found.recipe.pruning
        if found.pruning.latency is not None:
            _look_at_latency(found, found.pruning.latency, {} if step_1 is None else step_1.settings)
    return found


def _compare_content(run: Subject, recipe: Recipe, record: Record | None) -> None:
    """Find the teacher, unless its file holds another model now than in training; look at the held-out list, too."""
    path, trained = recipe.teacher_ckpt, {} if record is None else record.settings
    if not path.is_file():
        run.notes.append(f"The teacher {path} of {run.name} was not found: nothing is compared with it.")
        return
    try:
        model = load_checkpoint(path).model
        teacher = fingerprint(model)
    except CheckpointError as error:
        run.notes.append(f"{error}: nothing is compared with the teacher of {run.name}.")
        return
    if trained.get("teacher", teacher) != teacher:
        run.notes.append(f"{path} is another teacher now than {run.name} had: nothing is compared with it.")
        return
    run.teacher = path
    with contextlib.suppress(UserError):  # it is missed later
        listed = read_valid(recipe, wanted_vocabulary(recipe, model, model))
        valid = identity.describe_list(listed, recipe.data.sample_rate)
        if trained.get("valid list", valid) != valid:
            run.notes.append(f"{recipe.data.valid} holds other utterances now than {run.name} was validated on.")


def _check_stages(run: Subject, step_2: Record | None) -> None:
    """Say what prune.py was told and what it was to meet, and where it was run again and step 2 was not."""
    if PRUNED not in run.models:
        return
    pruned = load_checkpoint(run.models[PRUNED])
    entry = pruned.extra.get(RUN)
    told = entry.get(identity.PRUNED) if isinstance(entry, dict) else None
    if isinstance(told, dict):
        run.settings |= {name: value for name, value in told.items() if value is not False}
    if isinstance(entry, dict) and BUDGET in entry:
        run.budget = Budget.read(entry[BUDGET], run.models[PRUNED])
    student = None if step_2 is None else step_2.settings.get(identity.STUDENT)
    if FINAL in run.models and student not in (None, fingerprint(pruned.model, pruned.heads)):
        run.notes.append(f"final.pth of {run.name} was not made of its pruned.pth, which prune.py has written anew.")


def _look_at_latency(run: Subject, path: Path, trained: Settings) -> None:
    """Find the latency table of the recipe, unless the file holds another now than in training."""
    try:
        table = read_latency(path)
    except UserError as error:
        run.notes.append(f"{error}. Left out of {run.name}: what depends on it.")
        return
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if trained.get(identity.LATENCY, digest) != digest:
        run.notes.append(f"{path} is another latency table now than {run.name} had: it is not used.")
        return
    run.latency = table


def _save_student(last: Path, out: Path) -> None:
    student = read_distilled(last, pruned=False)
    model = prune(student.model)[0] if student.model.masks() else student.model
    save_model(out, model, student.heads)


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
