"""Lightning glue: the training module, the data module and the trainer. Never names a method.

The randomness of micro-batch j (masks, dropout) is a function of the seed and j alone, as is its data. So a resumed run
repeats nothing, and one process with accumulation does exactly what several processes do.

This file shadows the package ``lightning`` for programs run from here: import ``pytorch_lightning``.
"""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.strategies import DDPStrategy, Strategy
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

from distillation.config import Recipe, TrainerConfig
from distillation.data import Batch, DataConfig, make_train_loader, make_valid_loader, read_tsv
from distillation.errors import UserError
from distillation.metrics import MetricsCSV, RunningMeans
from distillation.objectives import Objectives, Teacher
from distillation.optim import OptimConfig, lr_factor, param_groups
from distillation.sparsity import Lagrangian, PruningConfig
from wav2vec2 import Wav2Vec2Model
from wav2vec2.checkpoint import read_torch_file, replacing

logger = logging.getLogger(__name__)
# Lightning's own advice on the console; what a user must know is logged here or raised
logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
warnings.filterwarnings("ignore", module="pytorch_lightning")


def seed_micro_batch(seed: int, number: int) -> None:
    """Seed masks and dropout for micro-batch ``number``; every one, on whichever rank, has its own stream."""
    torch.manual_seed(int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0] >> 1))


