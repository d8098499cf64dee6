"""Fine-tune a model to write down speech: characters, CTC, no lexicon and no language model.

    python finetune_ctc.py final.pth --train LibriSpeech/train-clean-100 --valid LibriSpeech/dev-clean --exp_dir E

Transcripts are LibriSpeech or Kaldi folders, Common Voice's .tsv, JSON lines as NeMo writes them, or lines of
path<TAB>text; what cannot be used is listed in E/left_out.tsv. First the output layer alone learns, then all above the
convolutions. A model that has an output layer over these characters keeps it. Leaves E/final.pth, which holds its
vocabulary (export.py --to hf or onnx-asr makes a recogniser of it), E/metrics.csv and E/results.json. Run again to
resume. It is distill.py with objective.ctc alone: further flags are those of a recipe, e.g. --trainer.devices 2.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from distillation.commandline import add_continue_flag, make_parser, parse_arguments
from distillation.config import RECIPES, parse_recipe
from distillation.errors import UserError, command
from distillation.recognition.letters import Case
from wav2vec2 import CheckpointError
from wav2vec2.checkpoint import write_text
from wav2vec2.hub import locate

RECIPE = RECIPES / "bases" / "finetune_ctc.yaml"
# flag -> setting of the recipe
SETTINGS = {
    "train": "data.transcripts.train", "valid": "data.transcripts.valid", "audio": "data.transcripts.audio",
    "case": "data.transcripts.case", "exp_dir": "exp_dir", "seed": "seed", "workers": "data.num_workers",
    "max_steps": "optim.max_steps", "freeze_steps": "optim.freeze_steps", "lr": "optim.lr", "head_lr": "optim.lr_new",
    "warmup_ratio": "optim.warmup_ratio", "seconds_per_batch": "data.seconds_per_batch",
    "validate_every": "trainer.validate_every", "accelerator": "trainer.accelerator", "precision": "trainer.precision",
}  # fmt: skip


@dataclass
class Flags:
    """What to fine-tune on what, where and how."""

    train: Path
    """LibriSpeech or Kaldi folder, Common Voice .tsv, JSON lines, or lines of path<TAB>text."""
    valid: Path
    """The same kinds, to measure on."""
    exp_dir: Path
    """Folder of the run."""
    max_steps: int = 20_000
    """Updates."""
    freeze_steps: int = 2_000
    """Updates in which the output layer alone learns."""
    lr: float = 1e-4
    """Peak rate of the Transformer."""
    head_lr: float = 1e-3
    """Peak rate of the output layer."""
    warmup_ratio: float = 0.1
    """Share of the updates after the freeze in which the Transformer's rate rises; then it falls to 0."""
    seconds_per_batch: float = 100.0
    """Audio of an update, padding included."""
    train_extractor: bool = False
    """Train the convolutions too."""
    audio: Path | None = None
    """Folder of prepare_data.py --convert, whose copies are taken for the files that lists and folders name; of another
    folder, what relative paths start from, NAME.mp3.flac or NAME.flac for a NAME.mp3 that it does not hold."""
    case: Literal["auto"] | Case = "auto"
    """Capitals (upper), small letters (lower) or letters as they are (keep), composed (NFC) in any case; auto for those
    of the model's output layer, capitals where it has none."""
    validate_every: int = 1000
    """Updates between two validations."""
    beam_size: int = 0
    """Also decode with a beam; see requirements/export.txt."""
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"
    """Where to train."""
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    """Of training, as Lightning names it."""
    seed: int = 0
    """Of the data's order, dropout and the output layer."""
    workers: int = 2
    """Processes that read audio."""

    def __post_init__(self) -> None:
        if self.beam_size < 0:
            raise UserError(f"--beam_size is {self.beam_size}: it must be at least 0")
        if self.audio is not None and not self.audio.is_dir():
            raise UserError(f"--audio {self.audio} is not a folder")
        if not 0 <= self.freeze_steps < self.max_steps:
            raise UserError(
                f"--freeze_steps {self.freeze_steps}: it must be at least 0 and less than --max_steps {self.max_steps}"
            )

    def words(self, model: Path) -> list[str]:
        """Flags of the recipe."""
        values = {setting: getattr(self, flag) for flag, setting in SETTINGS.items()}
        values |= {
            "teacher_ckpt": model,
            "objective.extractor_gradient": float(self.train_extractor),
            "data.valid_seconds_per_batch": max(160.0, self.seconds_per_batch),
            "trainer.checkpoint_every": self.validate_every,
            "trainer.log_every": max(1, min(50, self.validate_every)),
        }
        return [f"--{name}={value}" for name, value in values.items() if value is not None]


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """Flags of this command, and those of recipes: their names have a dot, a value may follow."""
    own: list[str] = []
    others: list[str] = []
    place = own
    for word in words:
        name, equals, _ = word.partition("=")
        if word.startswith("--"):
            place = others if "." in name else own
        place.append(word)
        if equals or not word.startswith("--"):
            place = own
    return own, others


def finetune(flags: Flags, model: Path, others: list[str]) -> dict[str, float]:
    """Fine-tune and evaluate; returns the error rates in percent.

    Args:
        flags: what, where and how.
        model: file, or folder of export.py.
        others: flags of recipes, which come last.

    Raises:
        UserError: data, model or machine are not what the run asks for, or the folder holds another run.
        Stopped: a signal asked for it; everything is saved.
    """
    recipe, resolved = parse_recipe(["--config", str(RECIPE), *flags.words(model), *others])
    if recipe.pruning.units or recipe.objective.ctc is None:
        raise UserError(
            "--pruning and --objective: this fine-tunes a model as it is, by CTC; to prune, run "
            "scripts/run_recogniser.sh, or distill.py with objective.ctc"
        )
    from distillation.recognition.decoding import beam_decoder
    from distillation.stopping import keeping
    from evaluation.recognition import Measuring, measure
    from lightning import first_step, is_first_process  # takes seconds: not for --help

    if flags.beam_size:
        beam_decoder(["<pad>", "|", "A"], flags.beam_size)  # is the library there? Say so now
    _, step = first_step(recipe, resolved)
    if not is_first_process():
        return {}
    transcripts, device = recipe.data.transcripts, "cuda" if recipe.trainer.accelerator == "gpu" else "cpu"
    assert transcripts is not None
    measuring = Measuring(
        recipe.data.transcribed("valid"), transcripts.audio, transcripts.case, beam_size=flags.beam_size, device=device
    )
    with keeping(f"the model is in {flags.exp_dir / 'final.pth'}, its error rates are not measured yet"):
        results = measure(step.student, measuring, flags.exp_dir / "final.pth")["clean"]
    write_text(flags.exp_dir / "results.json", json.dumps(results, indent=1) + "\n")
    return results


@command
def main() -> None:
    """Parse the command line, run, print the error rates."""
    own, others = split(sys.argv[1:])
    parser = make_parser(__doc__)
    parser.add_argument("model", type=str, help="Model: .pth, .safetensors, a folder of export.py, or a hub id.")
    parser.add_class_arguments(Flags, as_group=False)
    add_continue_flag(parser)
    given: dict[str, Any] = vars(parse_arguments(parser, own))
    model = given.pop("model")
    if given.pop("continue_with_changes"):
        others.append("--continue_with_changes")
    try:
        path = locate(model)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    results = finetune(Flags(**given), path, others)
    if results:
        print(", ".join(f"{name.replace('_', ' ').upper()} {value:.2f} %" for name, value in results.items()))


if __name__ == "__main__":
    main()
