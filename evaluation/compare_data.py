"""What the page about several runs and models says, as data."""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from distillation.config import Recipe, flat_settings
from distillation.training.record import Record, Settings, differences
from evaluation.report_data import (
    Effort,
    Page,
    compare_with_teacher,
    made_with,
    measure_models,
    predict_latency,
    set_teacher,
)
from evaluation.subjects import TEACHER, HashedFile, Step, Subject
from wav2vec2.checkpoint import fingerprint, load_checkpoint

CURVES = ("train/distill", "valid/distill", "sparsity/expected", "sparsity/target")
NAMES_OF_PLACES = ("exp_dir", "base")
IN_TITLE = 4  # names that fit into it
# what else decides which audio of a list is compared, and in what pieces
CHOICE = ("sample_rate", "min_frames", "max_frames", "long", "crop", "valid_seconds_per_batch")


@dataclass
class Group:
    """Models whose losses mean the same: one teacher, one objective, the same audio."""

    teacher: str
    members: list[str]
    data: str | None  # which audio, in words; None where it could not be read


@dataclass
class Comparison(Page):
    """Everything on the page about several runs and models, each run by its last model."""

    runs: list[str] = field(default_factory=list)  # names of the arguments that are runs
    groups: list[Group] = field(default_factory=list)
    quality: Literal["loss", "distance"] | None = None  # what is comparable; the distance is 1 - cosine over all layers
    one_objective: bool = False  # of all runs
    costs: list[str] = field(default_factory=list)  # what the runs were pruned by
    steps: dict[str, list[Step]] = field(default_factory=dict)  # by run, with CURVES alone
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)  # those that differ: name -> run -> value

    @property
    def students(self) -> list[str]:
        """Names of the arguments."""
        return self.made_with["arguments"]

    def quality_of(self, name: str) -> float | None:
        """Of one model; lower is better."""
        model = self.model(name)
        if model is None or model.held_out is None or self.quality is None:
            return None
        if self.quality == "loss":
            return model.held_out.loss
        return sum(model.held_out.cosine) / len(model.held_out.cosine) if model.held_out.cosine else None


def compare(subjects: Sequence[Subject], files: list[HashedFile], effort: Effort) -> Comparison:
    """Measure several runs and models in one go, and gather what tells them apart.

    Args:
        subjects: of `report_data.look_at`.
        files: of `report_data.hash_files`.
        effort: how much is measured.

    Raises:
        UserError: a file of a run is damaged.
        CheckpointError: a model file is damaged.
    """
    names = [subject.name for subject in subjects]
    title = ", ".join(names) if len(names) <= IN_TITLE else f"{names[0]}, {names[1]} and {len(names) - 2} more"
    page = Comparison(title, made_with(subjects, effort), files=files)
    page.notes = [note for subject in subjects for note in subject.notes]
    page.runs = [subject.name for subject in subjects if subject.is_run]
    recipes = {subject.name: subject.recipe for subject in subjects if subject.recipe is not None}
    page.settings = differing({subject.name: subject.settings for subject in subjects if subject.settings})
    objectives = {_as_text(flat_settings(recipe.objective)) for recipe in recipes.values()}
    page.one_objective = len(objectives) == 1 and len(recipes) == len(page.runs)
    page.costs = list(dict.fromkeys(subject.pruning.cost for subject in subjects if subject.pruning is not None))
    for subject in subjects:
        if subject.is_run:
            page.steps[subject.name] = [
                Step(step.name, step.rows, step.thinned, {c: step.curves[c] for c in CURVES if c in step.curves})
                for step in subject.steps
            ]
    with ExitStack() as stack:
        students: dict[str, Path] = {}
        stages: dict[str, str] = {}
        for subject in subjects:
            [(stage, students[subject.name])] = stack.enter_context(subject.students()).items()
            if subject.is_run:
                stages[subject.name] = stage
        teachers, gathered = _gather(subjects, files)
        page.models = measure_models({**teachers, **students}, effort)
        for model in page.models:
            model.stage = stages.get(model.name)
        tables = [subject.latency for subject in subjects if subject.latency is not None]
        if tables and all(table.content == tables[0].content for table in tables):
            predict_latency(page, tables[0], {**teachers, **students})
        elif tables:
            page.notes.append("The runs have different latency tables: no milliseconds by them.")
        for recipe, group in gathered:
            members = {name: students[name] for name in group.members}
            set_teacher(page, group.teacher, members)
            held_out = compare_with_teacher(page, recipe, (group.teacher, teachers[group.teacher]), members, effort)
            group.data = held_out.data if held_out is not None else None
            page.groups.append(group)
    _choose_quality(page)
    return page


