"""Recipes: dataclasses that are the YAML files and the command line at once.

A recipe names another as its ``base`` and holds only what differs. Flags override recipes, unknown keys are errors.
"""

import dataclasses
import functools
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import jsonargparse
import torch

from distillation.commandline import add_continue_flag, make_parser, one_line, parse_arguments
from distillation.data.config import DataConfig
from distillation.errors import UserError, require
from distillation.machine import find_accelerator, find_precision
from distillation.objectives import ObjectiveConfig
from distillation.optimisation import OptimConfig
from distillation.sparsity import PruningConfig
from distillation.students import StudentConfig
from distillation.yamlfile import read_yaml
from wav2vec2.checkpoint import write_text
from wav2vec2.importers import converted_file

RECIPES = Path(__file__).parent.parent / "conf"
MAX_RECIPE_BYTES = 1_000_000
DTYPES = {
    "bf16-mixed": torch.bfloat16, "bfloat16": torch.bfloat16, "16-mixed": torch.float16,
    "32-true": torch.float32, "float32": torch.float32,
}  # fmt: skip


@dataclass
class TrainerConfig:
    """Machine, precision and bookkeeping."""

    accelerator: Literal["auto", "gpu", "cpu"] = "auto"
    """Where to train: auto takes GPUs where there are any; gpu is an error where there is none."""
    devices: int | Literal["auto"] = "auto"
    """Processes per node, one per GPU; auto takes all GPUs, or one CPU process."""
    num_nodes: int = 1
    """Machines."""
    precision: Literal["auto", "bf16-mixed", "16-mixed", "32-true"] = "auto"
    """Of the training step: auto takes bfloat16 where the GPU or the processor has units for it, else float16 on a GPU
    and float32 on a CPU. Masks and losses are float32 in any case."""
    teacher_precision: Literal["same", "float32", "bfloat16"] = "same"
    """Of the teacher's forward pass."""
    recompute: bool = False
    """Run the student's layers again in the backward pass instead of keeping what they compute: less memory, a third
    more time in the student."""
    batches_per_update: int = 4
    """Micro-batches averaged in one update over all processes; fewer processes accumulate more."""
    log_every: int = 50
    """Updates between two rows of metrics; each row is the mean since the one before."""
    validate_every: int = 1000
    """Updates between two validations."""
    checkpoint_every: int = 500
    """Updates between two checkpoints."""
    checkpoint_minutes: float = 15.0
    """Minutes after which a checkpoint is written in any case."""
    max_skipped_updates: int = 25
    """Updates that may be left without effect, since a loss or gradient is not finite; more of them end the run."""

    def __post_init__(self) -> None:
        counts = ("num_nodes", "batches_per_update", "log_every", "validate_every", "checkpoint_every")
        require(self, "trainer.", "be at least 1", lambda value: value >= 1, *counts)
        require(self, "trainer.", "be positive", lambda value: value > 0, "checkpoint_minutes")
        require(self, "trainer.", "be at least 0", lambda value: value >= 0, "max_skipped_updates")
        require(self, "trainer.", "be at least 1, or auto", lambda value: value == "auto" or value >= 1, "devices")

    @property
    def dtype(self) -> torch.dtype:
        """What the training step computes in."""
        return DTYPES[self.precision]

    @property
    def teacher_dtype(self) -> torch.dtype:
        """What the teacher computes in."""
        return DTYPES[self.precision if self.teacher_precision == "same" else self.teacher_precision]

    def micro_batches(self, world_size: int) -> int:
        """Micro-batches that each of ``world_size`` processes takes for one update.

        Raises:
            UserError: those of an update cannot be spread evenly.
        """
        count = self.batches_per_update
        each, rest = divmod(count, world_size)
        if rest:
            fitting = [n for n in range(1, count + 1) if count % n == 0]
            raise UserError(
                f"{count} micro-batches per update do not spread evenly over {world_size} processes: "
                f"use {', '.join(map(str, fitting))} processes, or set --trainer.batches_per_update "
                f"and --data.seconds_per_batch so that their product stays the published one"
            )
        return each

    def find_devices(self) -> tuple[str, int]:
        """What to train on, "gpu" or "cpu", and how many processes of it per node.

        Raises:
            UserError: the machine is not what the recipe asks for.
        """
        gpus = torch.cuda.device_count()
        accelerator = find_accelerator() if self.accelerator == "auto" else self.accelerator
        if accelerator == "gpu" and not gpus:
            raise UserError(
                "the recipe asks for a GPU and none is visible: set --trainer.accelerator cpu to train without"
            )
        devices = self.devices if self.devices != "auto" else (gpus if accelerator == "gpu" else 1)
        if accelerator == "gpu" and devices > gpus:
            raise UserError(f"the recipe asks for {devices} GPUs and {gpus} are visible: set --trainer.devices {gpus}")
        return accelerator, devices


