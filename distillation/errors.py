"""A user's mistake, a full disk or an interruption becomes one line and an exit code; a bug keeps its traceback.

Exit codes: 0 done; 2 something must be put right first; 75 stopped by a signal or Ctrl-C, nothing finished is lost and
the same command goes on; 1 a bug, another process of the run died, or some of many files could not be used.
"""

import errno
import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from distillation.stopping import INTERRUPTED, Raising, Signalled, Stopped, listening
from wav2vec2 import CheckpointError

logger = logging.getLogger(__name__)

FAILED, MISTAKE = 1, 2

ADVICE = {
    errno.ENOSPC: "make room and run again",
    errno.EDQUOT: "make room and run again",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f) and run again",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "choose a folder that can be written, or change its rights",
    errno.EPERM: "choose a folder that can be written, or change its rights",
    errno.ENOTDIR: "a part of this path is a file",
    errno.EEXIST: "this is a file where a folder is needed",
    errno.EIO: "is the disk or network mount there? Then run again",
    errno.ESTALE: "is the network mount there? Then run again",
    errno.ENOTCONN: "is the network mount there? Then run again",
}


NO_GPU_MEMORY = (
    "unable to find an engine to execute this computation", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)  # fmt: skip


class UserError(ValueError):
    """Bad input: the message names the file and the value, and says what to do."""


class Problems(UserError):
    """Several mistakes that have nothing to do with each other, told at once."""

    def __init__(self, messages: list[str]) -> None:
        super().__init__("; ".join(messages))
        self.messages = messages


def require(settings: object, section: str, must: str, holds: Callable[[Any], bool], *names: str) -> None:
    """Refuse values of settings that are set.

    Raises:
        UserError: naming ``section`` and setting, the value, and what it ``must``.
    """
    for name in names:
        value = getattr(settings, name)
        if value is not None and not holds(value):
            raise UserError(f"{section}{name} is {value}: it must {must}")


class Incomplete(Exception):
    """What could be done is done, and the message says what could not: exit code 1."""


class PeerLost(Exception):
    """Another process of the run is gone; its own error says why."""


def command(main: Callable[..., None]) -> Callable[..., None]:
    """Decorate the ``main`` of a script: set up logging, report what a user can cure in one line, set the exit code."""

    @functools.wraps(main)
    def run(*args: object, **kwargs: object) -> None:
        logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
        try:
            with listening(Raising()):
                main(*args, **kwargs)
        except Stopped as error:
            print(f"stopped: {error}", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except (Signalled, KeyboardInterrupt) as error:
            print(f"stopped: {str(error) or 'SIGINT'}: nothing is half-written; run it again", file=sys.stderr)
            _leave(INTERRUPTED)
        except Exception as error:
            message = describe(error)
            if message is None:
                if not _in_nccl():
                    raise
                traceback.print_exc()
                _leave(FAILED)
            logger.debug("traceback", exc_info=True)
            for text in error.messages if isinstance(error, Problems) else [message]:
                print(f"error: {' '.join(text.split())}", file=sys.stderr)
            _leave(FAILED if isinstance(error, PeerLost | Incomplete) else MISTAKE)

    return run


def _in_nccl() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_backend() == "nccl"


def _leave(code: int) -> NoReturn:
    """Exit; at once where other processes may wait for this one in NCCL, whose clean-up at exit would wait for them."""
    if _in_nccl():
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def is_out_of_gpu_memory(error: BaseException) -> bool:
    """Whether a GPU had too little memory; what cuDNN, cuBLAS and the driver say of it is no OutOfMemoryError."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in NO_GPU_MEMORY)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the machine had too little memory."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def describe(error: Exception) -> str | None:
    """What to tell a user about an error that is no bug; None for a bug."""
    text = str(error)
    if text.startswith("Caught ") and "Original Traceback" in text:  # what a process that reads audio raised
        text = text.strip().splitlines()[-1].partition(": ")[2]
    if isinstance(error, UserError | CheckpointError | PeerLost | Incomplete):
        return text
    if isinstance(error, OSError):
        return describe_os_error(error)
    if is_out_of_gpu_memory(error):
        return f"out of GPU memory: {text.splitlines()[0]}"
    if is_out_of_memory(error):
        return "out of memory: lower --data.seconds_per_batch or --data.num_workers"
    if isinstance(error, RuntimeError) and text.startswith("DataLoader worker"):
        reason = text.split(". ")[0]
        return f"{reason}: out of memory, or of shared memory? Lower --data.num_workers, in Docker raise --shm-size"
    if isinstance(error, RuntimeError) and text.startswith("DataLoader timed out"):
        return f"{text.split('. ')[0]}: is the disk or network mount of the audio there?"
    return None


def describe_os_error(error: OSError) -> str:
    """The file, the reason and what to do."""
    if error.strerror is None:
        return str(error)
    what = f"{error.filename}: {error.strerror}" if error.filename is not None else error.strerror
    advice = ADVICE.get(error.errno or 0)
    return what if advice is None else f"{what}; {advice} (what was complete before is intact)"
