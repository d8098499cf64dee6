"""Where an export may be written; files and folders that are there when all is written and checked, or not at all."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distillation.errors import UserError


def require_place(out: Path, is_folder: bool) -> None:
    """Refuse, before the work, a file or folder that could not be written after it.

    Raises:
        UserError: a folder that is there and holds something, a folder in place of a file, or a place without the
            right to write.
    """
    if is_folder and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists; name a new folder")
    if not is_folder and out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file")
    places = [out, *out.absolute().parents] if is_folder else out.absolute().parents
    try:
        with tempfile.TemporaryFile(dir=next(place for place in places if place.exists())):
            pass
    except OSError as error:
        raise UserError(f"--out {out}: {error.strerror}; choose a folder that can be written") from None


@contextmanager
def unfinished_file(out: Path) -> Iterator[Path]:
    """The file under its own name in a folder beside it; what is written there is kept if nothing fails.

    It keeps its name while it is checked: large ONNX models have their weights in a second file, by name.
    """
    with _hidden(out.stem, out.parent) as folder:
        yield folder / out.name
        for file in folder.iterdir():
            file.replace(out.parent / file.name)


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A folder whose content is that of ``out`` if nothing fails; ``out`` is one that :func:`require_place` lets pass.

    One that is there stays the same folder, since it may be somebody's current one, or a disk of its own.
    """
    place = out if out.exists() else out.parent
    with _hidden(out.name, place) as folder:
        yield folder
        umask = os.umask(0)
        os.umask(umask)
        for file in folder.iterdir():  # some libraries write what its owner alone may read
            file.chmod(0o666 & ~umask)
        if place == out:
            for file in folder.iterdir():
                file.rename(out / file.name)
        else:
            folder.chmod(0o777 & ~umask)
            folder.rename(out)


@contextmanager
def _hidden(name: str, place: Path) -> Iterator[Path]:
    """A folder that is gone in the end; ``place`` is made if need be."""
    place.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=place))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