@dataclass
class Recipe:
    """Everything that defines a run."""

    base: str | None = None
    """Recipe that this one builds on, relative to its own folder."""
    teacher_id: str | None = "facebook/hubert-base-ls960"
    """What teacher_ckpt is converted from, hub id, local folder or torchaudio:NAME; null for any. The shell recipes
    convert it where the file does not exist."""
    teacher_ckpt: Path = Path("pretrained/hubert-base-ls960.hf.pth")
    """The teacher, a .pth file made by one of the converters; by default the one with the name of teacher_id. A recipe,
    or the command line, that sets it without teacher_id to a file that exists takes it whatever it was made from."""
    teacher_layers: int | None = 12
    """Transformer layers of the teacher that the recipe is written for; null for any."""
    teacher_width: int | None = 768
    """Transformer width of the teacher that the recipe is written for; null for any."""
    student_ckpt: Path | None = None
    """Model to start from, instead of what student says."""
    student: StudentConfig = field(default_factory=StudentConfig)
    """What to start from."""
    exp_dir: Path = Path("exp/dphubert_base")
    """Folder of the run."""
    seed: int = 2022
    """Of data order, crops, dropout and masks."""
    data: DataConfig = field(default_factory=DataConfig)
    """Audio."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """What to train towards."""
    pruning: PruningConfig = field(default_factory=PruningConfig)
    """What to prune in step 1."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Step 1."""
    final: OptimConfig | None = field(default_factory=lambda: OptimConfig(max_steps=25000, lr=1e-4, warmup_steps=5000))
    """Step 2; null for none."""
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    """Machine and bookkeeping."""
    continue_with_changes: bool = False
    """Asked for on the command line, never by a YAML."""

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed is {self.seed}: it must lie in [0, 2^63)")


def parse_recipe(argv: list[str] | None = None, description: str = "") -> tuple[Recipe, str]:
    """Recipe from a command line, and its resolved YAML: with what this machine has instead of auto, where to train
    and in which precision.

    Raises:
        UserError: an unknown recipe, key or value.
    """
    parser = _recipe_parser(description)
    argv, recipes = _expand_bases(sys.argv[1:] if argv is None else argv)
    try:
        namespace = parse_arguments(parser, argv)
    except UserError as error:
        for path in recipes:  # is it a file or the command line?
            try:
                parse_arguments(parser, ["--config", path])
            except UserError as its_own:
                raise UserError(f"{path}: {its_own}") from None
        raise error from None
    namespace.pop("config", None)
    namespace.base = None
    trainer = namespace.trainer
    if trainer.accelerator == "auto":
        trainer.accelerator = find_accelerator()
    if trainer.precision == "auto":
        trainer.precision = find_precision(trainer.accelerator)
    on_request = namespace.pop("continue_with_changes")
    resolved = parser.dump(namespace, skip_unset=False)
    try:
        recipe = Recipe(**vars(parser.instantiate(namespace)), continue_with_changes=on_request)
    except ValueError as error:  # the checks of optional sections run here
        raise UserError(one_line(error)) from None
    except TypeError:  # the parser lets null pass everywhere
        raise UserError("a section of the recipe is null or a single value: give its settings") from None
    _require_values(recipe)
    return recipe, resolved


@functools.cache  # reads the docstrings of every setting
def _recipe_parser(description: str) -> jsonargparse.ArgumentParser:
    parser = make_parser(description, default_env=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="Recipe, one of conf/*.yaml or your own.")
    parser.add_class_arguments(Recipe, fail_untyped=True, skip={"continue_with_changes"})
    add_continue_flag(parser)
    return parser


def _require_values(settings: Any, prefix: str = "") -> None:
    types = get_type_hints(type(settings))
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        if value is None and type(None) not in get_args(types[entry.name]):
            raise UserError(f"{prefix}{entry.name} is null: it needs a value")
        if dataclasses.is_dataclass(value):
            _require_values(value, f"{prefix}{entry.name}.")


def _expand_bases(argv: list[str]) -> tuple[list[str], list[str]]:
    """Put ``--config base`` before every ``--config recipe`` that names one; also return all recipes."""
    expanded: list[str] = []
    recipes: list[str] = []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--config":
            if name.startswith("--") and "." in name and not name.endswith(".help"):
                nested: object = None
                for part in reversed(name[2:].split(".")):
                    nested = {part: nested}
                _check_names(nested, Recipe, "--")
            expanded.append(word)
            continue
        path = value if equals else next(words, None)
        if path is None:
            raise UserError("--config needs the path of a recipe")
        for recipe in recipe_chain(Path(path)):
            expanded += ["--config", str(recipe)]
            recipes.append(str(recipe))
    expanded += _teacher_flags(expanded)
    expanded.sort(key=lambda word: word.startswith("--print_config"))  # what it prints comes before it
    return expanded, recipes


