"""Lightning glue: the training module, the data module and the trainer. Never names a method.

The randomness of micro-batch j (masks, dropout) is a function of the seed and j alone, as is its data. So a resumed run
repeats nothing, and one process with accumulation does exactly what several processes do.

This file shadows the package ``lightning`` for programs run from here: import ``pytorch_lightning``.
"""

import logging
import math
import os
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.plugins.environments import SLURMEnvironment
from pytorch_lightning.strategies import DDPStrategy, Strategy
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from distillation.budget import BUDGET
from distillation.build import build_step, starting_student
from distillation.config import Recipe, save_resolved
from distillation.data.batching import BatchStream, select_utterances
from distillation.data.loaders import Batch, Place, make_train_loader, make_valid_loader
from distillation.identity import content_of, step_1_identity
from distillation.lists import Lists, prepared_to_write, read_lists, wanted_vocabulary
from distillation.optimisation import OptimConfig, group_factor
from distillation.sparsity import check_budget, make_budget, make_prunable
from distillation.stopping import keeping
from distillation.teacher import load_teacher
from distillation.training.guards import BatchGuard
from distillation.training.lightning_internals import supervise_alone
from distillation.training.lock import run_lock
from distillation.training.metrics import MetricsCSV, RunningMeans
from distillation.training.processes import outlive_stop_signal, supervised, waiting
from distillation.training.progress import Progress
from distillation.training.record import RUN
from distillation.training.resuming import AtomicCheckpointIO, check_state, supervise_restoring
from distillation.training.standing import LAST, Standing, open_run, save_result
from distillation.training.step import TrainingStep, seed_micro_batch
from wav2vec2 import Wav2Vec2Model, kernels
from wav2vec2.vocabulary import VOCABULARY

logger = logging.getLogger(__name__)


