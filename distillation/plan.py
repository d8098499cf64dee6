"""What a shell recipe will do, and everything that stands in its way: said before lists or a teacher are made.

    python -m distillation.plan AUDIO_DIR [--adapt] --config conf/dphubert_base.yaml FLAGS...

With --adapt the recipe follows teacher, audio and machine where it is written for others; the flags win over what is
derived. Prints a line per answer for scripts/common.sh: "plan", the folder of the lists to make, what to convert the
teacher from (both empty where they are there), the teacher's file, the folder of the run, what it prunes, whether the
teacher keeps its output layer, what is said in the validation audio, where its files are, in which case it is written
(empty where that does not matter), all flags.
A new run gets recipe.yaml, which says the same as all flags together.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from distillation.budget import Budget
from distillation.build import planned_student
from distillation.config import MAX_RECIPE_BYTES, RECIPES, Recipe, flat_settings, parse_recipe
from distillation.data.conversion import copies_of
from distillation.data.corpus import Layout, find, layout_of
from distillation.data.noise import Noise
from distillation.deriving import LIST_100H, Derived, for_audio, for_length, for_machine, for_teacher, run_name
from distillation.errors import Problems, UserError, command
from distillation.identity import step_1_identity
from distillation.objectives import Objectives
from distillation.recognition.manifests import find_sources
from distillation.sparsity import check_budget, make_budget, make_prunable
from distillation.teacher import check_size, teacher_config, wants_head
from distillation.training.memory import BATCH
from distillation.training.record import Record
from distillation.training.standing import LAST
from distillation.yamlfile import read_yaml
from wav2vec2 import CheckpointError, wav2vec2_model
from wav2vec2.checkpoint import write_text
from wav2vec2.counting import count_params

logger = logging.getLogger("plan")
RECIPE = "recipe.yaml"  # in the folder of a run
AUDIO = "audio"  # 16 kHz copies, in the folder of the lists
Found = TypeVar("Found")


@dataclass
class Plan:
    """What will run.

    Attributes:
        audio: folder.
        source: the recipe that it builds on.
        published: the same, read.
        recipe: with everything that is derived, and the user's flags.
        words: all flags in the order in which they are read: the user's recipes, what is derived, the user's flags.
        derived: settings, in the order in which they came about.
        teacher: flat config; None where it could not be found out.
        world_size: processes.
        sizes: parameters of teacher, student where it starts and heads; None where they cannot be built.
        budget: of the pruning; None where nothing is pruned or it cannot be found out.
        problems: what must be put right first.
    """

    audio: Path
    source: Path
    published: Recipe
    recipe: Recipe
    words: list[str]
    derived: Derived
    teacher: dict[str, Any] | None = None
    world_size: int = 1
    sizes: tuple[int, int, int] | None = None
    budget: Budget | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def lists(self) -> list[Path]:
        """Training and validation list, whether they are there or not."""
        return [self.recipe.data.tsv_dir / name for name in (self.recipe.data.train, self.recipe.data.valid)]

    @property
    def transcripts(self) -> list[Path]:
        """Where it is said what is spoken; empty where that does not matter."""
        data = self.recipe.data
        return [] if data.transcripts is None else [data.transcribed("train"), data.transcribed("valid")]

    @property
    def brings_lists(self) -> bool:
        """Whether the recipe names transcribed audio that prepare_data.py has no part in."""
        transcripts = self.recipe.data.transcripts
        return transcripts is not None and transcripts.train is not None and transcripts.valid is not None

    @property
    def has_lists(self) -> bool:
        """Whether all are there."""
        if self.brings_lists:
            return all(path.exists() for path in self.transcripts)
        return all(path.exists() for path in [*self.lists, *self.transcripts])

    def look(self, function: Callable[..., Found], *args: Any) -> Found | None:
        """What a function returns; what it refuses is one problem more."""
        try:
            return function(*args)
        except (UserError, CheckpointError) as error:
            self.problems.append(str(error))
            return None


def as_flags(settings: dict[str, Any]) -> list[str]:
    """Settings by dotted names as words of a command line."""
    return [word for key, value in settings.items() for word in (f"--{key}", _text(value))]


def _text(value: Any) -> str:
    return str(value) if isinstance(value, str | Path) else json.dumps(value)


def make_plan(audio: Path, source: Path, flags: list[str], adapt: bool) -> Plan:
    """Derive what is to be derived, and look at everything that can be known now.

    Args:
        audio: folder.
        source: the recipe.
        flags: of the user, further recipes included.
        adapt: follow teacher, audio and machine.

    Raises:
        UserError: the recipe or the flags are wrong by themselves.
    """
    published, _ = parse_recipe(["--config", str(source)])
    recipes, flags = _split(flags)
    asked, _ = parse_recipe(["--config", str(source), *recipes, *flags])
    plan = Plan(audio, source, published, asked, [], Derived.nothing())
    plan.look(_check_named_teacher, asked, flags)
    plan.teacher = plan.look(teacher_config, asked) if not plan.problems else None
    layout = layout_of(audio) if audio.is_dir() else None
    if layout is None:
        plan.problems.append(f"{audio}: no such folder")
    devices = plan.look(asked.trainer.find_devices)
    if devices is not None:
        plan.world_size = devices[1] * asked.trainer.num_nodes

    _derive(plan, asked, layout, None if devices is None else devices[0], adapt)
    derived = plan.derived
    for path in recipes[1::2]:
        derived.drop(_names(read_yaml(Path(path), MAX_RECIPE_BYTES, "a recipe") or {}))
    plan.recipe, _ = parse_recipe(["--config", str(source), *recipes, *as_flags(derived.settings), *flags])
    derived.keep(flat_settings(plan.recipe))
    plan.words = [*recipes, *as_flags(derived.settings), *flags]
    _check(plan, layout, None if devices is None else devices[0])
    return plan


def _derive(plan: Plan, asked: Recipe, layout: Layout | None, accelerator: str | None, adapt: bool) -> None:
    """What the recipe does not say; ``layout`` and ``accelerator`` are None where they could not be found out."""
    derived, published = plan.derived, plan.published
    if layout is not None and not plan.brings_lists:
        for_audio(derived, asked, layout, adapt)
        if asked.data.tsv_dir == published.data.tsv_dir:
            folder = _lists_folder(layout, plan.audio, published.data.tsv_dir)
            if folder != published.data.tsv_dir:
                derived.add("lists of this audio alone", {"data.tsv_dir": folder})
    if not adapt:
        return
    if plan.teacher is not None:
        for_teacher(derived, asked, plan.teacher["encoder_num_layers"], plan.teacher["encoder_embed_dim"])
    if accelerator is not None:
        for_machine(derived, asked, published, accelerator, plan.world_size)
    exp_dir = asked.exp_dir
    if layout is not None and exp_dir == published.exp_dir:
        exp_dir = run_name(asked, published, plan.source.stem, plan.audio, layout)
        if exp_dir != published.exp_dir:
            derived.add("a folder for this teacher and audio", {"exp_dir": exp_dir})
    begun = exp_dir / RECIPE
    if (exp_dir / LAST).is_file() and begun.is_file():  # what a run derived when it began stays, however long it gets
        asked, _ = parse_recipe(["--config", str(begun)])
    for_length(derived, asked, published)


def _check(plan: Plan, layout: Layout | None, accelerator: str | None) -> None:
    """Everything that can stand in the way; arguments as of :func:`_derive`."""
    recipe, teacher = plan.recipe, plan.teacher
    if layout is not None:
        plan.look(_check_lists, plan, layout)
    if recipe.data.noise is not None:
        plan.look(Noise, recipe.data.noise, recipe.seed)
    if accelerator is not None:
        plan.look(recipe.trainer.micro_batches, plan.world_size)
    if os.environ.get("FIT_BATCH") == "1" and accelerator == "cpu" and not (recipe.exp_dir / BATCH).is_file():
        plan.problems.append("FIT_BATCH=1 measures the memory of a GPU, and this run trains on the CPU: leave it out")
    record = Record.load(recipe.exp_dir) if (recipe.exp_dir / LAST).is_file() else None
    if record is not None and recipe.student_ckpt is None:  # what files hold and what may change is looked at later
        plan.look(record.go_on, step_1_identity(recipe, {}), 0, recipe.exp_dir / LAST, True)
    if teacher is not None:
        name, before = recipe.teacher_id or recipe.teacher_ckpt, len(plan.problems)
        plan.look(check_size, recipe, name, teacher["encoder_num_layers"], teacher["encoder_embed_dim"])
        if len(plan.problems) == before:  # of another size, nothing fits
            plan.look(_check_models, plan)


def _split(flags: list[str]) -> tuple[list[str], list[str]]:
    """The recipes among flags, ``--config PATH`` each, and the rest."""
    recipes: list[str] = []
    rest: list[str] = []
    words = iter(flags)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--config":
            recipes += ["--config", value if equals else next(words, "")]
        else:
            rest.append(word)
    return recipes, rest


def _names(content: Any, prefix: str = "") -> set[str]:
    """Dotted names of the settings in a recipe's YAML."""
    if not isinstance(content, dict):
        return {prefix.removesuffix(".")}
    return {name for key, value in content.items() for name in _names(value, f"{prefix}{key}.")}


