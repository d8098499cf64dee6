"""A whole fine-tuning: data, training, decoding, what it leaves behind."""

import functools
import json
import logging

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from distillation.errors import UserError
from distillation.stopping import keeping
from distillation.training.lightning_internals import supervise_alone
from distillation.training.lock import run_lock
from distillation.training.metrics import MetricsCSV
from distillation.training.processes import outlive_stop_signal
from distillation.training.record import RUN
from distillation.training.resuming import AtomicCheckpointIO, check_state, supervise_restoring
from distillation.training.standing import open_run
from finetuning.batches import LengthBatches, SpeechDataset
from finetuning.config import FinetuneRun
from finetuning.ctc import CTCModule, RatesBar, error_rates, head_frames
from finetuning.damage import Damage
from finetuning.decoding import beam_decoder
from finetuning.transcripts import (
    Utterance,
    describe,
    learnable,
    make_vocabulary,
    read_sets,
    report_left_out,
    shortages,
)
from wav2vec2 import load_model, prune, save_model
from wav2vec2.checkpoint import fingerprint, write_text

logger = logging.getLogger(__name__)
CHECKPOINT_MINUTES = 15.0  # between two checkpoints, where no validation makes one earlier


def finetune(run: FinetuneRun) -> dict[str, float]:
    """Fine-tune and evaluate; returns the error rates in percent.

    Raises:
        UserError: data, model or machine are not what the run asks for, or the folder holds another run.
        Stopped: a signal asked for it; everything is saved.
    """
    if run.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("--accelerator gpu: no GPU is visible")
    config, exp_dir = run.config, run.exp_dir
    pl.seed_everything(run.seed, verbose=False)
    network = load_model(run.model)
    network = prune(network)[0] if network.masks() else network
    train, valid = read_sets([run.train, run.valid], run.audio, run.case)
    frames_of = functools.partial(head_frames, network)
    train = learnable(train, frames_of)
    train_set, valid_set = train.utterances, valid.utterances
    vocabulary = make_vocabulary(train_set)
    decode_beam = beam_decoder(vocabulary, run.beam_size) if run.beam_size else None  # is the library there? Say so now
    if unknown := sorted({c for u in valid_set for c in u.text} - {" ", *vocabulary}):
        logger.warning("%s: characters %s do not occur in training and count as errors", run.valid, "".join(unknown))
    if hopeless := sum(map(bool, shortages(valid_set, frames_of))):
        of = run.valid, hopeless, len(valid_set)
        logger.warning("%s: %d of %d transcripts have more characters than frames and count as errors", *of)
    content = {"weights": fingerprint(network), "train list": describe(train_set), "valid list": describe(valid_set)}
    valid_loader = _loader(valid_set, vocabulary, LengthBatches(valid_set, config.seconds_per_batch, None), run.workers)
    metrics = MetricsCSV(exp_dir / "metrics.csv")
    with run_lock(exp_dir, owner=True):
        standing = open_run(exp_dir, run.identity(content), run.continue_with_changes)
        report_left_out([train, valid], exp_dir)
        damage = Damage(train, valid, exp_dir)
        step = standing.step
        standing.extend_to(config.max_steps)
        module = CTCModule(network, vocabulary, config, standing, run.seed)
        bar = RatesBar(standing.last, run.validate_every, CHECKPOINT_MINUTES, run.validate_every)
        trainer = pl.Trainer(
            accelerator=run.accelerator,
            devices=1,
            precision=run.precision,
            max_steps=config.max_steps,
            max_epochs=-1,
            val_check_interval=run.validate_every,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            gradient_clip_val=1.0,
            logger=metrics,
            callbacks=[bar, damage],
            enable_checkpointing=False,
            plugins=[AtomicCheckpointIO()],
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=min(50, run.validate_every),
        )
        supervise_alone(trainer)
        metrics.resume(step)
        if standing.content:
            check_state(module, standing.content, standing.last)
            module.load_state_dict(standing.content["state_dict"])
            supervise_restoring(trainer, standing.content, standing.last)
        batches = LengthBatches(train_set, config.seconds_per_batch, run.seed, step)
        train_loader = _loader(train_set, vocabulary, batches, run.workers)
        if step == config.max_steps:
            standing.leave()
        else:
            standing.begin(exp_dir)
            with bar.stop:
                resume = standing.last if step else None
                trainer.fit(module, train_loader, valid_loader, ckpt_path=resume, weights_only=True)
        logger.info("%s: the last of %d updates is made", exp_dir, config.max_steps)
        module.to(trainer.strategy.root_device)  # Lightning leaves it on the CPU
        save_model(
            exp_dir / "final.pth", module.model, vocabulary=vocabulary, **{RUN: standing.entry(config.max_steps)}
        )
        with keeping(f"the model is in {exp_dir / 'final.pth'}, its error rates are not measured yet"):
            note = functools.partial(damage.note, valid)
            results = dict(zip(("wer", "cer"), error_rates(module, valid_loader, module.decode, note)))
            if decode_beam is not None:
                results |= zip(("beam_wer", "beam_cer"), error_rates(module, valid_loader, decode_beam, note))
        write_text(exp_dir / "results.json", json.dumps(results, indent=1) + "\n")
    return results


def _loader(utterances: list[Utterance], vocabulary: list[str], batches: LengthBatches, workers: int) -> DataLoader:
    return DataLoader(
        SpeechDataset(utterances, vocabulary),
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
        worker_init_fn=outlive_stop_signal,
    )
