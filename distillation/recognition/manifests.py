"""Lists of transcribed audio in the formats that corpora come in: ``FORMATS``, told apart by names and first lines."""

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
from distillation.data.kaldi import (
    MALFORMED,
    KaldiData,
    Line,
    Malformed,
    Unusable,
    read_lines,
    read_table,
    require_seconds,
    shortened,
)
from distillation.errors import UserError

logger = logging.getLogger(__name__)

KEYS = ("audio_filepath", "text", "offset", "duration")  # of NeMo's JSON; times in seconds, where there are any
LISTS = (".tsv", ".txt", ".json", ".jsonl")  # suffixes of lists that are looked for in a folder
COMMON_VOICE = ("train.tsv", "validated.tsv")  # the first that is there stands for its folder
HALF_PAIR = re.compile("[\ud800-\udfff]")  # what JSON can hold and UTF-8 cannot


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
    lines = iter(()) if source.is_dir() else read_lines(source)
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


def find_sources(place: Path) -> list[Path]:
    """What lists transcribed audio: a file or folder itself, or the lists and Kaldi folders in a folder.

    Raises:
        UserError: nothing there.
    """
    if not place.is_dir() or _is_kaldi(place, "") or _listings(place):
        return [place]
    found = []
    for name in COMMON_VOICE:  # its other lists hold what was rejected, what is to test on, or lengths
        if (place / name).is_file() and _first_line(place / name).startswith("client_id\t"):
            return [place / name]
    for inner in sorted(place.iterdir()):
        if inner.name.startswith(".") or (not inner.is_dir() and inner.suffix not in LISTS):
            continue
        if _is_kaldi(inner, "") or (inner.is_file() and _lists_something(inner)):
            found.append(inner)
    if not found:
        known = ", ".join(format.name for format in FORMATS)
        raise UserError(f"{place}: nothing in it says what is spoken; known are {known}")
    return found


def _lists_something(path: Path) -> bool:
    first = _first_line(path)
    return any(format.fits(path, first) for format in FORMATS[2:4]) or first.count("\t") == 1


def _first_line(path: Path) -> str:
    with path.open("rb") as file:
        return file.readline(10_000).decode("utf-8", "replace").removeprefix("\ufeff").rstrip("\r\n")


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
        for line in read_lines(listing):
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
    data = KaldiData(folder)
    for name, (line, text) in read_table(folder / "text").items():
        try:
            place = data.find(name)
        except Unusable as error:
            yield Row(line.place, folder / name, text, fault=(error.kind, error.detail))
        else:
            yield _row(line, place.path, text, folders, folder, place.start, place.end)


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
    start = 0.0 if offset is None else require_seconds(KEYS[2], offset)
    end = None if duration is None else start + require_seconds(KEYS[3], duration)
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


def _text(key: str, value: Any) -> str:
    if not isinstance(value, str) or HALF_PAIR.search(value):
        raise Malformed(f"{key} is {shortened(value)}: not text")
    return value
