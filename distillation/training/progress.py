"""What happens at update boundaries: the progress bar, rows of metrics, checkpoints, the stop that was asked for."""

import logging
import time
from pathlib import Path
from typing import Any, Protocol

import pytorch_lightning as pl
import torch
from tqdm import tqdm

from distillation.config import Recipe
from distillation.errors import UserError, is_out_of_gpu_memory
from distillation.recognition.decoding import RATES
from distillation.stopping import Stopped, StopRequest
from distillation.training import memory
from distillation.training.metrics import MetricsCSV
from distillation.training.processes import Agreement, shared
from distillation.training.step import TrainingStep

logger = logging.getLogger(__name__)

SHOWN = ("train/distill", "sparsity/expected", "sparsity/target")  # beside the bar
HEADROOM = 1.2  # readers that give less than so many times what training takes are worth a word


class Trained(Protocol):
    """What is asked of the module that is trained."""

    step: TrainingStep

    def log_training(self) -> None:
        """Log a row of metrics."""


class UpdateBar(pl.Callback):
    """Progress bar over the updates of a run."""

    bar: tqdm | None = None

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Open the bar where the run stands."""
        self.bar = tqdm(total=trainer.max_steps, initial=trainer.global_step, desc="train", unit="update",
                        dynamic_ncols=True, disable=not trainer.is_global_zero, mininterval=1.0)  # fmt: skip

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Close it before anything is said about the error."""
        self.on_train_end(trainer, module)


class SavingBar(UpdateBar):
    """Progress bar over updates, and checkpoints at their boundaries: at intervals, at the end, and on a stop signal.

    Args:
        last: path of the newest checkpoint.
        every: updates between two checkpoints.
        minutes: after which one is written in any case.
        validate_every: updates between two validations; a checkpoint that is due with one waits for it.

    Attributes:
        stop: listens for signals from the start of training on; to be opened around it.
    """

    def __init__(self, last: Path, every: int, minutes: float, validate_every: int) -> None:
        self.last, self.every, self.minutes, self.validate_every = last, every, minutes, validate_every
        self.stop = StopRequest()
        self.saved_at = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Open the bar where the run stands."""
        self.step, self.max_steps = trainer.global_step, trainer.max_steps
        self.agree = Agreement(trainer.world_size)
        self.stop.listen()
        super().on_train_start(trainer, module)

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an update: save when it is time, stop when a signal asked for it."""
        if trainer.global_step == self.step:  # accumulating
            return
        assert self.bar is not None
        self.step = trainer.global_step
        self.bar.update(1)
        self.on_update(trainer, module)
        if self.step % min(self.validate_every, self.max_steps):
            self._save_if_due(trainer)
        # else after the validation, so that none is lost

    def on_update(self, trainer: pl.Trainer, module: Any) -> None:
        """After update ``self.step``, before it is saved."""

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The checkpoint that waited for the validation."""
        if trainer.state.fn == "fit":
            self._save_if_due(trainer, wait=True)

    def _save_if_due(self, trainer: pl.Trainer, wait: bool = False) -> None:
        late = time.monotonic() - self.saved_at > 60 * self.minutes
        stop, late = self.agree([self.stop.signal is not None, late], wait)
        stop = stop and self.step < self.max_steps
        if stop or late or self.step % self.every == 0 or self.step == self.max_steps:
            trainer.save_checkpoint(self.last)
            self.saved_at = time.monotonic()
            self.agree.forget()
        if stop:
            why = self.stop.signal or "another process of the run was asked to end"
            raise shared(
                trainer, Stopped(f"{why} at update {self.step}: saved in {self.last}; the same command resumes")
            )


class Progress(SavingBar):
    """The bar of a distillation, with rows of metrics and a word about readers and memory.

    Args:
        recipe: intervals.
        last: path of the newest checkpoint.
    """

    def __init__(self, recipe: Recipe, last: Path) -> None:
        self.recipe, self.config, config = recipe, recipe.trainer, recipe.trainer
        super().__init__(last, config.checkpoint_every, config.checkpoint_minutes, config.validate_every)
        self.compared = False
        self.rates: dict[str, str] = {}  # of the last validation

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Keep the error rates for the bar."""
        row = metrics_table(trainer).row(trainer.global_step)
        self.rates = {name: f"{float(row[f'valid/{name}']):.1f} %" for name in RATES if f"valid/{name}" in row}
        super().on_validation_end(trainer, module)

    def on_update(self, trainer: pl.Trainer, module: Trained) -> None:
        """Log when it is time."""
        assert self.bar is not None
        if self.step % self.config.log_every == 0 or self.step == self.max_steps:
            module.log_training()
            row = metrics_table(trainer).row(self.step)
            shown = {k.split("/")[1]: f"{float(row[k]):.4f}" for k in SHOWN if k in row} | self.rates
            for name in row:  # only the first process has one
                if name.startswith("cost/") and module.step.lagrangian is not None:
                    shown["cost"] = module.step.lagrangian.cost.text(float(row[name]))
            self.bar.set_postfix(shown, refresh=False)
            self._compare_readers(row)

    def _compare_readers(self, row: dict[str, str]) -> None:
        """Say once whether the readers keep up."""
        taken, given = (float(row.get(f"speed/{name}audio_seconds_per_second", "nan")) for name in ("", "loader_"))
        if self.compared or not (taken > 0 and given > 0):
            return
        self.compared = True
        slow = given < HEADROOM * taken and self.recipe.data.num_workers != 0
        logger.log(
            logging.WARNING if slow else logging.INFO,
            "the readers could give %.0f s of audio per second, training takes %.0f%s",
            given, taken, ": raise --data.num_workers, or move the data to a faster disk" if slow else "",
        )  # fmt: skip

    def on_exception(  # type: ignore[override]
        self, trainer: pl.Trainer, module: Trained, exception: BaseException
    ) -> None:
        """Close the bar; where memory ran out, find out what would fit while the models are still on the GPU."""
        self.on_train_end(trainer, module)  # type: ignore[arg-type]
        if is_out_of_gpu_memory(exception):

            def loss(waveforms: torch.Tensor) -> torch.Tensor:
                with trainer.precision_plugin.train_step_context():
                    return memory.probe_loss(module.step, waveforms, self.recipe.data, trainer.global_step)

            has_state = any(optimizer.state for optimizer in trainer.optimizers)
            message = memory.advice(exception, module.step.trained, loss, self.recipe.data, self.config, has_state)
            raise UserError(message) from None


def metrics_table(trainer: pl.Trainer) -> MetricsCSV:
    """The ``metrics.csv`` of a run."""
    return next(sink for sink in trainer.loggers if isinstance(sink, MetricsCSV))
