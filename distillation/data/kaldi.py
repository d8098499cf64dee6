"""Text files that list audio: lines with their places, and Kaldi's wav.scp and segments.

All are UTF-8, with a byte-order mark or without; their lines end at a line feed and nowhere else.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from distillation.data.manifest import MAX_FRAMES
from distillation.errors import UserError
from wav2vec2.feature_extractor import SAMPLE_RATE

MAX_SECONDS = MAX_FRAMES / SAMPLE_RATE
OVERSHOOT = 0.5  # s by which an end may lie behind the audio's: Kaldi's --max-overshoot
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)(e[-+]?\d+)?", re.ASCII | re.IGNORECASE)  # float() reads 1_0 as 10

# kinds of rows that the list alone shows to be unusable
NOT_FOUND, MALFORMED, BY_COMMAND = "missing audio", "malformed", "made by a command"


class Line(NamedTuple):
    """A line of a text file; ``place``: "FILE line NUMBER", counted from 1."""

    place: str
    text: str

    def refuse(self, reason: str) -> NoReturn:
        """The file is not what it was taken for."""
        raise UserError(f"{self.place} {reason}")


class Malformed(Exception):
    """One row of a list says what cannot be; the others may be good."""


class Unusable(Exception):
    """An utterance that the lists alone show to be unusable: of which kind, and why."""

    def __init__(self, kind: str, detail: str) -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind, self.detail = kind, detail


class Place(NamedTuple):
    """Where an utterance is: the path as wav.scp has it, start and end in seconds; ``end`` None at the audio's end."""

    path: str
    start: float = 0.0
    end: float | None = None


class KaldiData:
    """A folder of Kaldi's; ``names``: of its utterances, by segments where it has them.

    Args:
        folder: of the tables.
        recordings: name of the table of audio files.
        segments: name of the table of stretches, if it is there; None for whole recordings.
    """

    def __init__(self, folder: Path, recordings: str = "wav.scp", segments: str | None = "segments") -> None:
        self.recordings = read_table(folder / recordings)
        cut = segments is not None and (folder / segments).is_file()
        self.segments = read_table(folder / str(segments)) if cut else None
        self.names = list(self.recordings if self.segments is None else self.segments)

    def find(self, name: str) -> Place:
        """Where an utterance is.

        Raises:
            Unusable: nowhere, in what a command makes, or its segment is none.
        """
        recording, start, end = name, 0.0, None
        if self.segments is not None:
            if name not in self.segments:
                raise Unusable(NOT_FOUND, "no such line in segments")
            line, text = self.segments[name]
            try:
                recording, start, end = parse_segment(text)
            except Malformed as error:
                raise Unusable(MALFORMED, f"{line.place} {error}") from None
        if recording not in self.recordings:
            raise Unusable(NOT_FOUND, f"no {recording} in wav.scp")
        named, path = self.recordings[recording]
        if path.endswith("|"):
            raise Unusable(BY_COMMAND, f"{named.place} is {path[:100]}")
        return Place(path, start, end)


def parse_segment(text: str) -> tuple[str, float, float | None]:
    """Recording, start and end of ``recording start end [channel]``, where -1 stands for the recording's end.

    Raises:
        Malformed: it is something else, or of another channel than the first, which mono audio has not.
    """
    cells = text.split()
    if len(cells) not in (3, 4) or not all(map(NUMBER.fullmatch, cells[1:3])):
        raise Malformed(f"is not utterance, recording, start and end, in seconds: {text[:100]}")
    if cells[3:] not in ([], ["0"]):
        raise Malformed(f"is of channel {cells[3]}, counted from 0: write each channel to a file")
    recording, start, end = cells[0], float(cells[1]), float(cells[2])
    if end == -1:
        return recording, require_seconds("start", start), None
    if end < start:
        raise Malformed("ends before it starts")
    return recording, require_seconds("start", start), require_seconds("end", end)


def read_table(path: Path) -> dict[str, tuple[Line, str]]:
    """A text file of Kaldi: first word of each line -> the line and what follows the word."""
    found: dict[str, tuple[Line, str]] = {}
    for line in read_lines(path):
        name, *rest = re.split(r"[ \t]+", line.text.strip(" \t"), maxsplit=1)
        if name in found:
            line.refuse(f"has {name} for the second time")
        if name:
            found[name] = line, "".join(rest)
    return found


def require_seconds(key: str, value: Any) -> float:
    """A time that a list gives; Malformed where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_SECONDS:
        raise Malformed(f"{key} is {shortened(value)}: not a number of seconds")
    return float(value)


def shortened(value: Any) -> str:
    """As JSON, for a message."""
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def read_lines(path: Path) -> Iterator[Line]:
    """The lines of a text file that are not blank. Not splitlines(): a transcript may hold what else ends a line."""
    if not path.is_file():  # opening a pipe would wait forever
        raise UserError(f"{path}: neither a folder nor a file")
    try:
        text = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}): save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    name = str(path)
    for number, line in enumerate(text.split("\n"), 1):
        if line and not line.isspace():
            yield Line(f"{name} line {number}", line.removesuffix("\r"))
