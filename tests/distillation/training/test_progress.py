"""What happens at update boundaries, with a stand-in for the trainer."""

from __future__ import annotations

import types
from pathlib import Path

import pytest

from distillation.config import Recipe, TrainerConfig
from distillation.stopping import Stopped
from distillation.training.metrics import MetricsCSV
from distillation.training.progress import Progress


class FakeTrainer:
    """A run of one process: the updates that rows and checkpoints were written at."""

    world_size, is_global_zero, max_steps = 1, True, 10
    state = types.SimpleNamespace(fn="fit")

    def __init__(self, path: Path) -> None:
        self.global_step, self.rows, self.saved = 0, [], []
        self.loggers = [MetricsCSV(path)]

    def save_checkpoint(self, path: Path) -> None:
        self.saved.append(self.global_step)


class Run:
    """Ten updates of two micro-batches each, validated after every fourth."""

    def __init__(self, folder: Path, **settings: object) -> None:
        config = TrainerConfig(**{"log_every": 3, "validate_every": 4, "checkpoint_every": 100, **settings})
        self.validate_every = config.validate_every
        self.trainer = FakeTrainer(folder / "metrics.csv")
        self.module = types.SimpleNamespace(log_training=lambda: self.trainer.rows.append(self.trainer.global_step))
        self.progress = Progress(Recipe(trainer=config), folder / "last.ckpt")
        self.before_update = lambda update: None

    def __call__(self, start: int = 0) -> None:
        trainer, progress = self.trainer, self.progress
        trainer.global_step = start
        with progress.stop:
            progress.on_train_start(trainer, self.module)
            while trainer.global_step < 10:
                self.before_update(trainer.global_step)
                progress.on_train_batch_end(trainer, self.module, None, None, 0)  # the first micro-batch
                trainer.global_step += 1
                progress.on_train_batch_end(trainer, self.module, None, None, 1)
                if trainer.global_step % self.validate_every == 0:
                    assert trainer.global_step not in trainer.saved, "saved before the validation"
                    progress.on_validation_end(trainer, self.module)
            progress.on_train_end(trainer, self.module)


def test_rows_and_checkpoints_when_they_are_due(tmp_path):
    run = Run(tmp_path)
    run()
    assert run.trainer.rows == [3, 6, 9, 10] and run.trainer.saved == [10]
    run = Run(tmp_path, checkpoint_every=2)
    run()
    assert run.trainer.saved == [2, 4, 6, 8, 10]
    run = Run(tmp_path, checkpoint_every=2)
    run(start=5)
    assert run.trainer.rows == [6, 9, 10] and run.trainer.saved == [6, 8, 10]


def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
    minutes = 0.0
    monkeypatch.setattr("time.monotonic", lambda: 60 * minutes)
    run = Run(tmp_path, checkpoint_minutes=20)

    def pass_time(update: int) -> None:
        nonlocal minutes
        minutes += 7

    run.before_update = pass_time
    run()
    assert run.trainer.saved == [3, 6, 9, 10]


@pytest.mark.parametrize(("update", "validated"), [(4, False), (3, True)])
def test_a_stop_saves_and_ends_the_run(tmp_path, update, validated):
    """After the validation, where one is due, so that none is lost."""
    run = Run(tmp_path)
    run.before_update = lambda number: setattr(run.progress.stop, "signal", "SIGUSR1" if number == update else None)
    with pytest.raises(
        Stopped, match=rf"SIGUSR1 at update {update + 1}: saved in .*last\.ckpt; the same command resumes"
    ):
        run()
    assert run.trainer.saved == [update + 1] and (run.trainer.saved[0] % 4 == 0) == validated


def test_a_stop_at_the_last_update_ends_as_usual(tmp_path):
    run = Run(tmp_path)
    run.before_update = lambda number: setattr(run.progress.stop, "signal", "SIGTERM" if number == 9 else None)
    run()
    assert run.trainer.saved == [10]


def test_validation_outside_training_saves_nothing(tmp_path):
    run = Run(tmp_path)
    run()
    run.trainer.state = types.SimpleNamespace(fn="validate")
    run.progress.on_validation_end(run.trainer, run.module)
    assert run.trainer.saved == [10]


@pytest.mark.parametrize(("given", "warned"), [(110.0, True), (130.0, False)])
def test_readers_that_do_not_keep_up_are_told_once(tmp_path, caplog, given, warned):
    caplog.set_level("INFO")
    run = Run(tmp_path)
    speeds = {"speed/audio_seconds_per_second": 100.0, "speed/loader_audio_seconds_per_second": given}
    run.module.log_training = lambda: run.trainer.loggers[0].log_metrics(speeds, run.trainer.global_step)
    run()
    (record,) = [record for record in caplog.records if "training takes 100" in record.getMessage()]
    assert (record.levelname == "WARNING") == warned == ("--data.num_workers" in record.getMessage())
