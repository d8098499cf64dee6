"""Metrics of a run: means over updates and ranks, and the table that the report reads.

Columns of ``metrics.csv``: step; train/loss, train/distill and train/<term>; valid/distill and valid/<term>;
sparsity/expected, sparsity/target, lagrangian/lambda1, lagrangian/lambda2; lr/<group>; speed/audio_seconds_per_second
of the training and speed/loader_audio_seconds_per_second that its readers could give if training never waited for them;
and totals since the start: skipped/files and skipped/updates, audio/silent and audio/clipped (stretches of audio).
"""

from __future__ import annotations

import csv
import math
import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from wav2vec2.checkpoint import replacing


class RunningMeans:
    """Sums of metrics on the device, so that logging waits for the device only when a row is written.

    Micro-batches with a value that is not finite count for the seconds of audio alone.
    """

    def __init__(self, weighted: bool = False) -> None:
        self.weighted = weighted
        self.sums: dict[str, Tensor] = {}
        self.weight: Tensor | float = 0.0
        self.seconds = 0.0
        self.begin = time.perf_counter()

    def add(self, values: dict[str, Tensor], seconds: float) -> None:
        """Add the values of one micro-batch that holds ``seconds`` of audio."""
        stacked = torch.stack([value.detach().double() for value in values.values()])
        finite = stacked.isfinite().all()
        weight = finite * (seconds if self.weighted else 1.0)
        for name, value in zip(values, torch.where(finite, stacked, 0.0) * weight):
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.weight = self.weight + weight.double()
        self.seconds += seconds

    def reduce(self, trainer: pl.Trainer, device: torch.device) -> dict[str, float]:
        """Means over all ranks, and the ``seconds`` of audio of all of them."""
        weight, seconds, sums = self._gather(trainer, device)
        return {"seconds": seconds, **{name: value / weight if weight else math.nan for name, value in sums.items()}}

    def _gather(self, trainer: pl.Trainer, device: torch.device) -> tuple[float, float, dict[str, float]]:
        names = sorted(self.sums)
        if trainer.world_size > 1:  # a rank whose files were all unreadable has none
            everyone: list[Any] = [None] * trainer.world_size
            dist.all_gather_object(everyone, names)
            names = sorted(set().union(*everyone))
        zero = torch.zeros((), dtype=torch.float64, device=device)
        weight = torch.as_tensor(self.weight, dtype=torch.float64, device=device).view(1)
        seconds = torch.tensor([self.seconds], dtype=torch.float64, device=device)
        packed = torch.cat([weight, seconds, *(self.sums.get(name, zero).to(device).view(1) for name in names)])
        if trainer.world_size > 1:
            packed = trainer.strategy.reduce(packed, reduce_op="sum")  # type: ignore[assignment]
        total_weight, total_seconds, *sums = packed.tolist()
        return total_weight, total_seconds, dict(zip(names, sums))

    def elapsed(self) -> float:
        """Wall-clock seconds since the first value."""
        return time.perf_counter() - self.begin

    def state(self, trainer: pl.Trainer, device: torch.device) -> dict[str, Any]:
        """What all ranks have gathered, in plain types for a checkpoint."""
        weight, seconds, sums = self._gather(trainer, device)
        return {"sums": sums, "weight": weight, "seconds": seconds, "elapsed": self.elapsed()}

    @classmethod
    def from_state(cls, state: dict[str, Any], rank: int, device: torch.device) -> RunningMeans:
        """Continue, with everything that was gathered on rank 0."""
        means = cls()
        means.begin -= state["elapsed"]
        if rank == 0:
            means.weight, means.seconds = float(state["weight"]), float(state["seconds"])
            means.sums = {k: torch.tensor(v, dtype=torch.float64, device=device) for k, v in state["sums"].items()}
        return means


class MetricsCSV(Logger):
    """``metrics.csv`` in the folder of the run: one row per logged step, continued by a resumed run."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.rows: list[dict[str, Any]] = []

    name = version = ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """The recipe is in config.yaml."""

    def resume(self, step: int) -> None:
        """Keep the rows up to ``step``: later ones will be written again."""
        if self.path.is_file():
            with self.path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if (row.get("step") or "").isdigit()]
            self.rows = [row for row in self.rows if int(row["step"]) <= step]

    def row(self, step: int) -> dict[str, Any]:
        """What is known about a step."""
        return next(({k: v for k, v in row.items() if v} for row in self.rows if int(row["step"]) == step), {})

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Add to the row of ``step``, and rewrite the file."""
        assert step is not None
        values = {name: f"{value:.8g}" for name, value in metrics.items()}
        if self.rows and int(self.rows[-1]["step"]) == step:
            self.rows[-1].update(values)
        else:
            self.rows.append({"step": step, **values})
        columns = list(dict.fromkeys(name for row in self.rows for name in row))
        with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(self.rows)
