"""What to extract features of: audio files, folders and lists, and how each file of features is called.

Lists are those of prepare_data.py (root, then path<TAB>frames), Kaldi's wav.scp or its folder (with segments, if it has
them), and one path per line.
"""

import contextlib
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from distillation.data.corpus import ALL_SUFFIXES, find
from distillation.data.kaldi import KaldiData, Unusable, read_lines
from distillation.data.manifest import read_tsv
from distillation.errors import UserError

LISTS = {".tsv": "tsv", ".scp": "kaldi", ".txt": "list", ".lst": "list", ".list": "list"}
HEAD = 4096  # bytes of a file that tell text from audio


class Recording(NamedTuple):
    """A file or a stretch of it, in seconds."""

    path: Path
    name: str = ""
    """Of its file of features below OUT, without suffix."""
    start: float = 0.0
    end: float | None = None

    @property
    def place(self) -> str:
        """The file and the stretch, in words."""
        whole = self.end is None and not self.start
        return str(self.path) if whole else f"{self.name} ({self.path} from {self.start:g} s)"


class Failure(NamedTuple):
    """What cannot be used, and why."""

    what: str
    reason: str


def find_recordings(arguments: Sequence[Path]) -> tuple[list[Recording], list[Failure]]:
    """All that some files, folders and lists name, each once, in their order.

    Names follow the folders below the deepest one that holds everything; Kaldi's are those of its utterances. Files
    that differ in their suffix alone keep it in their names.

    Raises:
        UserError: an argument that is not there, holds no audio or is no list, or a name that two recordings would get.
    """
    named: list[Recording] = []
    paths: dict[Path, None] = {}
    roots: set[Path] = set()
    failures: list[Failure] = []
    for argument in arguments:
        kind = _kind(argument)
        if kind == "kaldi":
            named += _kaldi(argument, failures)
            continue
        root, found = FINDERS[kind](argument)
        outside = {path.parent for path in found if root is None or not path.is_relative_to(root)}
        roots |= outside if root is None else {root, *outside}
        paths |= dict.fromkeys(found)
    named += _by_folders(list(paths), roots)
    once: dict[str, Recording] = {}
    for recording in named:
        other = once.setdefault(recording.name, recording)
        if other[2:] != recording[2:] or other.path != recording.path:
            raise UserError(
                f"{recording.place} and {other.place} would both become {recording.name}; extract them to two folders"
            )
    return list(once.values()), failures


def _kind(argument: Path) -> str:
    """What an argument is."""
    if argument.is_dir():
        return "kaldi" if (argument / "wav.scp").is_file() else "folder"
    try:
        if not stat.S_ISREG(argument.stat().st_mode):
            raise UserError(f"{argument}: not a regular file")
    except OSError as error:
        raise UserError(f"{argument}: {error.strerror}") from None
    if argument.suffix.lower() in ALL_SUFFIXES:
        return "file"
    if argument.suffix in LISTS:
        return LISTS[argument.suffix]
    with argument.open("rb") as file:
        head = file.read(HEAD)
    if b"\0" in head or not _is_text(head):
        return "file"
    first, _, second = head.partition(b"\n")
    return "tsv" if b"\t" not in first and second.partition(b"\n")[0].rpartition(b"\t")[2].strip().isdigit() else "list"


def _is_text(head: bytes) -> bool:
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(head) - 4 and len(head) == HEAD  # a letter that is cut in two
    return True


def _file(argument: Path) -> tuple[None, list[Path]]:
    return None, [_absolute(argument)]


def _folder(argument: Path) -> tuple[Path, list[Path]]:
    found, root = find(argument, ["."]), _absolute(argument)
    return root, [root / name for name in sorted([*found.names, *found.foreign])]


def _tsv(argument: Path) -> tuple[Path, list[Path]]:
    manifest = read_tsv(argument)
    root = _absolute(manifest.root)
    return root, [_absolute(root / name) for name in manifest.paths]


def _list(argument: Path) -> tuple[None, list[Path]]:
    found = []
    for line in read_lines(argument):
        if "\0" in line.text:
            line.refuse("holds a NUL: this is no list of paths")
        found.append(_absolute(_from(argument.parent, line.text.strip())))
    if not found:
        raise UserError(f"{argument}: names no file")
    return None, found


FINDERS = {"file": _file, "folder": _folder, "tsv": _tsv, "list": _list}


def _kaldi(argument: Path, failures: list[Failure]) -> Iterator[Recording]:
    """Utterances of a folder, or the recordings that a file lists."""
    folder = argument if argument.is_dir() else argument.parent
    data = KaldiData(folder) if argument.is_dir() else KaldiData(folder, argument.name, segments=None)
    if not data.names:
        raise UserError(f"{argument}: names no recording")
    for name in data.names:
        try:
            place = data.find(name)
        except Unusable as error:
            failures.append(Failure(f"{argument}: {name}", str(error)))
            continue
        if {"", ".", ".."} & set(name.split("/")):
            failures.append(Failure(f"{argument}: {name}", "is no name for a file"))
            continue
        yield Recording(_absolute(_from(folder, place.path)), name, place.start, place.end)


def _by_folders(paths: list[Path], roots: set[Path]) -> Iterator[Recording]:
    if not paths:
        return
    base = Path(os.path.commonpath(roots))
    names = {path: path.with_suffix("") for path in paths}
    while shared := {name for name, count in Counter(names.values()).items() if count > 1}:
        names = {path: path if name in shared else name for path, name in names.items()}
    for path, name in names.items():
        yield Recording(path, str(name.relative_to(base)))


def _from(folder: Path, name: str) -> Path:
    """A file that a list in a folder names: from there, or where there is no such file, from here."""
    path = folder / name
    with contextlib.suppress(OSError):  # of a name that is too long, a folder that is closed: reading it will say so
        return path if path.exists() or not Path(name).exists() else Path(name)
    return path


def _absolute(path: Path) -> Path:
    """Without ``..``, but with links as they are: features lie where the audio is found."""
    return Path(os.path.abspath(path))  # noqa: PTH100