def _gather(
    subjects: Sequence[Subject], files: Sequence[HashedFile]
) -> tuple[dict[str, Path], list[tuple[Recipe, Group]]]:
    """Teachers by name, one for each content, and the groups of what is compared, each with a recipe."""
    digests = {file.path: file.sha256 for file in files}
    runs = [(s.name, s.recipe, s.teacher) for s in subjects if s.recipe is not None and s.teacher is not None]
    contents = list(dict.fromkeys(digests[str(teacher)] for _, _, teacher in runs))
    taken = {subject.name for subject in subjects}
    names: dict[str, str] = {}  # content -> name
    teachers: dict[str, Path] = {}
    groups: dict[str, tuple[Recipe, Group]] = {}
    for run, recipe, teacher in runs:
        content = digests[str(teacher)]
        if content not in names:
            name = TEACHER if len(contents) == 1 else f"{TEACHER} of {run}"
            names[content] = name if name not in taken else f"{name} ({teacher})"
            teachers[names[content]] = teacher
        data = flat_settings(recipe.data)
        audio = digests.get(str(recipe.data.tsv_dir / recipe.data.valid))
        key = _as_text([content, flat_settings(recipe.objective), audio, [data[setting] for setting in CHOICE]])
        groups.setdefault(key, (recipe, Group(names[content], [], None)))[1].members.append(run)
    if groups:
        recipe, group = next(iter(groups.values()))
        wanted = {name: value for name, value in flat_settings(recipe).items() if name.startswith("objective.")}
        if files_alone := [s for s in subjects if not s.is_run]:
            wanted["teacher"] = fingerprint(load_checkpoint(teachers[group.teacher]).model)
        group.members += [s.name for s in files_alone if _fits(s.path, wanted)]
    return teachers, list(groups.values())


def _fits(path: Path, wanted: Settings) -> bool:
    """Whether a model file may be compared by these settings: it says nothing of its own, or the same."""
    record = Record.read(load_checkpoint(path).extra, path)
    return record is None or not differences(record.settings, wanted)


def _choose_quality(page: Comparison) -> None:
    """What is drawn against costs, with a word on what cannot be compared."""
    compared = {name for group in page.groups for name in group.members}
    held_out = [model for model in page.models if model.name in compared and model.held_out is not None]
    if len(page.groups) == 1 and compared.issuperset(page.runs) and any(m.loss is not None for m in held_out):
        page.quality = "loss"
    elif any(model.held_out is not None and model.held_out.cosine for model in held_out):
        page.quality = "distance"
    if len(page.groups) > 1:
        apart = "; ".join(", ".join(group.members) for group in page.groups)
        page.notes.append(
            f"Losses of different teachers, objectives or validation data are not comparable: compare them only among "
            f"{apart}. Quality is the distance to the teacher instead, the mean of 1 - cosine similarity over layers."
        )
        if len({group.data for group in page.groups}) > 1:
            page.notes.append("The distances are not all computed on the same audio.")
    if page.groups and page.quality is None:
        page.notes.append("No quality against cost: no model has a loss or a distance to the teacher.")
    without = [name for name in page.students if name not in compared]
    if page.groups and without:
        page.notes.append(
            f"Not compared with a teacher, there is none or theirs or their objective is another: {', '.join(without)}."
        )


def differing(flat: Mapping[str, Settings]) -> dict[str, dict[str, Any]]:
    """Settings that are not the same in all runs: name -> run -> value; a section that is null has none.

    Args:
        flat: by run.
    """
    names = sorted({name for settings in flat.values() for name in settings}.difference(NAMES_OF_PLACES))
    found = {name: {run: settings[name] for run, settings in flat.items() if name in settings} for name in names}
    return {
        name: values
        for name, values in found.items()
        if len(values) < len(flat) or len(set(map(_as_text, values.values()))) > 1
    }


def _as_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
