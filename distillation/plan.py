"""What a shell recipe will do, and everything that stands in its way: said before lists or a teacher are made.

    python -m distillation.plan AUDIO_DIR [--adapt] --config conf/dphubert_base.yaml FLAGS...

With --adapt the recipe follows teacher, audio and machine where it is written for others; the flags win over what is
derived. Prints a line per answer for scripts/common.sh: the folder of lists, the training list, the teacher's file and
what to convert it from (empty where that is not needed), the folder of the run, what it prunes, then the flags to put
before those of the user. A new run gets recipe.yaml, which says the same as all flags together.
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

from distillation.build import starting_student
from distillation.config import RECIPES, Recipe, flat_settings, parse_recipe
from distillation.data.conversion import copies_of
from distillation.data.corpus import find, layout_of
from distillation.deriving import Derived, for_audio, for_length, for_machine, for_teacher, run_name
from distillation.errors import Problems, UserError, command
from distillation.objectives import Objectives
from distillation.sparsity import check_target, make_prunable
from distillation.teacher import check_size, teacher_config
from distillation.training.standing import LAST
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
        recipe: with everything that is derived, and the user's flags.
        derived: settings, in the order in which they came about.
        teacher: flat config; None where it could not be found out.
        world_size: processes.
        sizes: parameters of teacher, student where it starts and heads; None without a teacher.
        problems: what must be put right first.
    """

    audio: Path
    source: Path
    recipe: Recipe
    derived: Derived
    teacher: dict[str, Any] | None = None
    world_size: int = 1
    sizes: tuple[int, int, int] | None = None
    problems: list[str] = field(default_factory=list)

    @property
    def flags(self) -> list[str]:
        """What is derived, as words of a command line."""
        return as_flags(self.derived.settings)

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
    asked, _ = parse_recipe(["--config", str(source), *flags])
    plan = Plan(audio, source, asked, Derived.nothing())
    plan.teacher = plan.look(teacher_config, asked)
    lists: list[str] = []
    if not audio.is_dir():
        plan.problems.append(f"{audio}: no such folder")
    else:
        lists = list(layout_of(audio).lists)
    devices = plan.look(asked.trainer.find_devices)
    if devices is not None:
        plan.world_size = devices[1] * asked.trainer.num_nodes

    derived = plan.derived
    if lists:
        for_audio(derived, asked, lists, adapt)
        if asked.data.tsv_dir == published.data.tsv_dir:
            folder = _lists_folder(audio, published.data.tsv_dir, asked.data.train)
            if folder != published.data.tsv_dir:
                derived.add("lists of this audio alone", {"data.tsv_dir": folder})
    if adapt:
        if plan.teacher is not None:
            for_teacher(derived, asked, plan.teacher["encoder_num_layers"], plan.teacher["encoder_embed_dim"])
        if devices is not None:
            for_machine(derived, asked, published, devices[0], plan.world_size)
        for_length(derived, asked, published)
        folder = run_name(asked, published, source.stem, audio, lists)
        if folder != published.exp_dir:
            derived.add("a folder for this teacher and audio", {"exp_dir": folder})
    plan.recipe, _ = parse_recipe(["--config", str(source), *plan.flags, *flags])
    derived.keep(flat_settings(plan.recipe))

    if lists:
        plan.look(_check_lists, plan, lists)
    if devices is not None:
        plan.look(plan.recipe.trainer.micro_batches, plan.world_size)
    if plan.teacher is not None:
        plan.look(_check_models, plan)
    return plan


def _lists_folder(audio: Path, default: Path, train: str) -> Path:
    """Where the lists of a folder of audio are: those of LibriSpeech in the default one, unless it has others."""
    if layout_of(audio).librispeech:
        root = _root_of(default)
        if root is None or _holds(root, default, audio):
            return default
    return default / audio.name


def _root_of(folder: Path) -> Path | None:
    """Root of the audio that the lists of a folder name; None where there are none."""
    for path in sorted(folder.glob("*.tsv")):
        with path.open(encoding="utf-8", errors="replace") as file:
            return Path(file.readline().rstrip("\r\n"))
    return None


