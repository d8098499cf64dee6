"""Which settings of a recipe make a run of step 1 or step 2 what it is, and which may change while it goes on."""

import hashlib
import logging
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from distillation.budget import MACS_SECONDS, Milliseconds, MultiplyAccumulates
from distillation.config import Recipe, flat_settings
from distillation.data.manifest import Manifest
from distillation.errors import UserError
from distillation.lists import Lists
from distillation.training.record import RUN, Identity, Kinds, Record, Settings, describe, differences
from wav2vec2 import Wav2Vec2Model
from wav2vec2.checkpoint import Checkpoint, fingerprint

logger = logging.getLogger(__name__)

STUDENT = "student model"  # setting: the content of the file that a step starts from
LATENCY = "latency table"  # setting: the content of the table that milliseconds come from
DROPOUT = "dropout of step 2"  # setting: older versions trained step 2 without the student's
PRUNED = "pruned"  # entry of a pruned model's record: the settings that prune.py had
FAITHFUL = "prune.py --faithful"
# Where something is or what it was made of; the content counts, and is checked where it is read.
NAMES = {
    "base", "exp_dir", "teacher_ckpt", "teacher_id", "teacher_layers", "teacher_width", "student_ckpt", "data.tsv_dir",
    "data.train", "data.valid", "data.transcripts.train", "data.transcripts.valid", "data.transcripts.audio",
    "data.noise.folders", "data.noise.impulse_responses", "continue_with_changes", "pruning.latency",
}  # fmt: skip
FREE = frozenset({
    "data.num_workers", "data.max_bad_share", "data.valid_seconds_per_batch",
    # how an update is cut; their product, "update", is what counts
    "data.seconds_per_batch", "data.utterances_per_batch", "trainer.batches_per_update",
    "trainer.accelerator", "trainer.devices", "trainer.num_nodes", "trainer.precision", "trainer.teacher_precision",
    "trainer.recompute", "trainer.log_every", "trainer.validate_every", "trainer.checkpoint_every",
    "trainer.checkpoint_minutes", "trainer.max_skipped_updates",
})  # fmt: skip
OPTIM_RATES = (
    "max_steps", "max_epochs", "lr", "freeze_steps", "lr_new", "warmup_steps", "warmup_ratio", "schedule", "betas",
    "eps", "weight_decay", "clip",
)  # fmt: skip
NOT_YET = {"data.transcripts": None, "data.noise": None, "objective.ctc": None}  # in older versions
STEP_1 = Kinds(
    elsewhere=frozenset(NAMES | {"final", "final."}),
    free=FREE,
    rates=frozenset(
        {f"optim.{name}" for name in OPTIM_RATES} | {"pruning.lr_masks", "pruning.lr_lagrangian", "pruning.constant_lr"}
    ),
    meant=NOT_YET
    | {
        "pruning.cost": "params",
        "pruning.target": None,
        "pruning.macs_seconds": None,
        "pruning.multiple_of": 1,
        "optim.freeze_steps": 0,
        "optim.lr_new": None,
        "student.dropout": None,
    },
)
STEP_2 = Kinds(
    elsewhere=frozenset(NAMES | {"optim.", "pruning.", "student."}),
    free=FREE,
    rates=frozenset(f"final.{name}" for name in OPTIM_RATES),
    meant=NOT_YET | {"final.freeze_steps": 0, "final.lr_new": None, DROPOUT: "none"},
)


def content_of(recipe: Recipe, teacher: Wav2Vec2Model, lists: Lists) -> Settings:
    """What the files that a recipe names hold, and how much audio makes an update.

    Args:
        recipe: all of its settings.
        teacher: dense.
        lists: what it reads.
    """
    data, trainer = recipe.data, recipe.trainer
    if data.utterances_per_batch is None:
        update = f"{data.seconds_per_batch * trainer.batches_per_update:.6g} s"
    else:
        update = f"{data.utterances_per_batch * trainer.batches_per_update} utterances"
    manifests = lists.manifests.items()
    named = {f"{kind} list": describe_list(manifest, data.sample_rate) for kind, manifest in manifests}
    if lists.vocabulary is not None:
        named["vocabulary"] = " ".join(lists.vocabulary)
    if lists.noise is not None:
        named["noise"] = lists.noise.describe()
    return {"teacher": fingerprint(teacher), **named, "update": update}


