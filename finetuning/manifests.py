"""Lists of transcribed audio in the formats that corpora come in: ``FORMATS``, told apart by names and first lines.

All text files are UTF-8, with a byte-order mark or without; their lines end at a line feed and nowhere else.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from distillation.data.audio import AUDIO_SUFFIXES
from distillation.data.conversion import copies_of
from distillation.data.corpus import ALL_SUFFIXES
from distillation.data.manifest import MAX_FRAMES
from distillation.errors import UserError
from wav2vec2.feature_extractor import SAMPLE_RATE

logger = logging.getLogger(__name__)

MAX_SECONDS = MAX_FRAMES / SAMPLE_RATE
KEYS = ("audio_filepath", "text", "offset", "duration")  # of NeMo's JSON; times in seconds, where there are any
HALF_PAIR = re.compile("[\ud800-\udfff]")  # what JSON can hold and UTF-8 cannot
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


class Row(NamedTuple):
    """What a list says of an utterance; nothing of it is checked against the audio.

    ``place`` is that of its line, ``end`` None where the audio ends; ``fault`` (kind, detail) says why it is unusable.
    """

    place: str
    path: Path
    text: str
    start: float = 0.0  # s
    end: float | None = None  # s
    fault: tuple[str, str] | None = None

    @property
    def is_whole(self) -> bool:
        """Whether it is all that its file holds."""
        return self.end is None and self.start == 0


class Malformed(Exception):
    """One row of a list says what cannot be; the others may be good."""


class AudioFolders:
    """Where the paths in lists lead.

    Args:
        audio: folder of the audio. Where prepare_data.py --convert made it, the journal there knows the copy of each
            file that a list names, also by an absolute path. Elsewhere it is the folder that relative paths start
            from, and NAME.mp3.flac or NAME.flac in it is taken for a NAME.mp3 that it does not hold.
    """

    def __init__(self, audio: Path | None = None) -> None:
        self.audio = audio
        self.journal = copies_of(audio) if audio is not None else None
        self.names_in = functools.lru_cache(maxsize=None)(_names_in)
        self.resolved = functools.lru_cache(maxsize=None)(os.path.realpath)

    def find(self, name: str, beside: Path) -> Path:
        """The file that a list names; ``beside``: folder that its format says.

        Raises:
            Malformed: it is no name.
        """
        if not name or "\0" in name:
            raise Malformed(f"names no file: {name[:100]!r}")
        named = beside / name
        if self.audio is None:
            return named
        is_relative = not Path(name).is_absolute()
        if self.journal is None:
            path = self.audio / name
            others = (path.name, f"{path.name}.flac", f"{path.stem}.flac")
            there = self.names_in(path.parent) if is_relative else frozenset()
            return next((path.with_name(other) for other in others if other in there), path)
        root, copies = self.journal
        originals = [*_below(root, named, self.resolved), *([os.path.normpath(name)] if is_relative else [])]
        for original in originals:
            if original in copies:
                return self.audio / copies[original]
            path = self.audio / original
            if path.name in self.names_in(path.parent):  # a link: it needed no copy
                return path
        return self.audio / name if is_relative else named


def _below(root: Path, path: Path, resolved: Callable[[Path], str]) -> Iterator[str]:
    """Name of a file below a folder, as the path says and as the links on its way say."""
    for way in (os.path.abspath, resolved):
        folder = Path(way(path.parent))
        if folder.is_relative_to(root):
            yield str((folder / path.name).relative_to(root))


def _names_in(folder: Path) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries)
    except OSError:  # reading its files will say why
        return frozenset()


class Format(NamedTuple):
    """One way to list transcribed audio."""

    name: str
    fits: Callable[[Path, str], bool]  # path and, of a file, its first line
    read: Callable[[Path, Iterator[Line], AudioFolders], Iterator[Row]]  # path and, of a file, its lines


def read_rows(source: Path, audio: Path | None = None) -> list[Row]:
    """All utterances that a file or folder lists.

    Args:
        source: of one of ``FORMATS``.
        audio: as for :class:`AudioFolders`.

    Raises:
        UserError: nothing there, not UTF-8, a line of another format, or a list without utterances.
    """
    lines = iter(()) if source.is_dir() else _lines(source)
    first = list(itertools.islice(lines, 1))
    chosen = next(format for format in FORMATS if format.fits(source, first[0].text if first else ""))
    folders = AudioFolders(audio)
    rows = list(chosen.read(source, itertools.chain(first, lines), folders))
    if not rows:
        known = ", ".join(format.name for format in FORMATS)
        raise UserError(f"{source}: no transcribed utterance; known are {known}")
    if audio is not None and not any(row.path.is_relative_to(audio) for row in rows):
        why = "with absolute paths, it must be a folder that prepare_data.py --convert made of these files"
        logger.warning("%s: --audio %s changes none of its paths: %s", source, audio, why)
    return rows


def _row(
    line: Line, name: str, text: str, folders: AudioFolders, beside: Path, start: float = 0.0, end: float | None = None
) -> Row:
    """An utterance in a file that a line names."""
    try:
        return Row(line.place, folders.find(name, beside), text, start, end)
    except Malformed as error:
        return Row(line.place, beside, text, fault=(MALFORMED, str(error)))


def _librispeech(folder: Path, lines: Iterator[Line], folders: AudioFolders) -> Iterator[Row]:
    for listing in _listings(folder):
        chapter = listing.parent
        files = {Path(name).stem: name for name in sorted(folders.names_in(chapter), key=_preference)}
        for line in _lines(listing):
            name, _, text = line.text.partition(" ")
            if name:
                path = chapter.relative_to(folder) / files.get(name, f"{name}.flac")
                yield _row(line, str(path), text, folders, folder)


def _listings(folder: Path) -> list[Path]:
    """All transcripts below a folder; as prepare_data.py does, links are followed and hidden names are not."""
    found: list[Path] = []
    visited = set()
    for place, inner, files in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        status = os.stat(place)  # noqa: PTH116
        if (status.st_dev, status.st_ino) in visited:
            inner.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        found += [Path(place, name) for name in files if name.endswith(".trans.txt") and not name.startswith(".")]
    return sorted(found)


def _refuse_folder(error: OSError) -> NoReturn:
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}") from None


def _preference(name: str) -> tuple[bool, bool, bool, str]:
    """Sorts what has the name of an utterance, the best last."""
    suffix = Path(name).suffix.lower()
    return suffix in ALL_SUFFIXES, suffix in AUDIO_SUFFIXES, suffix == ".flac", name


def _kaldi(folder: Path, lines: Iterator[Line], folders: AudioFolders) -> Iterator[Row]:
    recordings = _table(folder / "wav.scp")
    has_segments = (folder / "segments").is_file()
    segments = _table(folder / "segments") if has_segments else {}
    for name, (line, text) in _table(folder / "text").items():
        recording, start, end = name, 0.0, None
        unusable = functools.partial(Row, line.place, folder / name, text)
        if has_segments:
            if name not in segments:
                yield unusable(fault=(NOT_FOUND, "no such line in segments"))
                continue
            try:
                recording, start, end = _segment(segments[name][1])
            except Malformed as error:
                yield unusable(fault=(MALFORMED, f"{segments[name][0].place} {error}"))
                continue
        if recording not in recordings:
            yield unusable(fault=(NOT_FOUND, f"no {recording} in wav.scp"))
            continue
        named, path = recordings[recording]
        if path.endswith("|"):
            yield unusable(fault=(BY_COMMAND, f"{named.place} is {path[:100]}"))
        else:
            yield _row(line, path, text, folders, folder, start, end)


def _segment(text: str) -> tuple[str, float, float | None]:
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
        return recording, _seconds("start", start), None
    if end < start:
        raise Malformed("ends before it starts")
    return recording, _seconds("start", start), _seconds("end", end)


def _table(path: Path) -> dict[str, tuple[Line, str]]:
    """A text file of Kaldi: first word of each line -> the line and what follows the word."""
    found: dict[str, tuple[Line, str]] = {}
    for line in _lines(path):
        name, *rest = re.split(r"[ \t]+", line.text.strip(" \t"), maxsplit=1)
        if name in found:
            line.refuse(f"has {name} for the second time")
        if name:
            found[name] = line, "".join(rest)
    return found


def _json_lines(path: Path, lines: Iterator[Line], folders: AudioFolders) -> Iterator[Row]:
    for line in lines:
        try:
            entry = json.loads(line.text)
        except (ValueError, RecursionError):
            line.refuse("is not JSON")
        if not isinstance(entry, dict):
            line.refuse("is no JSON object")
        try:
            yield _json_row(line, entry, folders, path.parent)
        except Malformed as error:
            yield Row(line.place, path, "", fault=(MALFORMED, str(error)))


def _json_row(line: Line, entry: dict[str, Any], folders: AudioFolders, folder: Path) -> Row:
    name, text, offset, duration = (entry.get(key) for key in KEYS)
    name, text = _text(KEYS[0], name), _text(KEYS[1], "" if text is None else text)
    start = 0.0 if offset is None else _seconds(KEYS[2], offset)
    end = None if duration is None else start + _seconds(KEYS[3], duration)
    return _row(line, name, text, folders, folder, start, end)


def _common_voice(path: Path, lines: Iterator[Line], folders: AudioFolders) -> Iterator[Row]:
    names, clips = next(lines).text.split("\t"), path.parent / "clips"
    columns = names.index("path"), names.index("sentence")
    for line in lines:
        cells = line.text.split("\t")
        if len(cells) != len(names):
            line.refuse(f"has {len(cells)} columns, the first line {len(names)}")
        name, text = (cells[column] for column in columns)
        if name and "." not in name:  # the first releases left the suffix out
            name += ".mp3"
        yield _row(line, name, text, folders, clips)


def _pairs(path: Path, lines: Iterator[Line], folders: AudioFolders) -> Iterator[Row]:
    for line in lines:
        name, *texts = line.text.split("\t")
        if not name or len(texts) != 1:
            line.refuse(f"is not path<TAB>text: {1 + len(texts)} columns" if texts else "is not path<TAB>text")
        yield _row(line, name, texts[0], folders, path.parent)


def _is_kaldi(path: Path, first: str) -> bool:
    return path.is_dir() and (path / "wav.scp").is_file() and (path / "text").is_file()


FORMATS = (
    Format("a Kaldi folder (wav.scp, text)", _is_kaldi, _kaldi),
    Format("a LibriSpeech folder (*.trans.txt)", lambda path, first: path.is_dir(), _librispeech),
    Format(
        "JSON lines (audio_filepath, text)", lambda path, first: bool(re.match(r'\s*\{\s*["}]', first)), _json_lines
    ),
    Format(
        "Common Voice (path, sentence)",
        lambda path, first: {"path", "sentence"} <= set(first.split("\t")),
        _common_voice,
    ),
    Format("lines of path<TAB>text", lambda path, first: True, _pairs),
)


def _seconds(key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_SECONDS:
        raise Malformed(f"{key} is {_short(value)}: not a number of seconds")
    return float(value)


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or HALF_PAIR.search(value):
        raise Malformed(f"{key} is {_short(value)}: not text")
    return value


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _lines(path: Path) -> Iterator[Line]:
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
