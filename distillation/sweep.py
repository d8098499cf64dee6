"""The runs of a sweep: settings that are given a list of values where they take one, in all combinations.

    python -m distillation.sweep --config conf/X.yaml --pruning.target_sparsity '[0.3,0.5]' FLAGS...

Prints a line per run for scripts/sweep.sh: its folder, in the recipe's exp_dir, and its flags.
"""

import dataclasses
import itertools
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from distillation.config import Recipe, flat_settings, parse_recipe
from distillation.errors import UserError, command

SEPARATOR = "\x1f"  # between the words of a line; bash joins tabs


@dataclasses.dataclass
class Run:
    """One combination of values."""

    exp_dir: Path
    flags: list[str]


def runs_of(argv: list[str]) -> list[Run]:
    """All runs of a sweep, each looked at as far as its settings go.

    Args:
        argv: ``--config RECIPE`` and flags.

    Raises:
        UserError: nothing is swept, a value is not accepted, or two runs would share a folder.
    """
    fixed: list[str] = []
    swept: dict[str, list[str]] = {}
    for flag, value in _pairs(argv):
        values = _list_of(value)
        if value is None or values is None or _takes(flag, value):
            fixed += [flag] if value is None else [flag, value]
        elif len(values) < 2:
            raise UserError(f"{flag} {value}: a sweep needs at least two values")
        elif flag in swept or flag in ("--config", "--exp_dir"):
            raise UserError(f"{flag} {value}: give one list of values for a setting, and none for the folder")
        else:
            swept[flag] = values
    if not swept:
        raise UserError("nothing to sweep: give a flag a list of values, e.g. --pruning.target_sparsity '[0.5,0.75]'")
    last = [flag.rpartition(".")[2].lstrip("-") for flag in swept]
    short = [name if last.count(name) == 1 else flag.lstrip("-") for flag, name in zip(swept, last)]
    runs: list[Run] = []
    seen: dict[str, Path] = {}
    for point in itertools.product(*swept.values()):
        flags = [*fixed, *(word for pair in zip(swept, point) for word in pair)]
        recipe, _ = parse_recipe(flags)
        name = ",".join(
            f"{key}={re.sub(r'[^A-Za-z0-9.+-]+', '_', value).strip('_')}" for key, value in zip(short, point)
        )
        exp_dir = recipe.exp_dir / name
        settings = json.dumps(flat_settings(recipe))
        if settings in seen:
            raise UserError(f"{seen[settings]} and {exp_dir} would be the same run: name each value once")
        if exp_dir in seen.values():
            raise UserError(f"two runs of the sweep would be in {exp_dir}: give their values other names")
        seen[settings] = exp_dir
        runs.append(Run(exp_dir, [*flags, "--exp_dir", str(exp_dir)]))
    return runs


def _pairs(argv: list[str]) -> Iterable[tuple[str, str | None]]:
    """Flags with their values."""
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--continue_with_changes":
            yield name, None
        elif not name.startswith("--"):
            raise UserError(f"{word}: a flag is needed here, such as --pruning.target_sparsity")
        else:
            yield name, value if equals else next(words, None)


def _list_of(value: str | None) -> list[str] | None:
    """Values of a list in YAML, as words of a command line; None for anything else."""
    if value is None or not value.lstrip().startswith("["):
        return None
    try:
        values = yaml.safe_load(value)
    except yaml.YAMLError:
        return None
    return (
        [entry if isinstance(entry, str) else json.dumps(entry) for entry in values]
        if isinstance(values, list)
        else None
    )


def _takes(flag: str, value: str) -> bool:
    """Whether a setting takes this list as its one value."""
    if not _is_list(flag):
        return False
    try:
        parse_recipe([flag, value])
    except UserError:
        return False
    return True


def _is_list(flag: str) -> bool:
    kinds: tuple[Any, ...] = (Recipe,)
    for name in flag[2:].split("."):
        section = next((kind for kind in kinds if dataclasses.is_dataclass(kind)), None)
        kind = get_type_hints(section).get(name) if section is not None else None
        kinds = (kind, *get_args(kind))
    return any(get_origin(kind) in (list, tuple, dict) for kind in kinds)


@command
def main() -> None:
    """Print the runs."""
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__)
        return
    print("plan")
    for run in runs_of(sys.argv[1:]):
        print(SEPARATOR.join([str(run.exp_dir), *run.flags]))


if __name__ == "__main__":
    main()
