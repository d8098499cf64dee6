"""Data, losses, objectives, sparsity, schedules, checkpoints and configuration of the training stages."""

import os
import signal
import sys
from pathlib import Path

from distillation.stopping import INTERRUPTED, STOP_SIGNALS

# Threads that spin while they wait slow each other down where a machine does other work: training by a factor of 6.
# torch's OpenMP looks once, when torch is first imported; so every command imports this package before it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _stop(number: int, frame: object) -> None:
    os.write(2, f"stopped: {signal.Signals(number).name}: nothing was begun yet; run it again\n".encode())
    os._exit(INTERRUPTED)


# What a script of this repository, or a module of this package that is run by -m, imports takes seconds, in which its
# command does not listen yet. Other programs that import this package handle their signals themselves.
_main = getattr(sys.modules.get("__main__"), "__file__", None)
_is_script = _main is not None and Path(_main).resolve().parent == Path(__file__).resolve().parents[1]
if _is_script or sys.argv[:1] == ["-m"]:
    for _number in STOP_SIGNALS:
        signal.signal(_number, _stop)