def _check_named_teacher(asked: Recipe, flags: list[str]) -> None:
    """A file that is named alone is not to be made of the recipe's own teacher."""
    named = {word.partition("=")[0] for word in flags}
    if "--teacher_ckpt" in named and "--teacher_id" not in named and not asked.teacher_ckpt.exists():
        raise UserError(f"{asked.teacher_ckpt}: no such file; with --teacher_id it is made of that teacher")


def _lists_folder(layout: Layout, audio: Path, default: Path) -> Path:
    """Where the lists of a folder of audio are: those of LibriSpeech in the default one, unless it has others."""
    if layout.librispeech:
        roots = {root for name in layout.lists if (root := _root_of(default / name)) is not None}
        if all(_holds(root, default, audio) for root in roots):
            return default
    folder, here = default / audio.name, audio.resolve()
    if here.is_relative_to(folder.resolve()) or folder.resolve().is_relative_to(here):
        return Path("lists") / audio.name  # apart from the audio
    return folder


def _root_of(path: Path) -> Path | None:
    """Root of the audio that a list names on its first line; None where there is no list."""
    if not path.is_file():
        return None
    with path.open(encoding="utf-8", errors="replace") as file:
        return Path(file.readline().rstrip("\r\n"))


def _holds(root: Path, lists: Path, audio: Path) -> bool:
    """Whether lists with this root are of a folder of audio, or of its converted copies."""
    if root in (audio.resolve(), (audio / "LibriSpeech").resolve()):
        return True
    copies = copies_of(root) if root == (lists / AUDIO).resolve() else None
    return copies is not None and copies[0] == layout_of(audio).root.resolve()


