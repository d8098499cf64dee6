"""The private parts of Lightning that are replaced exist in the pinned version, and are replaced."""

from __future__ import annotations

import pytorch_lightning as pl
import pytorch_lightning.demos.boring_classes
from pytorch_lightning.strategies.launchers import subprocess_script

from distillation.training.lightning_internals import supervise_alone, wrap_restoring


def make_trainer(folder) -> pl.Trainer:
    return pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=folder
    )


def test_signals_and_children_are_left_to_us(tmp_path, monkeypatch):
    # replacing a part that is gone would be silent: its name must be there before
    monkeypatch.setattr(subprocess_script, "_launch_process_observer", subprocess_script._launch_process_observer)
    trainer = make_trainer(tmp_path)
    connector, loop = trainer._signal_connector, trainer.fit_loop.epoch_loop
    before = [
        connector.register_signal_handlers, loop._broadcast_sigterm_tensor, subprocess_script._launch_process_observer
    ]  # fmt: skip
    assert all(map(callable, before))
    supervise_alone(trainer)
    after = [
        connector.register_signal_handlers(), loop._broadcast_sigterm_tensor(),
        subprocess_script._launch_process_observer([]),
    ]  # fmt: skip
    assert after == [None, None, None]


def test_restoring_can_be_wrapped(tmp_path):
    trainer = make_trainer(tmp_path)
    called = []

    def wrap(what, restore):
        assert callable(restore)
        return lambda *args, **kwargs: called.append(what) or restore(*args, **kwargs)

    wrap_restoring(trainer, wrap)
    trainer.fit(pl.demos.boring_classes.BoringModel(), train_dataloaders=[], ckpt_path=None)
    assert called == ["modules", "state"]
