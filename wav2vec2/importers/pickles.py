"""Read PyTorch checkpoints without running their pickles and without the packages whose objects they contain.

A pickle names the classes and functions that rebuild its objects. These names are read first, without building
anything; then ``torch.load(weights_only=True)`` loads the file. What it rebuilds itself are tensors and plain types.
For every other name, of whatever package, it gets a stand-in that keeps its arguments and runs nothing: files of other
groups hold callbacks, schedules and settings of classes that nobody can list.

So nothing that a file names is ever imported or called, and safety rests on that alone. ``ATTACK`` does not add to it:
a file that names what only an attack needs is not worth reading, and its user should know.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING  # Python 2 names, which protocol 2 still writes
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import torch

from wav2vec2.checkpoint import CheckpointError, check_torch_file

ATTACK = re.compile(
    r"(os|posix|nt|sys|subprocess|_posixsubprocess|shutil|_?socket|urllib\.request|http\.client|ftplib|smtplib|requests"
    r"|webbrowser|importlib|pkgutil|imp|runpy|code|codeop|pdb|bdb|timeit|_?ctypes|cffi|pty|_?multiprocessing|_?thread"
    r"|threading|asyncio|_?pickle|marshal|pip|torch\.hub|torch\.utils\.cpp_extension)(\..*)?"
    r"|builtins\.(eval|exec|execfile|compile|__import__|reload|apply|setattr|delattr|globals|locals|vars|open"
    r"|file|input|breakpoint)"
    r"|_?operator\.(attrgetter|methodcaller)|types\.(CodeType|FunctionType|MethodType)|torch\.(load|compile)"
)
HIDING = ("STACK_GLOBAL", "EXT1", "EXT2", "EXT4")  # take what they name from the stack or from a table
# Instructions that leave the object which they work on, or made, in place of the first that they take.
KEEPING = ("REDUCE", "NEWOBJ", "BUILD", "SETITEM", "SETITEMS", "APPEND", "APPENDS", "MEMOIZE", "DUP")


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


class Table:
    """Stand-in for a kind of dict."""

    def __new__(cls, *args: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]  # noqa: D102
        return OrderedDict()  # torch's loader puts items, and a state of its own, only into one of these


class Series:
    """Stand-in for a kind of list."""

    def __new__(cls, *args: Any) -> list[Any]:  # type: ignore[misc]  # noqa: D102
        return []


@dataclass
class Names:
    """What pickles name.

    Attributes:
        all: classes and functions, with their module.
        tables: those of them whose objects take items by key.
        series: those whose objects take items one after the other.
    """

    all: set[str] = field(default_factory=set)
    tables: set[str] = field(default_factory=set)
    series: set[str] = field(default_factory=set)


def load_pickled(path: str | Path) -> Any:
    """Load a checkpoint written by ``torch.save``, in today's zip format or the one before PyTorch 1.6, to the CPU.

    Objects of other packages come back as :class:`Record`, or as dict or list where they are a kind of these; see
    :func:`plain`. The tensors of a zip file are read from the disk when they are looked at.

    Raises:
        CheckpointError: no such file, a damaged or foreign file, or a pickle that an attack would write.
    """
    path = Path(path)
    try:
        zipped = check_torch_file(path)
        names = _names(path, zipped)
        if attacks := sorted(filter(ATTACK.fullmatch, names.all)):
            raise CheckpointError(f"{path}: refused, nothing was run: its pickle calls {', '.join(attacks[:3])}")
        # torch looks among its own tensors and types first
        inert: list[Any] = [(_stand_in(name, names), name) for name in names.all]
        with torch.serialization.safe_globals(inert):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        said = str(error).rpartition("WeightsUnpickler error:")[2].split("\n")  # torch puts advice around it
        reason = next((line for line in map(str.strip, said) if line), "unknown instruction")
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


def _stand_in(name: str, names: Names) -> type:
    base = Table if name in names.tables else Series if name in names.series else Record
    return type(name, (base,), {})


def _names(path: Path, zipped: bool) -> Names:
    """What the pickles of a checkpoint name, found without unpickling."""
    names = Names()
    if not zipped:
        # Before PyTorch 1.6: magic number, protocol, system, object and storage keys, one pickle each; then bytes.
        with path.open("rb") as file:
            for _ in range(5):
                _scan(file, names)
        return names
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith(".pkl")]
        if not pickles:
            raise CheckpointError(f"{path}: no PyTorch checkpoint: the archive holds no pickle")
        for name in pickles:
            _scan(io.BytesIO(archive.read(name)), names)
    return names


def _scan(file: BinaryIO, names: Names) -> None:
    """Add what one pickle names. Follows its stack, where of each value only the name it was made by is known."""
    stack: list[str | None] = []
    memo: dict[Any, str | None] = {}
    marks: list[int] = []
    for opcode, argument, _ in pickletools.genops(file):
        name, before = opcode.name, opcode.stack_before
        if name in HIDING:
            raise pickle.UnpicklingError(f"the instruction {name} hides what it calls")
        taken = len(before)
        if pickletools.markobject in before:  # it and all above; some instructions also take what lies below
            below = before.index(pickletools.markobject)
            taken = len(stack) - marks.pop() + below
        if taken > len(stack):
            raise pickle.UnpicklingError(f"the instruction {name} finds no value")
        values = stack[len(stack) - taken :]
        del stack[len(stack) - taken :]
        result = values[0] if name in KEEPING else None
        if name in ("GLOBAL", "INST"):
            module, short = str(argument).split(" ", 1)
            names.all.add(f"{module}.{short}")  # torch translates fewer of Python 2's names
            module, short = NAME_MAPPING.get((module, short), (IMPORT_MAPPING.get(module, module), short))
            result = f"{module}.{short}"
            names.all.add(result)
        elif name == "MARK":
            marks.append(len(stack))
            continue
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            result = memo[argument]
        elif result is not None and name in ("SETITEM", "SETITEMS"):
            names.tables.add(result)
        elif result is not None and name in ("APPEND", "APPENDS"):
            names.series.add(result)
        stack += [result] * len(opcode.stack_after)
