"""Every private part of Lightning that this toolkit touches; a test holds that they exist in the pinned version."""

import logging
import warnings
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies.launchers import subprocess_script

# Lightning's own advice on the console; what a user must know is logged by us or raised
logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", module="pytorch_lightning")


def supervise_alone(trainer: pl.Trainer) -> None:
    """Leave signals and the processes of a run to :mod:`distillation.training.processes`.

    Lightning's signal handlers wait for all ranks inside the handler, and its loop asks the device before every
    micro-batch whether a signal came. Its observer of child processes ends this one without a word.
    """
    trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
    subprocess_script._launch_process_observer = lambda child_processes: None


def wrap_restoring(trainer: pl.Trainer, wrap: Callable[[str, Callable[..., None]], Callable[..., None]]) -> None:
    """Replace what takes the content of a checkpoint.

    Args:
        trainer: before it runs.
        wrap: gets "modules" (weights and hooks) or "state" (loops, optimizers, schedules) and Lightning's method, and
            returns what is called in its place.
    """
    connector: Any = trainer._checkpoint_connector
    connector._restore_modules_and_callbacks = wrap("modules", connector._restore_modules_and_callbacks)
    connector.restore_training_state = wrap("state", connector.restore_training_state)
