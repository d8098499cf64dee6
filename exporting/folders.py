"""A folder that is there when all of it is written and checked, or not at all."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distillation.errors import UserError


@contextmanager
def unfinished(out: Path) -> Iterator[Path]:
    """A folder beside it, which becomes ``out`` if nothing fails.

    Raises:
        UserError: ``out`` is there and holds something.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out {out}: exists; name a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        folder.chmod(0o755)
        yield folder
        for file in folder.glob("*.*"):  # some libraries write what its owner alone may read
            file.chmod(0o644)
        if out.exists():
            out.rmdir()
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
