"""Where a run stands and what it is, read from its folder; and the model that it leaves. Without Lightning."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from distillation.errors import UserError
from distillation.optimisation import OptimConfig
from distillation.training.record import RUN, Identity, Record
from wav2vec2 import CheckpointError, Wav2Vec2Model, save_model
from wav2vec2.checkpoint import fingerprint, load_checkpoint, read_torch_file

AFRESH = "move it away to start afresh"
LAST = Path("ckpts") / "last.ckpt"  # newest checkpoint, in the folder of a run
logger = logging.getLogger(__name__)


@dataclass
class Standing:
    """Where a run stands, and what it is.

    Attributes:
        last: its newest checkpoint, where there is one.
        record: of its settings, as it goes on.
        step: updates made.
        content: of the checkpoint; empty for a new run.
        length: updates of the whole run, once :meth:`resolve` has found them out.
        epochs: that they come from, if they do.
        changed: whether something is set otherwise than before.
    """

    last: Path
    record: Record
    step: int = 0
    content: dict[str, Any] = field(default_factory=dict)
    length: int = 0
    epochs: int | None = None
    changed: bool = False

    def begin(self, exp_dir: Path) -> None:
        """Something will run: say what has been set otherwise, and write it down."""
        if self.changed:
            self.record.say_last_change()
        self.record.write(exp_dir)

    def leave(self) -> None:
        """Nothing is left to do: what is set otherwise now was not used."""
        self.record = Record.read(self.content, self.last) or self.record

    def resolve(self, optim: OptimConfig, updates_of: Callable[[int], int]) -> OptimConfig:
        """The settings of this step with all lengths in updates, as the run found them out when it started.

        Args:
            optim: of the recipe.
            updates_of: how many updates a number of epochs holds.

        Raises:
            UserError: the run has made more updates.
        """
        entry, self.epochs = self.content.get(RUN, {}), optim.max_epochs
        known = entry.get("length") if entry.get("epochs") == self.epochs else None
        if known is not None and (not isinstance(known, int) or known < 1):
            raise UserError(f"{self.last}: damaged, it has {known} for its length: {AFRESH}")
        resolved = optim.resolved(updates_of if known is None else lambda epochs: known)
        self.extend_to(resolved.max_steps)
        return resolved

    def extend_to(self, length: int) -> None:
        """Say how many updates the whole run has.

        Raises:
            UserError: it has made more.
        """
        if self.step > length:
            raise UserError(f"{self.last} stands at update {self.step}, after the last of {length}: ask for more")
        self.length = length

    def entry(self, update: int, **more: Any) -> dict[str, Any]:
        """What the run is, for a checkpoint or a model file made after an update."""
        return self.record.entry(update, length=self.length, epochs=self.epochs, **more)


def open_run(exp_dir: Path, identity: Identity, on_request: bool) -> Standing:
    """Look what is in the folder of a run, and whether it is the run that the command names.

    Args:
        exp_dir: the folder.
        identity: what the command is about to train.
        on_request: whether length and rates may change.

    Raises:
        UserError: a run with other settings, or a checkpoint of another kind.
        CheckpointError: a damaged one.
    """
    last = exp_dir / LAST
    if not last.is_file():
        return Standing(last, Record.start(identity))
    content = read_run(last)
    step, record = content["global_step"], Record.read(content, last)
    if record is None:
        logger.warning("%s does not say with which settings it was made: they cannot be compared", last)
        record = Record.start(identity, step)
    goes_on = record.go_on(identity, step, last, on_request)
    return Standing(last, goes_on, step, content, changed=goes_on is not record)


def read_run(path: Path) -> dict[str, Any]:
    """Content of a checkpoint that Lightning has written; ``global_step`` says after how many updates.

    Raises:
        UserError: another kind of file.
        CheckpointError: a damaged one.
    """
    content = read_torch_file(path)
    step = content.get("global_step")
    if not isinstance(step, int) or step < 0 or "pytorch-lightning_version" not in content:
        raise UserError(f"{path}: not a checkpoint of a run: {AFRESH}")
    return content


def save_result(path: Path, model: Wav2Vec2Model, heads: Mapping[str, Tensor], entry: dict[str, Any] | None) -> None:
    """Write the model that a run has made, unless the file holds it.

    Args:
        path: the file.
        model: dense.
        heads: state of its distillation heads.
        entry: what the run is; None where that is not known.
    """
    with contextlib.suppress(CheckpointError):  # not there, or damaged
        before = load_checkpoint(path)
        if before.extra.get(RUN) == entry and fingerprint(before.model, before.heads) == fingerprint(model, heads):
            logger.info("%s is up to date", path)
            return
    save_model(path, model, heads, **({} if entry is None else {RUN: entry}))
    logger.info("wrote %s", path)