def step_1_identity(recipe: Recipe, content: Settings, start: Wav2Vec2Model | None = None) -> Identity:
    """What step 1 of a recipe trains.

    Args:
        recipe: all of its settings.
        content: of its files.
        start: the student where the recipe names it as a file.
    """
    settings = flat_settings(recipe)
    if not recipe.pruning.units:
        settings = {k: v for k, v in settings.items() if not k.startswith("pruning.") or k == "pruning.units"}
    else:
        if recipe.pruning.target is not None:
            settings["pruning.target_sparsity"] = None
        if recipe.pruning.cost != MultiplyAccumulates.name:
            settings["pruning.macs_seconds"] = None
        elif recipe.pruning.target is None:
            settings["pruning.macs_seconds"] = recipe.pruning.macs_seconds or float(MACS_SECONDS)
    if start is not None:
        settings = {k: v for k, v in settings.items() if not k.startswith("student.") or k == "student.dropout"}
    content = content | {STUDENT: None if start is None else fingerprint(start)} | _latency_table(recipe)
    return Identity.of(_used(settings, "optim."), STEP_1, content)


def step_2_identity(recipe: Recipe, content: Settings, student: Wav2Vec2Model, heads: Mapping[str, Tensor]) -> Identity:
    """What step 2 of a recipe trains.

    Args:
        recipe: all of its settings.
        content: of its files.
        student: pruned.
        heads: that it begins with.
    """
    content = content | {STUDENT: fingerprint(student, heads), DROPOUT: "of the student"}
    return Identity.of(_used(flat_settings(recipe), "final."), STEP_2, content)


def check_student(student: Checkpoint, source: object, step_1: Identity, on_request: bool) -> None:
    """Look whether a student that is to be distilled again was made by the same recipe.

    Args:
        student: content of its file, which says what run it comes from if it is one of prune.py.
        source: the file, for messages.
        step_1: what step 1 of the recipe trains.
        on_request: take it whatever it was made by.

    Raises:
        UserError: it was made by another recipe, with all differences.
    """
    record = Record.read(student.extra, source)
    if record is None:
        logger.info("%s: does not say which recipe it was made by", source)
        return
    entry = student.extra[RUN]
    pruned = entry.get(PRUNED, {})
    if not isinstance(pruned, dict):
        raise UserError(f"{source}: damaged, its record of the run cannot be read")
    changed = differences(STEP_1.completed(record.settings) | pruned, step_1.settings)
    changed = {name: pair for name, pair in changed.items() if STEP_1.of(name) != "free" and name != STUDENT}
    if entry.get("update") != entry.get("length"):
        changed["updates of step 1"] = entry.get("update"), entry.get("length")
    if pruned.get(FAITHFUL):
        logger.info("%s was made by prune.py --faithful: its size is what the rule per layer gave", source)
    if changed and not on_request:
        raise UserError(
            f"{source} was made by another recipe: {describe(changed)}; run distill.py and prune.py with these "
            "settings first, or give those it was made with, or --continue_with_changes to distil it all the same"
        )
    if changed:
        logger.warning("%s was made by another recipe: %s", source, describe(changed))


def describe_list(manifest: Manifest, sample_rate: int) -> str:
    """Which utterances, wherever their root is mounted."""
    if manifest.texts is None or manifest.starts is None:
        digest = hashlib.sha256("\n".join(manifest.paths).encode())
        digest.update(manifest.num_frames.tobytes())
    else:
        names = (Path(path).name for path in manifest.paths)
        rows = list(zip(names, manifest.num_frames.tolist(), manifest.starts.tolist(), manifest.texts))
        digest = hashlib.sha256(repr(rows).encode())
    hours = manifest.num_frames.sum() / sample_rate / 3600
    return f"{len(manifest)} utterances of {hours:.2f} h, {digest.hexdigest()}"


def _latency_table(recipe: Recipe) -> Settings:
    """What it holds, where it counts; after step 1 it may be gone."""
    path = recipe.pruning.latency
    if path is None or recipe.pruning.cost != Milliseconds.name or not recipe.pruning.units or not path.is_file():
        return {}
    return {LATENCY: hashlib.sha256(path.read_bytes()).hexdigest()}


def _used(settings: Settings, optim: str) -> Settings:
    """Null for lengths in updates where those in epochs or as shares are used instead."""
    settings = dict(settings)
    for used, unused in (("max_epochs", "max_steps"), ("warmup_ratio", "warmup_steps")):
        if settings.get(optim + used) is not None:
            settings[optim + unused] = None
    return settings
