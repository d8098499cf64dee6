"""The tsv lists of utterances: the first line is the root folder, then ``relative path<TAB>frames`` per utterance."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distillation.errors import UserError
from wav2vec2.checkpoint import replacing

# 74 hours at 16 kHz. A list that claims more is damaged, and cutting up such an utterance would fill the memory.
MAX_FRAMES = 2**32


@dataclass(frozen=True)
class Manifest:
    """Utterances of one data set.

    Attributes:
        root: folder that the paths are relative to.
        paths: one relative path per utterance.
        num_frames: length of each utterance in samples, int64 array ``[len(paths)]``.
    """

    root: Path
    paths: list[str]
    num_frames: np.ndarray

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
    # Not splitlines(): a file name may hold any other character that Unicode counts as a line end.
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if not any(line.strip() for line in lines):
        raise UserError(f"{path} is empty: write it with prepare_data.py")
    root = _check_root(path, lines[0])
    if len(lines) == 1:
        raise UserError(f"{path} lists no utterance, only the root {root}: write it with prepare_data.py")
    paths: list[str] = []
    num_frames: list[int] = []
    for number, line in enumerate(lines[1:], start=2):
        name, tab, frames = line.partition("\t")
        if not line.strip():
            raise UserError(f"{path} line {number} is blank: remove it")
        if not tab or "\t" in frames or not name.strip() or "\0" in name:
            raise UserError(f"{path} line {number} is not 'relative path<TAB>frames': {line[:200]!r}")
        # int() alone would accept '1_000', ' 7' and digits of other scripts.
        if not (frames.isascii() and frames.isdigit()) or len(frames) > 20 or not 0 < int(frames) <= MAX_FRAMES:
            raise UserError(
                f"{path} line {number}: {frames[:40]!r} frames is not a whole number from 1 to {MAX_FRAMES}"
            )
        paths.append(name)
        num_frames.append(int(frames))
    return Manifest(root, paths, np.array(num_frames, dtype=np.int64))


def write_tsv(path: Path | str, manifest: Manifest) -> None:
    """Write a list of utterances under its name only when it is complete.

    Raises:
        UserError: a path cannot be written in this format.
        OSError: naming ``path``; the disk is full, the folder cannot be written, ...
    """
    for name in manifest.paths:
        if any(character in name for character in "\t\r\n"):
            raise UserError(f"{manifest.root / name!s}: a tab or line end in a file name cannot be listed, rename it")
    rows = zip(manifest.paths, manifest.num_frames.tolist(), strict=True)
    write_lines(path, [str(manifest.root), *(f"{name}\t{frames}" for name, frames in rows)])


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