def _teacher_flags(expanded: list[str]) -> list[str]:
    """Settle which of ``teacher_ckpt`` and ``teacher_id`` counts: what is named in a later place.

    Args:
        expanded: a command line with all recipes. Each recipe is a place, all flags together are the last.

    Returns:
        Flags to add: the file that follows from the id; or no id, where a file that exists stands for itself.

    Raises:
        UserError: neither is named.
    """
    place = 0
    named: dict[str, tuple[float, Any]] = {"teacher_ckpt": (0, None), "teacher_id": (0, Recipe.teacher_id)}
    words = iter(expanded)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--config":
            place += 1
            content = read_yaml(Path(next(words)), MAX_RECIPE_BYTES, "a recipe") or {}
            named |= {key: (place, content[key]) for key in named if key in content}
        elif (key := name.removeprefix("--")) in named:
            given = value if equals else next(words, None)
            named[key] = (math.inf, None if given == "null" else given)
    (ckpt_place, ckpt), (id_place, teacher_id) = named["teacher_ckpt"], named["teacher_id"]
    if not (isinstance(ckpt, str | None) and isinstance(teacher_id, str | None)):
        return []  # the parser says it
    if teacher_id is None:
        if ckpt is None:
            raise UserError("teacher_id is null: name the file of the teacher by --teacher_ckpt")
        return []
    if ckpt is None or id_place > ckpt_place:
        return [f"--teacher_ckpt={converted_file(teacher_id)}"]
    return ["--teacher_id=null"] if ckpt_place > id_place and Path(ckpt).exists() else []


def recipe_chain(path: Path) -> list[Path]:
    """A recipe and those it builds on, the root first.

    Raises:
        UserError: a file is missing or no YAML mapping, or the bases form a circle.
    """
    chain: list[Path] = []
    current: Path | None = path
    while current is not None:
        if not current.is_file():
            known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
            raise UserError(f"{current}: no such recipe; those in conf/ are {known}")
        if any(current.samefile(other) for other in chain):
            raise UserError(f"{current}: is its own base")
        chain.append(current)
        content = read_yaml(current, MAX_RECIPE_BYTES, "a recipe")
        if content is None:
            content = {}
        if not isinstance(content, dict):
            raise UserError(f"{current}: a recipe is a mapping of settings, found a {type(content).__name__}")
        _check_names(content, Recipe, f"{current}: ")
        base = content.get("base")
        if base is not None and not isinstance(base, str):
            raise UserError(f"{current}: base is {base!r}, it must be the name of a recipe")
        current = None if base is None else current.parent / base
    return chain[::-1]


def _check_names(content: object, kind: object, path: str) -> None:
    """Refuse unknown names with a list of the known ones; a section that is empty is no excuse.

    Args:
        content: mapping of settings, or a value.
        kind: type of the section.
        path: what comes before the names in messages.
    """
    section = next((t for t in (kind, *get_args(kind)) if isinstance(t, type) and dataclasses.is_dataclass(t)), None)
    if section is None:
        return
    if not isinstance(content, dict):
        optional = type(None) in get_args(kind)
        if isinstance(content, str) or (content is None and optional):  # the path of a file with the settings; none
            return
        hint = "; for no pruning set its units to []" if section is PruningConfig else ""
        raise UserError(f"{path.removesuffix('.')} is {content!r}: a mapping of settings is needed{hint}")
    hints = get_type_hints(section)
    hints.pop("continue_with_changes", None)  # no recipe asks for it
    for name, value in content.items():
        if name not in hints:
            raise UserError(f"{path}{name}: no such setting; there are {', '.join(hints)}")
        _check_names(value, hints[name], f"{path}{name}.")


def flat_settings(settings: Any, prefix: str = "") -> dict[str, Any]:
    """All settings by their dotted names, in the plain types of YAML; a section that is null is one setting."""
    flat: dict[str, Any] = {}
    for entry in dataclasses.fields(settings):
        value = getattr(settings, entry.name)
        if dataclasses.is_dataclass(value):
            flat |= flat_settings(value, f"{prefix}{entry.name}.")
        else:
            flat[prefix + entry.name] = _plain(value)
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def save_resolved(resolved: str, exp_dir: Path) -> None:
    """Write the resolved recipe beside the run."""
    write_text(exp_dir / "config.yaml", resolved)
