"""What a checkpoint must hold for a run to go on with it."""

from __future__ import annotations

import math
import types
from pathlib import Path

import pytest
import torch

from distillation.errors import UserError
from distillation.training.resuming import AtomicCheckpointIO, _check_moments, _same_kind, supervise_restoring

FRESH = {"lr": 0.1, "betas": (0.9, 0.999), "fused": True, "foreach": None, "params": [0, 1], "name": "weights"}


def test_values_of_a_run_are_of_the_kinds_of_a_fresh_one():
    later = {**FRESH, "lr": 1, "betas": [0.8, 1.0], "fused": None, "foreach": False, "params": [5, 6], "new": "x"}
    assert _same_kind(later, FRESH)
    assert _same_kind({}, FRESH)  # what is missing is missed when it is taken


@pytest.mark.parametrize(
    "wrong",
    [{"lr": "fast"}, {"lr": None}, {"lr": True}, {"lr": math.nan}, {"betas": 0.9}, {"betas": (0.9,)}, {"fused": 1},
     {"params": {0: 1}}, {"params": [0, "1"]}, {"name": 3}],
)  # fmt: skip
def test_wrong_kinds(wrong):
    assert not _same_kind({**FRESH, **wrong}, FRESH)
    assert not _same_kind({"inner": [{**FRESH, **wrong}]}, {"inner": [FRESH]})


def restoring(trainer_step: int = 7, error: Exception | None = None, fn: str = "fit"):
    """What takes the state of a checkpoint of update 7, in a trainer that ends up elsewhere or fails on the way."""

    def restore() -> None:
        if error is not None:
            raise error

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    connector = types.SimpleNamespace(_restore_modules_and_callbacks=restore, restore_training_state=restore)
    trainer = types.SimpleNamespace(
        state=types.SimpleNamespace(fn=fn), global_step=trainer_step, _checkpoint_connector=connector,
        optimizers=[optimizer], lr_scheduler_configs=[types.SimpleNamespace(scheduler=schedule)],
    )  # fmt: skip
    states = {"optimizer_states": [optimizer.state_dict()], "lr_schedulers": [schedule.state_dict()]}
    content = {"global_step": 7, **states}
    supervise_restoring(trainer, content, Path("last.ckpt"))
    return connector, content


def test_a_checkpoint_is_let_go_of_when_it_has_been_taken():
    connector, content = restoring()
    connector._restore_modules_and_callbacks()
    assert content
    connector.restore_training_state()
    assert not content


def test_a_checkpoint_that_does_not_say_where_it_stands():
    connector, _ = restoring(trainer_step=0)
    with pytest.raises(UserError, match=r"last\.ckpt: does not say where it stands in the data: move it away"):
        connector.restore_training_state()


@pytest.mark.parametrize("method", ["_restore_modules_and_callbacks", "restore_training_state"])
def test_what_a_checkpoint_makes_fail_is_one_line_and_the_rest_is_a_bug(method):
    connector, _ = restoring(error=KeyError("counts"))
    with pytest.raises(UserError, match=r"last\.ckpt: cannot be continued \(KeyError: 'counts'\): move it away"):
        getattr(connector, method)()
    connector, _ = restoring(error=ZeroDivisionError("ours"))
    with pytest.raises(ZeroDivisionError, match="ours"):
        getattr(connector, method)()


def test_a_validation_takes_no_checkpoint():
    connector, content = restoring(trainer_step=0, fn="validate")
    connector.restore_training_state()
    assert content


def test_moments_of_another_shape():
    p = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([p])
    p.grad = torch.ones(2)
    optimizer.step()
    _check_moments(optimizer)
    for wrong in ({"exp_avg": torch.zeros(1)}, {"exp_avg_sq": None}, {"step": torch.zeros(2)}, {"step": 3}):
        before = dict(optimizer.state[p])
        optimizer.state[p].update(wrong)
        with pytest.raises(ValueError, match="optimizer state does not fit"):
            _check_moments(optimizer)
        optimizer.state[p].update(before)


def test_checkpoints_appear_whole_and_run_nothing(tmp_path):
    path, io = tmp_path / "last.ckpt", AtomicCheckpointIO()
    io.save_checkpoint({"x": torch.ones(2), "n": 3}, path)
    found = io.load_checkpoint(path)
    assert torch.equal(found["x"], torch.ones(2)) and found["n"] == 3
    with pytest.raises(AttributeError):
        io.save_checkpoint({"x": lambda: None}, path)
    assert io.load_checkpoint(path)["n"] == 3 and [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]
    torch.save({"x": Path("x")}, path)
    with pytest.raises(ValueError, match=r"last\.ckpt"):
        io.load_checkpoint(path)
