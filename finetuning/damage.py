"""What may turn out damaged while a run decodes it, and when it is too much."""

import logging
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from distillation.errors import UserError
from finetuning.batches import Batch
from finetuning.transcripts import ADVICE, DAMAGED, LEFT_OUT, Transcripts, list_left_out, summary

logger = logging.getLogger(__name__)

MAX_DAMAGED_SHARE = 0.01  # of the utterances of a list; one is never too much, unless it is all there is


class Damage(pl.Callback):
    """Names once and lists the utterances that batches had to leave out; too many end the run.

    Args:
        train: what is trained on; what is damaged joins its ``left_out``.
        valid: what is measured on.
        exp_dir: folder of ``left_out.tsv``.
    """

    def __init__(self, train: Transcripts, valid: Transcripts, exp_dir: Path) -> None:
        self.train, self.valid, self.exp_dir = train, valid, exp_dir

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, *_: Any) -> None:
        """Look at a training batch."""
        self.note(self.train, batch)

    def on_validation_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Batch, *_: Any) -> None:
        """Look at a validation batch."""
        self.note(self.valid, batch)

    def note(self, transcripts: Transcripts, batch: Batch) -> None:
        """Take in what a batch had to leave out.

        Raises:
            UserError: too many utterances are damaged.
        """
        new = [row for row in batch.left_out if row not in transcripts.left_out]
        if not new:
            return
        transcripts.left_out.extend(new)
        list_left_out([self.train, self.valid], self.exp_dir)
        listing = self.exp_dir / LEFT_OUT
        logger.warning("%s: %d left out, see %s: %s", transcripts.source, len(new), listing, summary(new))
        damaged = [row for row in transcripts.left_out if row.kind == DAMAGED]
        total = len(transcripts.utterances)
        if len(damaged) > max(1, MAX_DAMAGED_SHARE * total) or len(damaged) == total:
            raise UserError(
                f"{transcripts.source}: {len(damaged)} of {total} utterances cannot be decoded so far, see {listing}: "
                f"{summary(damaged)}; {ADVICE[DAMAGED]}"
            )
