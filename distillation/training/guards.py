"""What may go wrong in a batch without ending the run, and when it is too much: files that cannot be read are left out,
updates that are not finite have no effect; both are counted, named once and stop the run above a limit.

Nothing here waits for the device between two rows of metrics: flags stay on it until `BatchGuard.settle`.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor

from distillation.data.loaders import Batch
from distillation.data.manifest import Manifest, write_lines
from distillation.errors import UserError
from distillation.training.processes import shared

logger = logging.getLogger(__name__)

MAX_NAMED = 8  # files in one line of the log


@dataclass
class Trouble:
    """What one rank, or all of them, met since the last row of metrics. Plain types: it travels between ranks."""

    files: dict[str, dict[str, str]] = field(default_factory=lambda: {"train": {}, "valid": {}})
    """Per list: path -> why it cannot be used."""
    levels: dict[str, list[str]] = field(default_factory=lambda: {"silent": [], "clipped": []})
    """Paths of the stretches of audio that are usable but suspicious, as often as they were met."""
    updates: dict[int, list[str]] = field(default_factory=dict)
    """Update without effect -> files of its micro-batches with a loss that is not finite."""
    suspects: dict[int, list[str]] = field(default_factory=dict)
    """The same update -> all of its files."""

    def __bool__(self) -> bool:
        return any([*self.files.values(), *self.levels.values(), self.updates])

    def add(self, other: Trouble) -> None:
        """Take in what another rank met."""
        for kind, paths in other.files.items():
            self.files[kind].update(paths)
        for kind, names in other.levels.items():
            self.levels[kind].extend(names)
        for mine, theirs in ((self.updates, other.updates), (self.suspects, other.suspects)):
            for update, names in theirs.items():
                mine.setdefault(update, []).extend(names)


class BatchGuard:
    """Counts what was left out, over all ranks and resumed runs.

    Args:
        manifests: "train" and "valid" list.
        max_bad_share: of the files of a list that may turn out bad.
        max_skipped_updates: updates without effect.
        report: file for the list of bad files.
    """

    def __init__(
        self, manifests: dict[str, Manifest], max_bad_share: float, max_skipped_updates: int, report: Path
    ) -> None:
        self.manifests, self.report = manifests, report
        self.max_bad_share, self.max_skipped_updates = max_bad_share, max_skipped_updates
        self.bad: dict[str, dict[str, str]] = {"train": {}, "valid": {}}
        self.counts = {"silent": 0, "clipped": 0, "updates": 0}
        self._noises: set[str] = set()  # recordings that cannot be decoded
        self._new = Trouble()
        self._micro_batches: list[tuple[int, Tensor, list[str]]] = []  # update, whether the loss is finite, files
        self._updates: list[tuple[int, Tensor | None]] = []  # and whether its gradient is

    def read(self, kind: str, batch: Batch) -> None:
        """Note what the readers found in a batch of the list ``kind``."""
        for path, reason in batch.errors.items():
            if path not in self.bad[kind]:
                self._new.files[kind][path] = reason
        for path, reason in batch.noise_errors.items():
            if path not in self._noises:
                self._noises.add(path)
                logger.warning("no noise from %s: %s; other noise is taken", path, reason)
        self._new.levels["silent"].extend(batch.silent)
        self._new.levels["clipped"].extend(batch.clipped)

    def loss(self, update: int, loss: Tensor, batch: Batch) -> None:
        """Note the loss (scalar) of a micro-batch of an update."""
        self._micro_batches.append((update, loss.detach().isfinite(), batch.files))

    def gradient(self, update: int, finite: Tensor | None) -> None:
        """Note whether the gradient of an update is finite; None where a loss scaler looks after it."""
        self._updates.append((update, finite))

    def settle(self, trainer: pl.Trainer) -> None:
        """Put together what all ranks met since the last call, log it, stop where it is too much. All ranks call it.

        Raises:
            UserError: more than the limits allow.
        """
        new = self._collect()
        if trainer.world_size > 1:
            anything = torch.tensor(float(bool(new)), device=trainer.strategy.root_device)
            if trainer.strategy.reduce(anything, reduce_op="sum") > 0:  # type: ignore[operator]
                everyone: list[Any] = [None] * trainer.world_size
                dist.all_gather_object(everyone, new)
                new = Trouble()
                for trouble in everyone:
                    new.add(trouble)
        if not new:
            return
        for kind, files in new.files.items():
            self.bad[kind].update(files)
        for kind, paths in new.levels.items():
            if paths and not self.counts[kind] and trainer.is_global_zero:
                logger.warning("%s audio, e.g. %s (counted in metrics.csv)", kind, paths[0])
            self.counts[kind] += len(paths)
        self.counts["updates"] += len(new.updates)
        if trainer.is_global_zero:
            self._tell(new)
        if message := self._too_much(new):
            raise shared(trainer, UserError(message))

    def _collect(self) -> Trouble:
        """This rank's part; waits for the device."""
        new, self._new = self._new, Trouble()
        flags = [finite for _, finite, _ in self._micro_batches]
        flags += [finite for _, finite in self._updates if finite is not None]
        finite = iter(torch.stack(flags).tolist() if flags else [])
        losses = [(update, next(finite), files) for update, _, files in self._micro_batches]
        for update, flag in self._updates:
            whole = all(ok for of, ok, _ in losses if of == update) if flag is None else next(finite)
            if not whole:
                new.updates[update] = [path for of, ok, files in losses if of == update and not ok for path in files]
                new.suspects[update] = [path for of, _, files in losses if of == update for path in files]
        last = self._updates[-1][0] if self._updates else -1
        self._micro_batches = [entry for entry in self._micro_batches if entry[0] > last]  # of the update under way
        self._updates = []
        return new

    def _tell(self, new: Trouble) -> None:
        for kind, files in new.files.items():
            for path, reason in list(files.items())[:MAX_NAMED]:
                logger.warning("left out of the %s data from now on: %s: %s", _LISTS[kind], path, reason)
            if len(files) > MAX_NAMED:
                logger.warning("and %d more, see %s", len(files) - MAX_NAMED, self.report)
        if any(new.files.values()):
            bad = {path: reason for files in self.bad.values() for path, reason in files.items()}
            write_lines(self.report, [f"{path}\t{reason}" for path, reason in bad.items()])
        for update, culprits in new.updates.items():
            cause = "loss" if culprits else "gradient"
            named = _name(culprits or new.suspects[update])
            logger.warning("update %d has no effect, its %s is not finite; files: %s", update + 1, cause, named)

    def _too_much(self, new: Trouble) -> str | None:
        for kind, files in self.bad.items():
            manifest = self.manifests[kind]
            if not new.files[kind] or len(files) <= self.max_bad_share * len(manifest):
                continue
            if not manifest.root.is_dir():
                return f"{manifest.root} is gone: is the disk or network mount of the audio there? Then run again"
            some = "; ".join(f"{path}: {reason}" for path, reason in list(files.items())[:3])
            return (
                f"{len(files)} of {len(manifest)} {_LISTS[kind]} files cannot be used, more than "
                f"--data.max_bad_share {self.max_bad_share:g}: {some} (all are listed in {self.report}); repair them, "
                "leave them out with prepare_data.py --check --skip_broken, or raise the share"
            )
        if new.updates and self.counts["updates"] > self.max_skipped_updates:
            update = max(new.updates)
            return (
                f"{self.counts['updates']} updates had a loss or gradient that is not finite, more than "
                f"--trainer.max_skipped_updates {self.max_skipped_updates}; files of the last one: "
                f"{_name(new.updates[update] or new.suspects[update])}. Try a lower learning rate or a longer warm-up, "
                "--trainer.precision 32-true, or look for broken audio with prepare_data.py --check"
            )
        return None

    def metrics(self) -> dict[str, float]:
        """Totals since the start of the run."""
        return {
            "skipped/files": float(sum(map(len, self.bad.values()))),
            "skipped/updates": float(self.counts["updates"]),
            "audio/silent": float(self.counts["silent"]),
            "audio/clipped": float(self.counts["clipped"]),
        }

    def state(self) -> dict[str, Any]:
        """Totals in plain types for a checkpoint; call `settle` first."""
        return {"bad": self.bad, "counts": self.counts}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue the totals of a checkpoint."""
        self.bad = {kind: {str(path): str(reason) for path, reason in state["bad"][kind].items()} for kind in self.bad}
        self.counts = {kind: int(state["counts"][kind]) for kind in self.counts}


_LISTS = {"train": "training", "valid": "validation"}


def _name(files: list[str]) -> str:
    more = f" and {len(files) - MAX_NAMED} more" if len(files) > MAX_NAMED else ""
    return ", ".join(files[:MAX_NAMED]) + more
