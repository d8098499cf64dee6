"""Fine-tune a model to write down speech: characters, CTC, no lexicon and no language model.

    python finetune_ctc.py final.pth --train LibriSpeech/train-clean-100 --valid LibriSpeech/dev-clean --exp_dir E

Transcripts are LibriSpeech folders or manifests (path<TAB>text). First the output layer alone learns, then all above
the convolutions. Leaves E/final.pth, which holds its vocabulary (export.py --to hf makes a speech recogniser of it),
E/metrics.csv and E/results.json. Run again to resume from the last validation.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from distillation.commandline import make_parser, parse_arguments
from distillation.errors import UserError, command
from distillation.training.lock import run_lock
from distillation.training.metrics import MetricsCSV
from distillation.training.progress import AtomicCheckpointIO
from finetuning.ctc import CTCModule, FinetuneConfig, UpdateBar, error_rates
from finetuning.decoding import beam_decoder
from finetuning.transcripts import LengthBatches, SpeechDataset, Utterance, make_vocabulary, read_transcripts
from wav2vec2 import load_model, prune, save_model
from wav2vec2.checkpoint import read_torch_file, replacing

logger = logging.getLogger(__name__)


def run(
    model: str,
    train: Path,
    valid: Path,
    exp_dir: Path,
    config: FinetuneConfig,
    validate_every: int,
    beam_size: int,
    accelerator: str,
    precision: Literal["32-true", "bf16-mixed"],
    seed: int,
    workers: int,
) -> dict[str, float]:
    """Fine-tune and evaluate; the arguments are the flags. Returns the error rates in percent."""
    pl.seed_everything(seed, verbose=False)
    network = load_model(model)
    network = prune(network)[0] if network.masks() else network
    train_set, valid_set = read_transcripts(train), read_transcripts(valid)
    vocabulary = make_vocabulary(train_set)
    decode_beam = beam_decoder(vocabulary, beam_size) if beam_size else None  # is the library there? Say so now
    if unknown := sorted({c for u in valid_set for c in u.text} - {" ", *vocabulary}):
        logger.warning("%s: characters %s do not occur in training and count as errors", valid, "".join(unknown))
    module = CTCModule(network, vocabulary, config, seed)
    valid_loader = _loader(valid_set, vocabulary, LengthBatches(valid_set, config.seconds_per_batch, None), workers)
    last, metrics = exp_dir / "ckpts" / "last.ckpt", MetricsCSV(exp_dir / "metrics.csv")
    with run_lock(exp_dir, owner=True):
        trainer = pl.Trainer(
            accelerator=accelerator,
            devices=1,
            precision=precision,
            max_steps=config.max_steps,
            max_epochs=-1,
            val_check_interval=validate_every,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            gradient_clip_val=1.0,
            logger=metrics,
            callbacks=[UpdateBar(), ModelCheckpoint(last.parent, filename=last.stem, enable_version_counter=False)],
            plugins=[AtomicCheckpointIO()],
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=min(50, validate_every),
        )
        resume = last.is_file()
        step = module.check(read_torch_file(last), last) if resume else 0
        metrics.resume(step)
        batches = LengthBatches(train_set, config.seconds_per_batch, seed, step)
        train_loader = _loader(train_set, vocabulary, batches, workers)
        trainer.fit(module, train_loader, valid_loader, ckpt_path=last if resume else None, weights_only=True)
        module.to(trainer.strategy.root_device)  # Lightning leaves it on the CPU
        results = dict(zip(("wer", "cer"), error_rates(module, valid_loader, module.decode)))
        if decode_beam is not None:
            results |= zip(("beam_wer", "beam_cer"), error_rates(module, valid_loader, decode_beam))
        save_model(exp_dir / "final.pth", module.model, vocabulary=vocabulary)
        with replacing(exp_dir / "results.json") as temporary:
            temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    return results


def _loader(utterances: list[Utterance], vocabulary: list[str], batches: LengthBatches, workers: int) -> DataLoader:
    return DataLoader(
        SpeechDataset(utterances, vocabulary),
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


@command
def main() -> None:
    """Parse the command line, run, print the error rates."""
    parser = make_parser(__doc__)
    parser.add_argument("model", type=str, help="Model: .pth, .safetensors, a folder of export.py, or a hub id.")
    parser.add_argument("--train", type=Path, required=True, help="LibriSpeech folder or manifest.")
    parser.add_argument("--valid", type=Path, required=True, help="The same, to measure on.")
    parser.add_argument("--exp_dir", type=Path, required=True, help="Folder of the run.")
    parser.add_class_arguments(FinetuneConfig, as_group=False)
    parser.add_argument("--validate_every", type=int, default=1000, help="Updates between two validations.")
    parser.add_argument(
        "--beam_size", type=int, default=0, help="Also decode with a beam; see requirements/export.txt."
    )
    parser.add_argument("--accelerator", choices=["auto", "cpu", "gpu"], default="auto", help="Where to train.")
    choices = ["32-true", "bf16-mixed"]
    parser.add_argument("--precision", choices=choices, default=choices[0], help="Of training, as Lightning names it.")
    parser.add_argument("--seed", type=int, default=0, help="Of the data's order, dropout and the output layer.")
    parser.add_argument("--workers", type=int, default=2, help="Processes that read audio.")
    arguments = vars(parse_arguments(parser))
    config = FinetuneConfig(**{field.name: arguments.pop(field.name) for field in dataclasses.fields(FinetuneConfig)})
    if min(arguments["validate_every"] - 1, arguments["beam_size"], arguments["workers"]) < 0:
        raise UserError("--validate_every must be at least 1, --beam_size and --workers at least 0")
    if not 0 <= arguments["seed"] < 2**32:
        raise UserError(f"--seed {arguments['seed']}: it must lie in [0, 2^32)")
    if arguments["accelerator"] == "gpu" and not torch.cuda.is_available():
        raise UserError("--accelerator gpu: no GPU is visible")
    results = run(config=config, **arguments)
    print(", ".join(f"{name.replace('_', ' ').upper()} {value:.2f} %" for name, value in results.items()))


if __name__ == "__main__":
    main()
