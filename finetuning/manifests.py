"""Lists of transcribed audio in the formats that corpora come in: ``FORMATS``, told apart by names and first lines.

All text files are UTF-8, with a byte-order mark or without; their lines end at a line feed and nowhere else.
"""

from __future__ import annotations

import itertools
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from distillation.data.manifest import MAX_FRAMES
from distillation.errors import UserError
from wav2vec2.feature_extractor import SAMPLE_RATE

MAX_SECONDS = MAX_FRAMES / SAMPLE_RATE
KEYS = ("audio_filepath", "text", "offset", "duration")  # of NeMo's JSON; times in seconds, where there are any
HALF_PAIR = re.compile("[\ud800-\udfff]")  # what JSON can hold and UTF-8 cannot


class Line(NamedTuple):
    """A line of a text file; ``place``: "FILE line NUMBER", counted from 1."""

    place: str
    text: str

    def refuse(self, reason: str) -> NoReturn:
        """The file is not what it was taken for."""
        raise UserError(f"{self.place} {reason}")


class Row(NamedTuple):
    """What a list says of an utterance; nothing of it is checked against the audio.

    ``place`` is that of its line, ``end`` None where the audio ends; ``missing`` says why no file is known.
    """

    place: str
    path: Path
    text: str
    start: float = 0.0  # s
    end: float | None = None  # s
    missing: str = ""

    @property
    def is_whole(self) -> bool:
        """Whether it is all that its file holds."""
        return self.end is None and self.start == 0


class AudioFolders:
    """Where the paths in lists lead.

    Args:
        audio: folder that relative ones start from, instead of the one that their format says. Where prepare_data.py
            --convert has written NAME.mp3.flac or NAME.flac there, that is taken for NAME.mp3.
    """

    def __init__(self, audio: Path | None = None) -> None:
        self.audio = audio
        self.listed: dict[Path, frozenset[str]] = {}

    def find(self, line: Line, name: str, beside: Path) -> Path:
        """The file that a line names; ``beside``: folder that its format says."""
        if not name or "\0" in name:
            line.refuse(f"names no file: {name[:100]!r}")
        if self.audio is None:
            return beside / name
        path = self.audio / name
        if Path(name).is_absolute():
            return path
        there = self._names(path.parent)
        return next((path.with_name(n) for n in (f"{path.name}.flac", f"{path.stem}.flac") if n in there), path)

    def _names(self, folder: Path) -> frozenset[str]:
        if folder not in self.listed:
            try:
                with os.scandir(folder) as entries:
                    self.listed[folder] = frozenset(entry.name for entry in entries)
            except OSError:  # reading its files will say why
                self.listed[folder] = frozenset()
        return self.listed[folder]


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
    rows = list(chosen.read(source, itertools.chain(first, lines), AudioFolders(audio)))
    if not rows:
        known = ", ".join(format.name for format in FORMATS)
        raise UserError(f"{source}: no transcribed utterance; known are {known}")
    return rows


def _librispeech(folder: Path, lines: Iterator[Line], folders: AudioFolders) -> Iterator[Row]:
    for listing in sorted(folder.rglob("*.trans.txt")):
        chapter = listing.parent
        for line in _lines(listing):
            name, _, text = line.text.partition(" ")
            if name:
                yield Row(line.place, chapter / f"{name}.flac", text)


def _kaldi(folder: Path, lines: Iterator[Line], folders: AudioFolders) -> Iterator[Row]:
    recordings = _table(folder / "wav.scp")
    for name, (line, path) in recordings.items():
        if path.endswith("|"):
            line.refuse(f"makes {name} by a command, which would have to be run: write what it gives to a file")
    has_segments = (folder / "segments").is_file()
    segments = _table(folder / "segments") if has_segments else {}
    for name, (line, text) in _table(folder / "text").items():
        recording, start, end = name, 0.0, None
        if has_segments:
            if name not in segments:
                yield Row(line.place, folder / name, text, missing="no such line in segments")
                continue
            recording, start, end = _segment(*segments[name])
        if recording not in recordings:
            yield Row(line.place, folder / name, text, missing=f"no {recording} in wav.scp")
            continue
        yield Row(line.place, folders.find(*recordings[recording], folder), text, start, end)


def _segment(line: Line, text: str) -> tuple[str, float, float | None]:
    """Recording, start and end of ``recording start end``, where -1 stands for the recording's end."""
    try:
        recording, start, end = text.split()
        times = float(start), float(end)
    except ValueError:
        line.refuse("is not utterance, recording, start and end")
    if times[1] == -1:
        return recording, _seconds(line, times[0], "start"), None
    if times[1] < times[0]:
        line.refuse("ends before it starts")
    return recording, _seconds(line, times[0], "start"), _seconds(line, times[1], "end")


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
    folder = path.parent
    for line in lines:
        try:
            entry = json.loads(line.text)
        except (ValueError, RecursionError):
            line.refuse("is not JSON")
        name, text, start, length = map(entry.get, KEYS) if isinstance(entry, dict) else [None] * len(KEYS)
        if not isinstance(name, str) or not isinstance(text, str):
            line.refuse("lacks audio_filepath or text")
        if HALF_PAIR.search(name + text):
            line.refuse("holds half of a character, which is no Unicode text")
        start = 0.0 if start is None else _seconds(line, start, "offset")
        end = None if length is None else start + _seconds(line, length, "duration")
        yield Row(line.place, folders.find(line, name, folder), text, start, end)


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
        yield Row(line.place, folders.find(line, name, clips), text)


def _pairs(path: Path, lines: Iterator[Line], folders: AudioFolders) -> Iterator[Row]:
    folder = path.parent
    for line in lines:
        name, *texts = line.text.split("\t")
        if not name or len(texts) != 1:
            line.refuse(f"is not path<TAB>text: {1 + len(texts)} columns" if texts else "is not path<TAB>text")
        yield Row(line.place, folders.find(line, name, folder), texts[0])


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


def _seconds(line: Line, value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MAX_SECONDS:
        line.refuse(f"has {str(value)[:40]} for its {name}: not a number of seconds")
    return float(value)


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