def _check_lists(plan: Plan, layout: Layout) -> None:
    """Look whether the lists are this audio's, or the audio gives those that the recipe wants."""
    data = plan.recipe.data
    if plan.brings_lists:
        for path in plan.transcripts:
            if not path.exists():
                plan.problems.append(f"{path}: no such file or folder")
        return
    train, valid = plan.lists
    if plan.has_lists or train.is_file():
        root = _root_of(train)
        if root is not None and not _holds(root, data.tsv_dir, plan.audio):
            raise UserError(
                f"{train} lists audio of {root}, not of {plan.audio}: name another folder with --data.tsv_dir, or "
                f"remove {data.tsv_dir} where no run needs it"
            )
    if plan.has_lists:
        logger.info("lists: %s and %s, made before", train, valid)
        return
    plan.look(find, layout.root, layout.parts)
    if plan.transcripts:
        plan.look(find_sources, plan.audio)
    missing = [name for name in (data.train, data.valid) if name not in layout.lists]
    if missing:
        shorter = [name for name in (f"{plan.source.stem}_100h", plan.source.stem.replace("960h", "100h"))
                   if name != plan.source.stem and (RECIPES / f"{name}.yaml").is_file()]  # fmt: skip
        other = f"name the recipe {shorter[0]}, or " if shorter and LIST_100H in layout.lists else ""
        advice = f"{other}add --data.train {next(iter(layout.lists))}"
        if data.train in layout.lists:
            advice = "leave --data.valid out"
        raise UserError(f"{plan.audio} gives {', '.join(layout.lists)} and no {', '.join(missing)}: {advice}")