def _holds(root: Path, lists: Path, audio: Path) -> bool:
    """Whether lists with this root are of a folder of audio, or of its converted copies."""
    if root in (audio.resolve(), (audio / "LibriSpeech").resolve()):
        return True
    copies = copies_of(root) if root == (lists / AUDIO).resolve() else None
    return copies is not None and copies[0] == layout_of(audio).root.resolve()


def _check_lists(plan: Plan, lists: list[str]) -> None:
    """Look whether the lists are this audio's, or the audio gives those that the recipe wants."""
    data = plan.recipe.data
    train, valid = data.tsv_dir / data.train, data.tsv_dir / data.valid
    if train.is_file() and valid.is_file():
        with train.open(encoding="utf-8", errors="replace") as file:
            root = Path(file.readline().rstrip("\r\n"))
        if not _holds(root, data.tsv_dir, plan.audio):
            raise UserError(
                f"{train} lists audio of {root}, not of {plan.audio}: remove {data.tsv_dir}, or name another folder "
                "with --data.tsv_dir"
            )
        return
    if missing := [name for name in (data.train, data.valid) if name not in lists]:
        shorter = [name for name in (f"{plan.source.stem}_100h", plan.source.stem.replace("960h", "100h"))
                   if name != plan.source.stem and (RECIPES / f"{name}.yaml").is_file()]  # fmt: skip
        other = f"name the recipe {shorter[0]}, or " if shorter and "train100.tsv" in lists else ""
        named = next((name for name in lists if name != "valid.tsv"), "train.tsv")
        raise UserError(
            f"{plan.audio} gives {', '.join(lists)} and no {', '.join(missing)}: {other}add --data.train {named}"
        )
    layout = layout_of(plan.audio)
    find(layout.root, [part for parts in layout.lists.values() for part in parts])


def _check_models(plan: Plan) -> None:
    """Build teacher, student and heads without memory: whether they go together, and how large they are."""
    recipe, config = plan.recipe, copy.deepcopy(plan.teacher)
    assert config is not None
    with torch.device("meta"):
        try:
            teacher = wav2vec2_model(**config)
        except ValueError as error:
            raise UserError(f"the teacher's config builds no model: {error}") from None
        check_size(recipe, recipe.teacher_id or recipe.teacher_ckpt, teacher.num_layers, teacher.embed_dim)
        teacher.mask_embedding = torch.zeros(teacher.embed_dim)
        student = make_prunable(starting_student(recipe, teacher), recipe.pruning)
        heads = Objectives(recipe.objective, student, teacher).num_params()
    before = count_params(teacher)
    plan.sizes = before, count_params(student) - sum(map(len, student.masks().values())), heads
    check_target(student, before, recipe.pruning)


def save_recipe(plan: Plan) -> Path:
    """Write what differs from the recipe that the plan builds on; in the folder of a run that has begun, nothing."""
    path = plan.recipe.exp_dir / RECIPE
    if (plan.recipe.exp_dir / LAST).is_file():
        return path
    published, _ = parse_recipe(["--config", str(plan.source)])
    before, now = flat_settings(published), flat_settings(plan.recipe)
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
    return path


def say(plan: Plan) -> None:
    """Log what is derived."""
    for names, why in plan.derived.reasons:
        told = [f"{name} {_text(plan.derived.settings[name])}" for name in names]
        logger.info("derived %s: %s", ", ".join(told), why)


def answers(plan: Plan) -> list[str]:
    """For scripts/common.sh, a line each."""
    recipe = plan.recipe
    teacher_id = "" if recipe.teacher_ckpt.exists() else recipe.teacher_id
    units = ",".join(recipe.pruning.units) or "none"  # the shell drops empty lines at the end
    fields = [recipe.data.tsv_dir, recipe.data.train, recipe.teacher_ckpt, teacher_id, recipe.exp_dir, units]
    return [*map(str, fields), *plan.flags]


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
    logger.info("recipe: %s", save_recipe(plan))
    print(*answers(plan), sep="\n")


if __name__ == "__main__":
    main()
