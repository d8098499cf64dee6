"""Read PyTorch checkpoints without running their pickles and without the packages whose objects they contain.

A pickle names the classes and functions that rebuild its objects. These names are read first, without building
anything; then ``torch.load(weights_only=True)`` loads the file with inert stand-ins for those of ``INERT``. A file
that names anything else is refused.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # Python 2 names, which protocol 2 still writes
from pathlib import Path
from typing import Any, BinaryIO

import torch

from wav2vec2.checkpoint import CheckpointError

# Rebuilt by torch's own restricted loader, which checks the names under torch again.
SAFE = re.compile(r"torch\..*|collections\.(OrderedDict|Counter)|_codecs\.encode|builtins\.(set|bytearray|complex)")
# Left behind by fairseq and omegaconf: their classes, the types in their annotations, numpy scalars of their meters.
INERT = re.compile(
    r"argparse\.Namespace|(omegaconf|fairseq|pytorch_lightning|typing|numpy)\..*|_?operator\.getitem|pathlib\.\w*Path"
    r"|builtins\.(int|float|bool|str|bytes|list|dict|tuple|object)|collections\.defaultdict"
)


class Record:
    """Stand-in for an object of a class that is not at hand: keeps its arguments and state, runs nothing."""

    args: tuple[Any, ...]
    state: Any

    def __new__(cls, *args: Any) -> Record:  # noqa: D102
        record = super().__new__(cls)
        record.args, record.state = args, None
        return record

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def load_pickled(path: str | Path) -> Any:
    """Load a checkpoint written by ``torch.save``, in today's zip format or the one before PyTorch 1.6, to the CPU.

    Objects of fairseq, omegaconf and argparse come back as :class:`Record`; see :func:`plain`.

    Raises:
        CheckpointError: no such file, a damaged or foreign file, or a pickle that names anything but data.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        names = _globals(path)
        unsafe = sorted(name for name in names if not SAFE.fullmatch(name) and not INERT.fullmatch(name))
        if unsafe:
            raise CheckpointError(f"{path}: refused, nothing was run: its pickle calls {', '.join(unsafe[:3])}")
        inert: list[Any] = [(_stand_in(name), name) for name in names if not SAFE.fullmatch(name)]
        with torch.serialization.safe_globals(inert):
            return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        reason = re.split(r"(?<=\.)\s|\n", str(error).strip())[-1] or "unknown instruction"
        raise CheckpointError(f"{path}: not a checkpoint, or refused by PyTorch's safe loader: {reason}") from error
    except Exception as error:  # a damaged file can fail anywhere in the parsers
        raise CheckpointError(
            f"{path}: damaged, incomplete or not a PyTorch checkpoint; download it again ({type(error).__name__})"
        ) from error


def plain(value: Any) -> Any:
    """Plain containers and scalars from what :func:`load_pickled` returns: a Namespace or a config node becomes a dict.

    Interpolations of omegaconf (``${task.normalize}``) and missing values (``???``) become None.
    """
    if isinstance(value, Record):
        state = value.state
        if isinstance(state, dict) and "_content" in state:  # omegaconf DictConfig and ListConfig
            return plain(state["_content"])
        if isinstance(state, dict) and "_val" in state:  # omegaconf leaf
            return plain(state["_val"])
        if isinstance(state, dict):
            return plain(state)
        return plain(value.args[0]) if len(value.args) == 1 else None  # an enum pickles as its value
    if isinstance(value, dict):
        return {key if isinstance(key, str | int) else str(plain(key)): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, str) and (value == "???" or value.startswith("${")):
        return None
    return value


def _stand_in(name: str) -> Any:
    if name == "collections.defaultdict":  # of omegaconf's resolver cache; must take items
        return lambda *factory: {}
    return type(name, (Record,), {})


def _globals(path: Path) -> set[str]:
    """Every global that the pickles of a checkpoint name, found without unpickling."""
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            file.seek(0)
            # Before PyTorch 1.6: magic number, protocol, system, object and storage keys, one pickle each; then bytes.
            return set().union(*(_globals_of_pickle(file) for _ in range(5)))
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith(".pkl")]
        if not pickles:
            raise CheckpointError(f"{path}: no PyTorch checkpoint: the archive holds no pickle")
        return set().union(*(_globals_of_pickle(io.BytesIO(archive.read(name))) for name in pickles))


def _globals_of_pickle(file: BinaryIO) -> set[str]:
    names = set()
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name in ("GLOBAL", "INST"):
            module, name = str(argument).split(" ", 1)
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
            names.add(f"{module}.{name}")
        elif opcode.name in ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4"):
            raise pickle.UnpicklingError(f"the instruction {opcode.name} hides what it calls")
    return names