class DistillModule(pl.LightningModule):
    """Trains a student towards a frozen teacher; holds the sparsity where there is a Lagrangian.

    Args:
        student: masked or dense.
        teacher: frozen; not part of the module, hence in no checkpoint.
        objectives: what to train towards.
        optim: rates and lengths; ``max_steps`` is the number of updates.
        lagrangian: None when nothing is pruned.
        pruning: rates of the masks and multipliers.
        seed: of masks and dropout.
        recipe: resolved YAML, kept in checkpoints.
    """

    def __init__(
        self,
        student: Wav2Vec2Model,
        teacher: Teacher,
        objectives: Objectives,
        optim: OptimConfig,
        lagrangian: Lagrangian | None,
        pruning: PruningConfig | None,
        seed: int,
        recipe: str,
    ) -> None:
        super().__init__()
        self.student, self.objectives, self.lagrangian = student, objectives, lagrangian
        self.teacher = teacher
        self.optim, self.pruning, self.seed, self.recipe = optim, pruning, seed, recipe
        _freeze_unused(student, objectives.student_layers)
        self.means = RunningMeans()

    def on_fit_start(self) -> None:
        """Bring the teacher to the student's device."""
        self.teacher.to(self.device)

    on_validation_start = on_fit_start

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Copy a batch; one with unreadable files ends the run."""
        if batch.errors:
            more = f" (and {len(batch.errors) - 1} more)" if len(batch.errors) > 1 else ""
            raise UserError(f"{batch.errors[0]}{more}")
        return batch.to(device, non_blocking=True)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch."""
        seed_micro_batch(self.seed, batch.number)
        loss = self.objectives(self.teacher, self.student, batch.waveforms, batch.lengths)
        total = loss.total
        metrics = {"train/distill": loss.total.detach(), **{f"train/{k}": v for k, v in loss.terms.items()}}
        if self.lagrangian is not None:
            num_params = self.student.get_num_params()
            total = total + self.lagrangian(num_params, self.global_step)
        metrics["train/loss"] = total.detach()
        self.means.add(metrics, batch.seconds)
        return total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The same loss with the eval masks, weighted by seconds of audio, over all ranks."""
        if not len(batch.waveforms):
            return
        loss = self.objectives(self.teacher, self.student, batch.waveforms, batch.lengths)
        values = {"valid/distill": loss.total, **{f"valid/{k}": v for k, v in loss.terms.items()}}
        self.validation.add(values, batch.seconds)

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        self.validation = RunningMeans(weighted=True)

    def on_validation_epoch_end(self) -> None:
        """Reduce over ranks and log."""
        metrics = self.validation.reduce(self.trainer, self.device)
        metrics.pop("seconds")
        self._log(metrics)

    def configure_optimizers(self) -> dict[str, Any]:
        """AdamW with one schedule for all groups (the masks' rates may be kept constant)."""
        groups = param_groups(self, self.lagrangian, self.optim, self.pruning)
        fused = self.device.type in ("cpu", "cuda")
        optimizer = torch.optim.AdamW(groups, betas=self.optim.betas, eps=self.optim.eps, fused=fused)
        steps = self.optim.max_steps
        warmup = self.optim.resolved_warmup(steps)

        def scheduled(step: int) -> float:
            return lr_factor(step, warmup, steps, self.optim.schedule)

        def constant(step: int) -> float:
            return 1.0

        keep = self.pruning is not None and self.pruning.constant_lr
        factors = [constant if keep and group["name"] in ("log_alpha", "lambda") else scheduled for group in groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factors), "interval": "step"}}

    def log_training(self) -> None:
        """Log the means since the last row, and where the constraint and the rates stand."""
        metrics = self.means.reduce(self.trainer, self.device)
        seconds = metrics.pop("seconds")
        metrics["speed/audio_seconds_per_second"] = seconds / max(1e-9, self.means.elapsed())
        if self.lagrangian is not None:
            with torch.no_grad():
                metrics["sparsity/expected"] = self.lagrangian.sparsity(self.student.get_num_params()).item()
            metrics["sparsity/target"] = self.lagrangian.target(self.global_step)
            metrics["lagrangian/lambda1"] = self.lagrangian.lambda1.item()
            metrics["lagrangian/lambda2"] = self.lagrangian.lambda2.item()
        for group in self.trainer.optimizers[0].param_groups:
            metrics[f"lr/{group['name']}"] = group["lr"]
        self.means = RunningMeans()
        self._log(metrics)

    def _log(self, metrics: dict[str, float]) -> None:
        for sink in self.trainer.loggers:
            sink.log_metrics(metrics, step=self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what prune.py needs to rebuild the student."""
        checkpoint["student_config"] = self.student.config
        checkpoint["heads"] = self.objectives.head_state()
        checkpoint["recipe"] = self.recipe
        checkpoint["means"] = self.means.state(self.trainer, self.device)
        if self.lagrangian is not None:
            checkpoint["num_params_before"] = self.lagrangian.num_params_before

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of another network; continue the row of metrics that was being gathered."""
        if checkpoint.get("student_config") != self.student.config:
            raise UserError("the checkpoint holds another network than this recipe builds: use another --exp_dir")
        self.means = RunningMeans.from_state(checkpoint["means"], self.trainer.global_rank, self.device)


def _freeze_unused(student: Wav2Vec2Model, num_layers: int) -> None:
    """Freeze what no objective looks at: it would never get a gradient, and DDP waits for one."""
    transformer = student.encoder.transformer
    unused = [*transformer.layers[num_layers:], student.aux]
    if transformer.layer_norm_first:  # hidden states come before the final norm
        unused.append(transformer.layer_norm)
    for module in unused:
        for name, p in module.named_parameters() if module is not None else ():
            p.requires_grad_(name.endswith("log_alpha"))


class AudioDataModule(pl.LightningDataModule):
    """Batches of one rank. Resumes at the micro-batch that the number of updates implies.

    Args:
        config: audio and batching; ``seconds_per_batch`` as used, see :func:`fit_batches`.
        seed: of order and crops.
        batches_per_update: micro-batches of all ranks in one update.
    """

    def __init__(self, config: DataConfig, seed: int, batches_per_update: int) -> None:
        super().__init__()
        self.config, self.seed, self.batches_per_update = config, seed, batches_per_update
        self.train_manifest = read_tsv(config.tsv_dir / config.train)
        self.valid_manifest = read_tsv(config.tsv_dir / config.valid)

    def _ranks(self) -> dict[str, Any]:
        assert self.trainer is not None
        gpu = self.trainer.strategy.root_device.type == "cuda"
        per_node = max(1, self.trainer.world_size // self.trainer.num_nodes)
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size, "pin_memory": gpu,
                "ranks_per_node": per_node}  # fmt: skip

    def train_dataloader(self) -> Any:
        """Endless."""
        assert self.trainer is not None
        start = self.trainer.global_step * self.batches_per_update
        return make_train_loader(self.train_manifest, self.config, seed=self.seed, start=start, **self._ranks())

    def val_dataloader(self) -> Any:
        """This rank's share."""
        return make_valid_loader(self.valid_manifest, self.config, **self._ranks())


class Progress(pl.Callback):
    """Progress bar over updates, rows of metrics, and checkpoints; all at update boundaries.

    Args:
        config: intervals.
        last: path of the newest checkpoint.
        max_steps: updates of the run.
    """

    def __init__(self, config: TrainerConfig, last: Path, max_steps: int) -> None:
        self.config, self.last, self.max_steps = config, last, max_steps
        self.bar: tqdm | None = None
        self.saved_at = time.monotonic()
        self.step = -1

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Open the bar where the run stands."""
        self.step = trainer.global_step
        for sink in trainer.loggers:
            if isinstance(sink, MetricsCSV):
                sink.resume(trainer.global_step)
        self.bar = tqdm(total=self.max_steps, initial=trainer.global_step, desc="train", unit="update",
                        dynamic_ncols=True, disable=not trainer.is_global_zero, mininterval=1.0)  # fmt: skip

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an update: log and save when it is time."""
        assert isinstance(module, DistillModule) and self.bar is not None
        if trainer.global_step == self.step:  # accumulating
            return
        self.step = trainer.global_step
        self.bar.update(1)
        if self.step % self.config.log_every == 0 or self.step == self.max_steps:
            module.log_training()
            shown = {k: v for k, v in (trainer.loggers[-1].rows[-1] if trainer.is_global_zero else {}).items()
                     if k in ("train/distill", "sparsity/expected", "sparsity/target")}  # fmt: skip
            self.bar.set_postfix({k.split("/")[1]: f"{float(v):.4f}" for k, v in shown.items()}, refresh=False)
        if not self._validates(trainer):  # otherwise after it, so that no validation is lost
            self._save_if_due(trainer)

    def on_validation_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """The checkpoint that waited for the validation."""
        if trainer.state.fn == "fit":
            self._save_if_due(trainer)

    def _validates(self, trainer: pl.Trainer) -> bool:
        return self.step % min(self.config.validate_every, self.max_steps) == 0

    def _save_if_due(self, trainer: pl.Trainer) -> None:
        late = time.monotonic() - self.saved_at > 60 * self.config.checkpoint_minutes
        late = trainer.strategy.broadcast(late)
        if late or self.step % self.config.checkpoint_every == 0 or self.step == self.max_steps:
            trainer.save_checkpoint(self.last)
            self.saved_at = time.monotonic()

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()


class AtomicCheckpointIO(TorchCheckpointIO):
    """A checkpoint appears under its name when it is complete, never before."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write to a temporary name, flush, rename."""
        with replacing(Path(path)) as temporary:
            torch.save(checkpoint, temporary)


def fit_batches(data: DataConfig, trainer: TrainerConfig, world_size: int) -> int:
    """Accumulation that keeps the recipe's update on ``world_size`` processes.

    Raises:
        UserError: the recipe's micro-batches cannot be spread evenly.
    """
    accumulate, rest = divmod(trainer.batches_per_update, world_size)
    if rest:
        fitting = [n for n in range(1, trainer.batches_per_update + 1) if trainer.batches_per_update % n == 0]
        raise UserError(
            f"{trainer.batches_per_update} micro-batches per update do not spread evenly over {world_size} processes: "
            f"use {', '.join(map(str, fitting))} processes, or set --trainer.batches_per_update "
            f"and --data.seconds_per_batch so that their product stays the published one"
        )
    return accumulate


def build_trainer(recipe: Recipe, optim: OptimConfig, max_steps: int) -> pl.Trainer:
    """Trainer of one step of a recipe, with the accumulation that this number of processes needs.

    Raises:
        UserError: the machine is not what the recipe asks for.
    """
    config = recipe.trainer
    gpus = torch.cuda.device_count()
    accelerator = config.accelerator if config.accelerator != "auto" else ("gpu" if gpus else "cpu")
    if accelerator == "gpu" and not gpus:
        raise UserError("the recipe asks for a GPU and none is visible: set --trainer.accelerator cpu to train without")
    devices = config.devices if config.devices != "auto" else (gpus if accelerator == "gpu" else 1)
    if accelerator == "gpu" and devices > gpus:
        raise UserError(f"the recipe asks for {devices} GPUs and {gpus} are visible: set --trainer.devices {gpus}")
    world_size = devices * config.num_nodes
    accumulate = fit_batches(recipe.data, config, world_size)
    strategy: str | Strategy = "auto"
    if world_size > 1:
        backend = "nccl" if accelerator == "gpu" else "gloo"
        strategy = DDPStrategy(process_group_backend=backend, gradient_as_bucket_view=True)
    logger.info("%d process(es), %d micro-batches each per update", world_size, accumulate)
    return pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=config.num_nodes,
        strategy=strategy,
        precision=config.precision,
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=optim.clip,
        val_check_interval=min(config.validate_every, max_steps) * accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=config.log_every,
        logger=[TensorBoardLogger(recipe.exp_dir, name="", version=""), MetricsCSV(recipe.exp_dir / "metrics.csv")],
        callbacks=[Progress(config, recipe.exp_dir / "ckpts" / "last.ckpt", max_steps)],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=recipe.exp_dir,
        benchmark=False,
    )


def fit(module: DistillModule, data: AudioDataModule, trainer: pl.Trainer, recipe: Recipe) -> None:
    """Train to the end, from ``ckpts/last.ckpt`` where there is one."""
    exp_dir, validate_every = recipe.exp_dir, recipe.trainer.validate_every
    last = exp_dir / "ckpts" / "last.ckpt"
    resume = last if last.is_file() else None
    if resume is not None:
        step = read_torch_file(resume).get("global_step")
        logger.info("resuming from %s at update %s", resume, step)
        if step == trainer.max_steps:
            logger.info("%s is complete", exp_dir)
            module.load_state_dict(read_torch_file(resume)["state_dict"])
            return
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    if trainer.max_steps % validate_every:  # the last weights are always validated
        trainer.validate(module, data, verbose=False)
