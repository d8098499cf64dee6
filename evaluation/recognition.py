"""Word and character error rates of recognisers, side by side, on clean audio and in noise.

    python -m evaluation.recognition teacher.pth exp/dpctc_base/final/final.pth --data data/valid.jsonl
    python -m evaluation.recognition final.pth --data dev-clean --snr 20 10 5 0 --noise /path/to/musan/noise

Models are .pth or .safetensors files, or folders of export.py, with an output layer and its vocabulary; others are left
out, and so are utterances that cannot be used, which are named. Decoding is greedy; --beam_size adds a
beam. The noise is the same for all models; without --noise it is made on the spot, from white to brown.
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from distillation.commandline import make_parser, parse_arguments
from distillation.data.config import DataConfig, TranscriptsConfig
from distillation.data.loaders import make_valid_loader
from distillation.data.manifest import MAX_FRAMES
from distillation.data.noise import Noise, at_level
from distillation.errors import UserError, command
from distillation.lists import case_of, look_at
from distillation.machine import find_accelerator
from distillation.recognition.decoding import decoders_of
from distillation.recognition.labels import Speller
from distillation.recognition.letters import Case
from distillation.recognition.scoring import error_rates
from distillation.recognition.transcripts import read_sets, summary
from distillation.students import backbone_params
from evaluation.tables import markdown_table
from wav2vec2 import Wav2Vec2Model, prune
from wav2vec2.checkpoint import load_checkpoint
from wav2vec2.feature_extractor import SAMPLE_RATE
from wav2vec2.placement import check_placement

logger = logging.getLogger(__name__)


@dataclass
class Measuring:
    """What is measured on what."""

    data: Path
    """Transcribed audio: LibriSpeech or Kaldi folder, Common Voice .tsv, JSON lines, or lines of path<TAB>text."""
    audio: Path | None = None
    """Folder of the audio, as for finetune_ctc.py."""
    case: Literal["auto"] | Case = "auto"
    """Of the transcripts; auto for that of each model's output layer."""
    snr: list[float] = field(default_factory=list)
    """Also in noise at these ratios in dB."""
    noise: list[Path] = field(default_factory=list)
    """Folders of noise recordings."""
    seed: int = 0
    """Of the noise."""
    beam_size: int = 0
    """Also decode with a beam; see requirements/export.txt."""
    seconds_per_batch: float = 160.0
    """Audio that is run at once, padding included."""
    workers: int = 0
    """Processes that read audio."""
    device: str = "auto"
    """cpu, cuda or cuda:1; auto takes a GPU where there is one."""

    def __post_init__(self) -> None:
        if self.beam_size < 0 or self.workers < 0:
            raise UserError("--beam_size and --workers must be at least 0")
        if self.audio is not None and not self.audio.is_dir():
            raise UserError(f"--audio {self.audio} is not a folder")
        if not all(-100 <= snr <= 100 for snr in self.snr):
            raise UserError(f"--snr {self.snr}: they must lie in [-100, 100] dB")
        if self.seed < 0 or not self.seconds_per_batch > 0:
            raise UserError("--seed must be at least 0, --seconds_per_batch positive")


def measure(model: Wav2Vec2Model, measuring: Measuring, source: object) -> dict[str, dict[str, float]]:
    """Error rates in percent by condition ("clean", "20 dB", ...) and name (wer, cer, beam_wer, beam_cer).

    Args:
        model: a recogniser, dense.
        measuring: on what.
        source: of the model, for messages.

    Raises:
        UserError: the model is no recogniser, or nothing can be read.
    """
    vocabulary = model.vocabulary
    if vocabulary is None:
        raise UserError(
            f"{source}: is no recogniser, it has no output layer with a vocabulary: fine-tune it with finetune_ctc.py"
        )
    place = measuring.device
    if place == "auto":
        place = "cuda" if find_accelerator() == "gpu" else "cpu"
    try:
        model = model.eval().to(check_placement(place, torch.float32))
    except ValueError as error:
        raise UserError(f"--device: {error}") from None
    decoders = decoders_of(vocabulary, measuring.beam_size)
    case = case_of(vocabulary) if measuring.case == "auto" else measuring.case
    (found,) = read_sets([measuring.data], measuring.audio, case)
    look_at(found, vocabulary, model)
    if found.left_out:
        logger.warning("%s: %d left out: %s", found.source, len(found.left_out), summary(found.left_out))
    longest = max(u.num_frames for u in found.utterances) / SAMPLE_RATE
    config = DataConfig(
        min_frames=400,
        max_frames=MAX_FRAMES,
        crop=False,
        transcripts=TranscriptsConfig(),
        num_workers=measuring.workers,
        valid_seconds_per_batch=max(measuring.seconds_per_batch, longest),
    )
    conditions: dict[str, Noise | None] = {"clean": None}
    conditions |= {f"{snr:g} dB": at_level(snr, measuring.noise, measuring.seed) for snr in measuring.snr}
    rates = {}
    for condition, noise in conditions.items():
        loader = make_valid_loader(found.manifest, config, speller=Speller(vocabulary), noise=noise)
        rates[condition], errors = error_rates(model, loader, decoders)
        for path, reason in errors.items():
            logger.warning("left out: %s: %s", path, reason)
    return rates


def table(rows: list[tuple[str, int, dict[str, dict[str, float]]]]) -> str:
    """Markdown: a line per model, its rates per condition."""
    _, _, first = rows[0]
    head = ["model", "parameters"]
    for condition, rates in first.items():
        where = "" if condition == "clean" else f", {condition}"
        head += [f"{name.replace('_', ' ').upper()}{where}" for name in rates]
    lines = [
        [name, f"{size:,}", *(f"{rate:.2f} %" for rates in found.values() for rate in rates.values())]
        for name, size, found in rows
    ]
    return markdown_table(head, lines)


@command
def main() -> None:
    """Parse the command line, measure, print."""
    parser = make_parser(__doc__)
    parser.add_argument("models", type=Path, nargs="+", help="Files of recognisers.")
    parser.add_class_arguments(Measuring, as_group=False, skip={"snr", "noise"})
    text = "Also in noise at these ratios in dB: 20 10 5 0."
    parser.add_argument("--snr", type=float, nargs="+", default=[], help=text)
    parser.add_argument("--noise", type=Path, nargs="+", default=[], help="Folders of noise recordings.")
    given = vars(parse_arguments(parser))
    models, measuring = given.pop("models"), Measuring(**given)
    logging.getLogger("distillation.data.loaders").setLevel(logging.WARNING)
    rows = []
    for path in models:
        model = load_checkpoint(path).model
        if model.vocabulary is None and len(models) > 1:
            logger.warning("%s is no recogniser: left out", path)
            continue
        model = prune(model)[0] if model.masks() else model
        rows.append((str(path), backbone_params(model), measure(model, measuring, path)))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    if not rows:
        raise UserError(f"none of {', '.join(map(str, models))} is a recogniser: fine-tune with finetune_ctc.py")
    print(table(rows))


if __name__ == "__main__":
    main()
