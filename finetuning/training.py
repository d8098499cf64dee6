"""A whole fine-tuning: data, training, decoding, what it leaves behind."""

import json
import logging

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from distillation.errors import UserError
from distillation.training.lock import run_lock
from distillation.training.metrics import MetricsCSV
from distillation.training.resuming import AtomicCheckpointIO
from finetuning.config import FinetuneRun
from finetuning.ctc import CTCModule, RatesBar, error_rates
from finetuning.decoding import beam_decoder
from finetuning.transcripts import LengthBatches, SpeechDataset, Utterance, make_vocabulary, read_transcripts
from wav2vec2 import load_model, prune, save_model
from wav2vec2.checkpoint import read_torch_file, write_text

logger = logging.getLogger(__name__)


def finetune(run: FinetuneRun) -> dict[str, float]:
    """Fine-tune and evaluate; returns the error rates in percent.

    Raises:
        UserError: data, model or machine are not what the run asks for.
    """
    if run.accelerator == "gpu" and not torch.cuda.is_available():
        raise UserError("--accelerator gpu: no GPU is visible")
    config, exp_dir = run.config, run.exp_dir
    pl.seed_everything(run.seed, verbose=False)
    network = load_model(run.model)
    network = prune(network)[0] if network.masks() else network
    train_set, valid_set = read_transcripts(run.train), read_transcripts(run.valid)
    vocabulary = make_vocabulary(train_set)
    decode_beam = beam_decoder(vocabulary, run.beam_size) if run.beam_size else None  # is the library there? Say so now
    if unknown := sorted({c for u in valid_set for c in u.text} - {" ", *vocabulary}):
        logger.warning("%s: characters %s do not occur in training and count as errors", run.valid, "".join(unknown))
    module = CTCModule(network, vocabulary, config, run.seed)
    valid_loader = _loader(valid_set, vocabulary, LengthBatches(valid_set, config.seconds_per_batch, None), run.workers)
    last, metrics = exp_dir / "ckpts" / "last.ckpt", MetricsCSV(exp_dir / "metrics.csv")
    with run_lock(exp_dir, owner=True):
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
            callbacks=[RatesBar(), ModelCheckpoint(last.parent, filename=last.stem, enable_version_counter=False)],
            plugins=[AtomicCheckpointIO()],
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=min(50, run.validate_every),
        )
        resume = last.is_file()
        step = module.check(read_torch_file(last), last) if resume else 0
        metrics.resume(step)
        batches = LengthBatches(train_set, config.seconds_per_batch, run.seed, step)
        train_loader = _loader(train_set, vocabulary, batches, run.workers)
        trainer.fit(module, train_loader, valid_loader, ckpt_path=last if resume else None, weights_only=True)
        module.to(trainer.strategy.root_device)  # Lightning leaves it on the CPU
        results = dict(zip(("wer", "cer"), error_rates(module, valid_loader, module.decode)))
        if decode_beam is not None:
            results |= zip(("beam_wer", "beam_cer"), error_rates(module, valid_loader, decode_beam))
        save_model(exp_dir / "final.pth", module.model, vocabulary=vocabulary)
        write_text(exp_dir / "results.json", json.dumps(results, indent=1) + "\n")
    return results


def _loader(utterances: list[Utterance], vocabulary: list[str], batches: LengthBatches, workers: int) -> DataLoader:
    return DataLoader(
        SpeechDataset(utterances, vocabulary),
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
