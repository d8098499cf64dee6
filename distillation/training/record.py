"""What a run is: everything that changes what it computes, from which update on; kept in its checkpoints and files.

One mechanism for all commands that train. A run that goes on is compared with this record setting by setting: what
belongs to its identity is refused, what may change is said, applied and added to the record's history.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from distillation.errors import UserError
from distillation.yamlfile import read_yaml
from wav2vec2.checkpoint import write_text

logger = logging.getLogger(__name__)

RUN = "run"  # entry of checkpoints and model files
HISTORY = "history.yaml"  # the same for people, in the folder of a run
MAX_HISTORY_BYTES = 10_000_000
Settings = dict[str, Any]  # dotted name -> value of plain types


@dataclass(frozen=True)
class Kinds:
    """What the settings of a command are to a run that goes on. Names ending in a dot stand for all below them.

    What is named in none of these is part of the identity: it cannot change in the middle of a run.
    """

    elsewhere: frozenset[str]  # not used by this step, or mere names of files whose content counts
    free: frozenset[str]  # machine and bookkeeping: may change at any time
    rates: frozenset[str]  # length and rates: may change on request
    meant: Mapping[str, Any] = field(default_factory=dict)  # by versions that had no such setting, where that counts

    def completed(self, settings: Settings) -> Settings:
        """With what the version that wrote them had no setting for."""
        return {**self.meant, **_with_sections(settings)}

    def of(self, name: str) -> str:
        """One of elsewhere, free, rates and identity."""
        prefixes = {name, *(f"{parent}." for parent in _parents(name))}
        found = [kind for kind in ("elsewhere", "free", "rates") if prefixes & getattr(self, kind)]
        assert len(found) <= 1, f"{name} is {' and '.join(found)}"
        return found[0] if found else "identity"


@dataclass
class Identity:
    """What a command is about to train.

    Attributes:
        settings: by dotted name; those that are ``elsewhere`` left out, the content of files added.
        kinds: what they are.
    """

    settings: Settings
    kinds: Kinds

    @classmethod
    def of(cls, settings: Mapping[str, Any], kinds: Kinds, content: Mapping[str, Any]) -> Identity:
        """From all settings of a command and the content of its files."""
        assert all(kinds.of(name) == "identity" for name in content), content.keys()
        used = {name: value for name, value in settings.items() if kinds.of(name) != "elsewhere"}
        return cls(json.loads(json.dumps({**used, **content})), kinds)


class Record:
    """The settings of a run as it started, and every change with the update after which it was made.

    Args:
        history: the entry of a file, ``[{"update": 0, "settings": {...}}, {"update": n, "changed": {name: [old,
            new]}}, ...]``.
    """

    def __init__(self, history: list[dict[str, Any]]) -> None:
        self.history = history

    @classmethod
    def start(cls, identity: Identity, update: int = 0) -> Record:
        """Of a run that begins, or of which nothing is known before an update."""
        return cls([{"update": update, "settings": identity.settings}])

    @classmethod
    def load(cls, exp_dir: Path) -> Record | None:
        """From ``history.yaml``; None where there is none that can be read."""
        try:
            return cls.read({RUN: {"history": read_yaml(exp_dir / HISTORY, MAX_HISTORY_BYTES, "a history")}}, exp_dir)
        except UserError:
            return None

    @classmethod
    def read(cls, content: Mapping[str, Any], source: object) -> Record | None:
        """From a checkpoint or model file; None where an older version or another program wrote it.

        Raises:
            UserError: naming ``source``; the record is damaged.
        """
        entry = content.get(RUN)
        if entry is None:
            return None
        history = entry.get("history") if isinstance(entry, dict) else None
        if not isinstance(history, list) or not history or not all(map(_is_entry, history, range(len(history)))):
            raise UserError(f"{source}: damaged, its record of the run cannot be read")
        return cls(history)

    @property
    def settings(self) -> Settings:
        """In force at the end."""
        settings = dict(self.history[0]["settings"])
        for change in self.history[1:]:
            settings |= {name: new for name, (_, new) in change["changed"].items()}
        return settings

    def told(self) -> Settings:
        """The settings with their changes in words."""
        told = dict(self.history[0]["settings"])
        for change in self.history[1:]:
            for name, (old, new) in change["changed"].items():
                told[name] = f"{_short(told.get(name, old))}, after update {change['update']} {_short(new)}"
        return told

    def entry(self, update: int, **more: Any) -> dict[str, Any]:
        """What a checkpoint or a model file made after an update holds under ``RUN``; :meth:`read` takes it."""
        return {"update": update, "history": self.history, **more}

    def write(self, exp_dir: Path) -> None:
        """Write ``history.yaml``."""
        write_text(exp_dir / HISTORY, yaml.safe_dump(self.history, sort_keys=False, allow_unicode=True))

    def go_on(self, identity: Identity, update: int, source: Path, on_request: bool) -> Record:
        """The record of this run when it goes on as the command says.

        Args:
            identity: what the command is about to train.
            update: after which it goes on.
            source: the checkpoint, for messages.
            on_request: whether length and rates may change.

        Raises:
            UserError: a change that is not allowed, with all differences.
        """
        changed = differences(identity.kinds.completed(self.settings), identity.settings)
        kinds = {name: identity.kinds.of(name) for name in changed}
        fixed = {name: change for name, change in changed.items() if kinds[name] == "identity"}
        rates = {name: change for name, change in changed.items() if kinds[name] == "rates"}
        elsewhere = f"use another --exp_dir, or move {source.parent.parent} away"
        if fixed:
            raise UserError(
                f"{source} is of a run with other settings: {describe(fixed | rates)}; "
                f"{', '.join(fixed)} cannot change in the middle of a run: {elsewhere} to start afresh, or give the "
                "settings it was started with"
            )
        if rates and not on_request:
            raise UserError(
                f"{source} is of a run with other settings: {describe(rates)}; to go on with the new ones after "
                f"update {update} give --continue_with_changes, or {elsewhere}"
            )
        if not changed:
            return self
        change = {"update": update, "changed": {name: list(pair) for name, pair in changed.items()}}
        return Record([*self.history, change])

    def say_last_change(self) -> None:
        """Log what has been set otherwise, now that it is used."""
        if len(self.history) > 1:
            logger.info("after update %d: %s", self.history[-1]["update"], describe(self.history[-1]["changed"]))


def differences(old: Settings, new: Settings) -> dict[str, tuple[Any, Any]]:
    """Settings that differ, with both values. Those that only one of two versions of the toolkit has do not count."""
    old, new = _with_sections(old), _with_sections(new)
    return {name: (old[name], new[name]) for name in new if name in old and old[name] != new[name]}


def describe(changed: Mapping[str, Iterable[Any]]) -> str:
    """``name old -> new; ...``"""
    return "; ".join(f"{name} {' -> '.join(map(_short, pair))}" for name, pair in changed.items())


def _with_sections(settings: Settings) -> Settings:
    """A section that is set has an entry, as one that is null has: so that they differ."""
    return {parent: "(set)" for name in settings for parent in _parents(name)} | settings


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    text = re.sub(r"\b[0-9a-f]{64}\b", lambda digest: digest[0][:12], text)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _is_entry(entry: Any, number: int) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("update"), int):
        return False
    content = entry.get("changed" if number else "settings")
    if not isinstance(content, dict) or not content or not all(isinstance(name, str) for name in content):
        return False
    return not number or all(isinstance(pair, list) and len(pair) == 2 for pair in content.values())
