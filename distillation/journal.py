"""Finished pieces of a long command, kept as they are finished: the same command goes on after them."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from distillation.errors import UserError
from wav2vec2.checkpoint import write_text

logger = logging.getLogger(__name__)


class Journal:
    """A file of JSON lines: the first says what the values depend on, each of the others holds one finished piece.

    A line that a crash cut off is dropped. What holds for other settings is never mixed in.

    >>> journal = Journal(out / "done.jsonl", {"model": fingerprint(model)}, "features")
    >>> if path.name not in journal:
    ...     journal[path.name] = compute(path)

    Args:
        path: the file.
        of: everything that decides about the values, in plain JSON types.
        what: the values are, for messages.
        refuse: what to do instead of going on with pieces that are ``of`` something else, for the message; None starts
            afresh, with a word in the log.

    Raises:
        UserError: the file is of something else, and that is to be refused.
    """

    def __init__(self, path: Path, of: dict[str, Any], what: str, refuse: str | None = None) -> None:
        self.path = path
        self.pieces: dict[str, Any] = {}
        of = json.loads(json.dumps(of))
        lines = self._read()
        if len(lines) > 1 and lines[0] != {"of": of}:
            found = lines[0].get("of")
            before: dict[str, Any] = found if isinstance(found, dict) else {}
            keys = [key for key in {**before, **of} if before.get(key) != of.get(key)]
            difference = "; ".join(f"{key} {_short(before.get(key))} -> {_short(of.get(key))}" for key in keys)
            if refuse is not None:
                raise UserError(f"{path}: holds {what} with other settings ({difference}): {refuse}")
            logger.info("%s: holds %s with other settings (%s), starting afresh", path, what, difference)
            lines = []
        self.pieces = {line["key"]: line["value"] for line in lines[1:] if line.keys() == {"key", "value"}}
        entries = [{"of": of}, *({"key": key, "value": value} for key, value in self.pieces.items())]
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in entries))
        if self.pieces:
            logger.info("%s: going on after %d %s", path, len(self.pieces), what)

    def _read(self) -> list[dict[str, Any]]:
        found = []
        for line in self.path.read_text("utf-8", "replace").split("\n") if self.path.is_file() else []:
            try:
                entry = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(entry, dict):
                found.append(entry)
        return found

    def __contains__(self, key: str) -> bool:
        return key in self.pieces

    def __getitem__(self, key: str) -> Any:
        return self.pieces[key]

    def __setitem__(self, key: str, value: Any) -> None:
        """Keep a piece, in plain JSON types, at once."""
        self.update({key: value})

    def update(self, pieces: Mapping[str, Any]) -> None:
        """Keep several pieces by one write."""
        lines = []
        for key, value in pieces.items():
            self.pieces[key] = json.loads(line := json.dumps(value))
            lines.append(f'{{"key": {json.dumps(key)}, "value": {line}}}\n')
        if not lines:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def remove(self) -> None:
        """The command is done: nothing is left to go on with."""
        self.path.unlink(missing_ok=True)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