def _check_models(plan: Plan) -> None:
    """Build teacher, student and heads: whether they go together, and how large they are."""
    recipe, config = plan.recipe, copy.deepcopy(plan.teacher)
    assert config is not None
    # Without memory, unless weights are read or chosen.
    is_real = recipe.student_ckpt is not None or recipe.student.slice is not None
    with torch.device("cpu" if is_real else "meta"):
        try:
            teacher = wav2vec2_model(**config)
        except ValueError as error:
            raise UserError(f"the teacher's config builds no model: {error}") from None
        teacher.mask_embedding = torch.zeros(teacher.embed_dim)
        student = make_prunable(planned_student(recipe, teacher), recipe.pruning)
        heads = plan.look(Objectives, recipe.objective, student, teacher)
    before = count_params(teacher)
    if heads is not None:
        plan.sizes = before, count_params(student) - sum(map(len, student.masks().values())), heads.num_params()
    if recipe.pruning.units:
        plan.budget = make_budget(recipe.pruning, teacher)
        check_budget(student, plan.budget, recipe.pruning)


def save_recipe(plan: Plan) -> None:
    """Write what differs from the recipe that the plan builds on; in the folder of a run that has begun, nothing."""
    path = plan.recipe.exp_dir / RECIPE
    if (plan.recipe.exp_dir / LAST).is_file():
        return
    before, now = flat_settings(plan.published), flat_settings(plan.recipe)
    content: dict[str, Any] = {"base": os.path.relpath(plan.source.resolve(), path.parent.resolve())}
    for name, value in now.items():
        if name in ("base", "continue_with_changes") or (name in before and before[name] == value):
            continue
        *sections, last = name.split(".")
        place = content
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    reasons = [f"#   {', '.join(names)}: {why}" for names, why in plan.derived.reasons]
    header = [f"# {plan.source.stem} for {plan.recipe.teacher_id or plan.recipe.teacher_ckpt} and {plan.audio}"]
    header += ["# Derived:", *reasons] if reasons else []
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, default_flow_style=None)
    write_text(path, "\n".join([*header, text]))
    logger.info("recipe: %s", path)


def say(plan: Plan) -> None:
    """Log what is derived."""
    for names, why in plan.derived.reasons:
        told = [f"{name} {_text(plan.derived.settings[name])}" for name in names]
        logger.info("derived %s: %s", ", ".join(told), why)


def answers(plan: Plan) -> list[str]:
    """For scripts/common.sh, a line each."""
    recipe = plan.recipe
    lists = "" if plan.has_lists else recipe.data.tsv_dir
    teacher_id = "" if recipe.teacher_ckpt.exists() else recipe.teacher_id
    units = ",".join(recipe.pruning.units) or "none"
    head = "--ctc" if wants_head(recipe) else ""
    transcripts = recipe.data.transcripts
    said = ["", "", ""] if transcripts is None else [plan.transcripts[1], transcripts.audio or "", transcripts.case]
    told = lists, teacher_id, recipe.teacher_ckpt, recipe.exp_dir, units, head, *said
    return ["plan", *map(str, told), *plan.words]


def read_words(words: list[str]) -> Plan:
    """The plan of a command line: AUDIO_DIR [--adapt] --config RECIPE FLAGS...

    Raises:
        UserError: the recipe or the flags are wrong by themselves.
        Problems: everything else that stands in the way.
    """
    audio, *words = [word for word in words if word != "--dry_run"]
    adapt = words[:1] == ["--adapt"]
    name, source, *flags = words[adapt:]
    assert name == "--config", words
    plan = make_plan(Path(audio), Path(source), flags, adapt)
    say(plan)
    if plan.problems:
        raise Problems(plan.problems)
    return plan


@command
def main() -> None:
    """Print the plan for the shell."""
    plan = read_words(sys.argv[1:])
    save_recipe(plan)
    print(*answers(plan), sep="\n")


if __name__ == "__main__":
    main()