class DistillModule(pl.LightningModule):
    """Trains a student towards a frozen teacher; holds the sparsity where there is a Lagrangian.

    Args:
        step: what is trained, and by which losses and rates. Its teacher is frozen and no part of the module, hence in
            no checkpoint.
        seed: of masks and dropout.
        recipe: resolved YAML, kept in checkpoints.
        run: where the run stands, and what it is.

    Attributes:
        guard: counts what is left out; set before training.
    """

    guard: BatchGuard

    def __init__(self, step: TrainingStep, seed: int, recipe: str, run: Standing) -> None:
        super().__init__()
        self.step, self.seed, self.recipe, self.run = step, seed, recipe, run
        self.student, self.objectives, self.lagrangian = step.student, step.objectives, step.lagrangian
        self.means = RunningMeans()
        self.read, self.read_seconds = 0.0, 0.0  # seconds of audio on this rank, and a reader's time for them

    def on_fit_start(self) -> None:
        """Bring the teacher to the student's device."""
        self.step.teacher.to(self.device)

    on_validation_start = on_fit_start

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Copy a batch."""
        return batch.to(device, non_blocking=True)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss of one micro-batch."""
        seed_micro_batch(self.seed, batch.number)
        self.guard.read("train", batch)
        self.read, self.read_seconds = self.read + batch.seconds, self.read_seconds + batch.read_seconds
        loss = self.step.loss(batch.waveforms, batch.lengths, self.global_step, batch.heard, batch.labels)
        if loss.distillation is not None:
            self.guard.loss(self.global_step, loss.total, batch)
            terms = {f"train/{name}": value for name, value in loss.distillation.terms.items()}
            values = {"train/distill": loss.distillation.total.detach(), **terms, "train/loss": loss.total.detach()}
            self.means.add(values, batch.seconds)
        return loss.total

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of the whole gradient; an update whose gradient is not finite will have no effect.

        The norm is the same on all ranks. The fused optimizer reads the flag on the device: nobody waits for it.
        """
        self.step.hold_back(optimizer, self.global_step)
        norm = self.step.clip(optimizer)
        finite = norm.isfinite()
        if self._scales_loss:  # the scaler skips by itself, often without trouble: what counts is the loss
            self.guard.gradient(self.global_step, None)
        else:
            optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
            self.guard.gradient(self.global_step, finite)

    @property
    def _scales_loss(self) -> bool:
        return self.trainer.precision == "16-mixed"

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """The same loss with the eval masks, weighted by seconds of audio, over all ranks."""
        self.guard.read("valid", batch)
        if not len(batch.waveforms):
            return
        loss = self.objectives(self.step.teacher, self.student, batch.waveforms, batch.lengths, labels=batch.labels)
        values = {"valid/distill": loss.total, **{f"valid/{k}": v for k, v in loss.terms.items()}}
        self.validation.add(values, batch.seconds)
        for name, (numerator, denominator) in loss.ratios.items():
            self.ratios.setdefault(name, RunningMeans()).add({"of": numerator, "in": denominator}, batch.seconds)

    def on_validation_epoch_start(self) -> None:
        """Forget the last validation."""
        self.validation = RunningMeans(weighted=True)
        self.ratios: dict[str, RunningMeans] = {}

    def on_validation_epoch_end(self) -> None:
        """Reduce over ranks and log."""
        self.guard.settle(self.trainer)
        metrics = self.validation.reduce(self.trainer, self.device)
        metrics.pop("seconds")
        for name in self.objectives.ratio_names:  # on all ranks, also one that had nothing to count
            counted = self.ratios.get(name, RunningMeans()).reduce(self.trainer, self.device)
            metrics[f"valid/{name}"] = counted.get("of", math.nan) / counted.get("in", math.nan)
        self._log(metrics)

    def configure_optimizers(self) -> dict[str, Any]:  # type: ignore[override]
        """AdamW with one schedule for all groups (the masks' rates may be kept constant)."""
        optim = self.step.optim
        # the fused update would take the scaling out of the gradient itself, after it has been clipped
        optimizer = self.step.make_optimizer(fused=self.device.type in ("cpu", "cuda") and not self._scales_loss)

        keep = ("log_alpha", "lambda") if self.lagrangian is not None and self.lagrangian.config.constant_lr else ()

        def scheduled(name: str) -> Callable[[int], float]:
            return lambda step: 1.0 if name in keep else group_factor(name, step, optim)

        factors: Any = [scheduled(group["name"]) for group in optimizer.param_groups]
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factors), "interval": "step"}}

    def log_training(self) -> None:
        """Log the means since the last row, what was left out, and where the constraint and the rates stand."""
        self.guard.settle(self.trainer)
        metrics = self.means.reduce(self.trainer, self.device)
        seconds = metrics.pop("seconds")
        metrics["speed/audio_seconds_per_second"] = seconds / max(1e-9, self.means.elapsed())
        readers = self.trainer.world_size * max(1, self.trainer.train_dataloader.num_workers)  # type: ignore[union-attr]
        metrics["speed/loader_audio_seconds_per_second"] = readers * self.read / max(1e-9, self.read_seconds)
        self.read, self.read_seconds = 0.0, 0.0
        if self.lagrangian is not None:
            with torch.no_grad():
                expected = self.lagrangian.cost(self.student)
                metrics["sparsity/expected"] = self.lagrangian.sparsity(expected).item()
            metrics["sparsity/target"] = self.lagrangian.target(self.global_step)
            metrics[f"cost/{self.lagrangian.cost.name}"] = expected.item()
            metrics["lagrangian/lambda1"] = self.lagrangian.lambda1.item()
            metrics["lagrangian/lambda2"] = self.lagrangian.lambda2.item()
        schedule: Any = self.lr_schedulers()
        for group, factor in zip(self.trainer.optimizers[0].param_groups, schedule.lr_lambdas):
            metrics[f"lr/{group['name']}"] = group["initial_lr"] * factor(self.global_step - 1)  # the next one's is set
        metrics.update(self.guard.metrics())
        self.means = RunningMeans()
        self._log(metrics)

    def _log(self, metrics: dict[str, float]) -> None:
        for sink in self.trainer.loggers:
            sink.log_metrics(metrics, step=self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what prune.py needs to rebuild the student."""
        checkpoint["student_config"] = self.student.config
        if self.student.vocabulary is not None:
            checkpoint[VOCABULARY] = self.student.vocabulary
        checkpoint["heads"] = self.objectives.head_state()
        checkpoint["recipe"] = self.recipe
        checkpoint[RUN] = self.run.entry(self.global_step)
        checkpoint["kernels"] = kernels.choices()
        self.guard.settle(self.trainer)
        checkpoint["guard"] = self.guard.state()
        checkpoint["means"] = self.means.state(self.trainer, self.device)
        if self.lagrangian is not None:
            checkpoint[BUDGET] = self.lagrangian.budget.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Continue the counts, the row of metrics that was being gathered, and the forms of operations, bit for bit."""
        kernels.use(checkpoint.get("kernels", {}))
        self.guard.load_state(checkpoint["guard"])
        self.means = RunningMeans.from_state(checkpoint["means"], self.trainer.global_rank, self.device)


class AudioDataModule(pl.LightningDataModule):
    """Batches of one rank. Resumes at the micro-batch that the number of updates implies.

    Args:
        recipe: audio and batching, the seed of order and crops, and the micro-batches of all ranks in one update.
        lists: what there is to train and to validate on.
    """

    def __init__(self, recipe: Recipe, lists: Lists) -> None:
        super().__init__()
        self.config, self.seed, self.batches_per_update = recipe.data, recipe.seed, recipe.trainer.batches_per_update
        self.lists = lists
        self.ends: list[int] = []  # of the epochs before a resumed run; to count them takes as long as to plan them

    def updates_of(self, epochs: int) -> int:
        """Updates that so many epochs hold."""
        stream = BatchStream(select_utterances(self.lists.train, self.config), self.config, seed=self.seed)
        steps = max(1, stream.first_of(epochs) // self.batches_per_update)
        logger.info("%d epochs are %d updates of %d micro-batches", epochs, steps, self.batches_per_update)
        return steps

    @property
    def _cut(self) -> list[float | None]:
        """What the ends of epochs depend on and may change in the middle of a run."""
        return [self.config.seconds_per_batch, self.config.utterances_per_batch]

    def state_dict(self) -> dict[str, Any]:
        """Where the epochs before this update ended, in micro-batches."""
        assert self.trainer is not None
        stream: BatchStream = self.trainer.train_dataloader.sampler  # type: ignore[union-attr]
        return {"cut": self._cut, "ends": stream.ends_before(self.trainer.global_step * self.batches_per_update)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what a checkpoint says, unless the micro-batches are cut in another way now."""
        if state_dict["cut"] == self._cut:
            self.ends = state_dict["ends"]
        else:
            logger.info("with other micro-batches the rest of this epoch is drawn anew")

    def _place(self) -> Place:
        assert self.trainer is not None
        return Place(
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            ranks_per_node=max(1, self.trainer.world_size // self.trainer.num_nodes),
            pin_memory=self.trainer.strategy.root_device.type == "cuda",
            worker_init_fn=outlive_stop_signal,
        )

    def train_dataloader(self) -> Any:
        """Endless."""
        assert self.trainer is not None
        start, lists = self.trainer.global_step * self.batches_per_update, self.lists
        return make_train_loader(
            lists.train, self.config, self.seed, start, self._place(), self.ends, lists.speller, lists.noise
        )

    def val_dataloader(self) -> Any:
        """This rank's share."""
        return make_valid_loader(self.lists.valid, self.config, self._place(), self.lists.speller)


def build_trainer(recipe: Recipe, optim: OptimConfig, table: MetricsCSV) -> pl.Trainer:
    """Trainer of one step of a recipe, with the accumulation that this number of processes needs.

    Args:
        recipe: machine and bookkeeping.
        optim: of the step, its length in updates.
        table: of its metrics.

    Raises:
        UserError: the machine is not what the recipe asks for.
    """
    config = recipe.trainer
    accelerator, devices = config.find_devices()
    world_size = devices * config.num_nodes
    accumulate = config.micro_batches(world_size)
    strategy: str | Strategy = "auto"
    if world_size > 1:
        backend = "nccl" if accelerator == "gpu" else "gloo"
        if accelerator == "cpu":  # all processes of this machine are to round alike
            chosen = [name for name, taken in kernels.decide().items() if taken]
            os.environ.setdefault("WAV2VEC2_KERNELS", ",".join(chosen))
        # no exchange of buffers: ranks may validate on unequal numbers of batches
        strategy = DDPStrategy(process_group_backend=backend, gradient_as_bucket_view=True, broadcast_buffers=False)
    if config.precision == "32-true":  # torch lets convolutions round float32 to 10 bits of mantissa
        torch.backends.cudnn.allow_tf32 = False
    logger.info("%d process(es), %d micro-batches each per update", world_size, accumulate)
    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # the batch script does
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=config.num_nodes,
        strategy=strategy,
        precision=config.precision,  # type: ignore[arg-type]  # parse_recipe has settled what auto is
        max_steps=optim.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=optim.clip,
        val_check_interval=min(config.validate_every, optim.max_steps) * accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=config.log_every,
        logger=[TensorBoardLogger(recipe.exp_dir, name="", version=""), table],
        callbacks=[Progress(recipe, recipe.exp_dir / LAST)],
        plugins=plugins,
        default_root_dir=recipe.exp_dir,
        benchmark=False,
    )
    supervise_alone(trainer)
    return trainer


def is_first_process() -> bool:
    """Whether this process writes for all processes of the run; told by its launcher, before there is a trainer."""
    ranks = ["RANK", "LOCAL_RANK", "NODE_RANK", *(["SLURM_PROCID"] if SLURMEnvironment.detect() else [])]
    return all(os.environ.get(rank, "0") == "0" for rank in ranks)


def train(module: DistillModule, data: AudioDataModule, recipe: Recipe) -> None:
    """Train to the end, from where the run stands.

    Raises:
        UserError: the checkpoint cannot be continued, or too much of the data or of the updates is bad.
        Stopped: a signal asked for it; everything is saved.
        PeerLost: another process of the run died.
    """
    exp_dir, run, optim = recipe.exp_dir, module.run, module.step.optim
    table = MetricsCSV(exp_dir / "metrics.csv")
    table.resume(run.step)
    if run.content:
        check_state(module, run.content, run.last)
    validate_last = optim.max_steps % min(recipe.trainer.validate_every, optim.max_steps) != 0
    if run.step == optim.max_steps and not (validate_last and "valid/distill" not in table.row(run.step)):
        logger.info("%s is complete: it has made all of its %d updates", exp_dir, run.step)
        module.load_state_dict(run.content["state_dict"])
        run.leave()
        return
    trainer = build_trainer(recipe, optim, table)
    limits = recipe.data.max_bad_share, recipe.trainer.max_skipped_updates
    module.guard = BatchGuard(data.lists.manifests, *limits, report=exp_dir / "bad_files.tsv")
    if run.content:
        logger.info("resuming from %s at update %d", run.last, run.step)
        supervise_restoring(trainer, run.content, run.last)
    if trainer.is_global_zero:  # now that the folder is known to be this run's, and that there is something to do
        save_resolved(module.recipe, exp_dir)
        run.begin(exp_dir)
        data.lists.report(exp_dir)
    progress = next(callback for callback in trainer.callbacks if isinstance(callback, Progress))  # type: ignore[attr-defined]
    with waiting(trainer), supervised(trainer):
        with progress.stop:
            trainer.fit(module, data, ckpt_path=run.last if run.step else None, weights_only=True)
        if validate_last:
            with keeping(f"all updates are made, and saved in {run.last}"):
                trainer.validate(module, data, verbose=False)
    logger.info("%s: the last of %d updates is made", exp_dir, optim.max_steps)


def first_step(recipe: Recipe, resolved: str) -> tuple[Wav2Vec2Model, TrainingStep]:
    """Step 1 of a recipe to its end, or the only one; where nothing is pruned it leaves ``final.pth``.

    Args:
        recipe: what to run.
        resolved: its YAML, as :func:`distillation.config.parse_recipe` gives both.

    Returns:
        The teacher, and what was trained.

    Raises:
        UserError: files or settings that do not fit, or the folder holds another run; and as :func:`train`.
    """
    teacher = load_teacher(recipe)
    start = starting_student(recipe, teacher)
    lists = read_lists(recipe, start, wanted_vocabulary(recipe, start, teacher))
    data = AudioDataModule(recipe, lists)
    content = content_of(recipe, teacher, lists)
    identity = step_1_identity(recipe, content, None if recipe.student_ckpt is None else start)
    student = make_prunable(prepared_to_write(recipe, start, lists.vocabulary), recipe.pruning)
    if recipe.pruning.units:
        check_budget(student, make_budget(recipe.pruning, teacher), recipe.pruning)
    with run_lock(recipe.exp_dir, owner=is_first_process()):
        run = open_run(recipe.exp_dir, identity, recipe.continue_with_changes)
        optim = run.resolve(recipe.optim, data.updates_of)
        step = build_step(recipe, optim, student, teacher, recipe.pruning)
        module = DistillModule(step, recipe.seed, resolved, run)
        train(module, data, recipe)
        if is_first_process() and not recipe.pruning.units:
            entry = run.entry(optim.max_steps)
            save_result(recipe.exp_dir / "final.pth", student, module.objectives.head_state(), entry)
    return teacher, step
