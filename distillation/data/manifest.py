"""The tsv lists of utterances: the first line is the root folder, then ``relative path<TAB>frames`` per utterance."""

import contextlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distillation.errors import UserError
from wav2vec2.checkpoint import replacing

# 74 hours at 16 kHz. A list that claims more is damaged, and cutting up such an utterance would fill the memory.
MAX_FRAMES = 2**32
# Digits of the longest number that is looked at, leading zeros included.
MAX_DIGITS = 20
# Characters of a list that are checked at once.
BLOCK = 2**20
# What no list can hold in a file name; bytes that are no UTF-8 come as surrogates.
UNLISTABLE = re.compile("[\t\r\n\ud800-\udfff]")
NO_NAME = "a tab or line end in a name, or bytes that are no UTF-8, cannot be listed: rename it"
ROW_END = re.compile(rf"\t([0-9]{{1,{MAX_DIGITS}}})\r?(?:\n|\Z)")


@dataclass(frozen=True)
class Manifest:
    """Utterances of one data set.

    Attributes:
        root: folder that the paths are relative to.
        paths: one relative path per utterance.
        num_frames: length of each utterance in samples, int64 array ``[len(paths)]``.
        starts: its first sample in its file, int64 array ``[len(paths)]``; None where all utterances are whole files.
        texts: what is said in it; None where that is not known.
    """

    root: Path
    paths: list[str]
    num_frames: np.ndarray
    starts: np.ndarray | None = None
    texts: list[str] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def file(self, index: int) -> Path:
        """Full path of one utterance."""
        return self.root / self.paths[index]


def read_tsv(path: Path | str) -> Manifest:
    """Read and check a list of utterances.

    Raises:
        UserError: the file is missing, empty, not UTF-8, names a root that is not a folder, or has a bad line.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist: write it with prepare_data.py, or set --data.tsv_dir") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (byte {error.start}): write it with prepare_data.py") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not text or text.isspace():
        raise UserError(f"{path} is empty: write it with prepare_data.py")
    # Not splitlines(): a file name may hold any other character that Unicode counts as a line end.
    end = len(text) - text.endswith("\n")
    cut = text.find("\n", 0, end)
    root = _check_root(path, text[: end if cut < 0 else cut].removesuffix("\r"))
    if cut < 0:
        raise UserError(f"{path} lists no utterance, only the root {root}: write it with prepare_data.py")
    paths: list[str] = []
    num_frames: list[np.ndarray] = []
    while cut < end:
        begin, cut = cut + 1, text.find("\n", cut + 1 + BLOCK, end)
        cut = end if cut < 0 else cut
        names, frames = _parse(path, text[begin:cut], len(paths) + 2)
        paths += names
        num_frames.append(np.array(frames, dtype=np.int64))
    return Manifest(root, paths, np.concatenate(num_frames))


def write_tsv(path: Path | str, manifest: Manifest) -> None:
    """Write a list of utterances under its name only when it is complete; raises as `write_lists` does."""
    write_lists(Path(path).parent, {Path(path).name: manifest})


def write_lists(folder: Path, lists: Mapping[str, Manifest]) -> None:
    """Write lists of utterances under their names only when all of them are complete.

    Raises:
        UserError: a path cannot be written in this format.
        OSError: naming the file; the disk is full, the folder cannot be written, ...
    """
    with contextlib.ExitStack() as complete:
        for filename, manifest in lists.items():
            bad = next(filter(UNLISTABLE.search, (str(manifest.root), *manifest.paths)), None)
            if bad is not None:
                raise UserError(f"{shown(manifest.root / bad)}: {NO_NAME}")
            rows = zip(manifest.paths, manifest.num_frames.tolist(), strict=True)
            text = "".join(f"{line}\n" for line in (str(manifest.root), *(f"{name}\t{num}" for name, num in rows)))
            complete.enter_context(replacing(folder / filename)).write_text(text, encoding="utf-8")


def shown(path: Path | str) -> str:
    """A path as it is where one line of text can hold it; else as Python writes it."""
    text = str(path)
    return repr(text) if UNLISTABLE.search(text) else text


def write_lines(path: Path | str, lines: Iterable[str]) -> None:
    """Write text lines; nobody ever sees half of them.

    Raises:
        UserError: a line is no UTF-8 text.
        OSError: naming ``path``; the disk is full, the folder cannot be written, ...
    """
    try:
        content = "".join(f"{line}\n" for line in lines).encode("utf-8")
    except UnicodeEncodeError as error:
        name = error.object[error.start - 40 if error.start > 40 else 0 : error.end]
        raise UserError(f"cannot write {path}: a file name is not UTF-8 text, rename it: {name!r}") from None
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _parse(path: Path, block: str, first: int) -> tuple[list[str], list[int]]:
    """Names and frames of some lines, the first of which is line number ``first``."""
    *cells, _ = ROW_END.split(block)
    names, frames = cells[::2], list(map(int, cells[1::2]))
    # Checks of many lines at once take half the time. With one row end and one tab to a line, no name holds either.
    whole = len(names) == block.count("\n") + 1 == block.count("\t")
    if whole and min(frames) > 0 and max(frames) <= MAX_FRAMES and "\0" not in block and all(map(str.strip, names)):
        return names, frames
    lines = (line.removesuffix("\r") for line in block.split("\n"))
    rows = [_parse_line(path, number, line) for number, line in enumerate(lines, start=first)]
    return [name for name, _ in rows], [length for _, length in rows]


def _parse_line(path: Path, number: int, line: str) -> tuple[str, int]:
    name, tab, frames = line.partition("\t")
    if not line.strip():
        raise UserError(f"{path} line {number} is blank: remove it")
    if not tab or "\t" in frames or not name.strip() or "\0" in name:
        raise UserError(f"{path} line {number} is not 'relative path<TAB>frames': {line[:200]!r}")
    # int() alone would accept '1_000', ' 7' and digits of other scripts.
    if not (frames.isascii() and frames.isdigit()) or len(frames) > MAX_DIGITS or not 0 < int(frames) <= MAX_FRAMES:
        raise UserError(f"{path} line {number}: {frames[:40]!r} frames is not a whole number from 1 to {MAX_FRAMES}")
    return name, int(frames)


def _check_root(path: Path, line: str) -> Path:
    root = Path(line)
    try:
        found = bool(line.strip()) and root.is_dir()
    except (OSError, ValueError):
        found = False
    if not found:
        raise UserError(
            f"{path}: the root on its first line is not a folder: {line[:200]!r}, run prepare_data.py again"
        )
    return root
