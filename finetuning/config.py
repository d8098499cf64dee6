"""Settings of a fine-tuning, which are its command line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from distillation.config import flat_settings
from distillation.errors import UserError
from distillation.training.record import Identity, Kinds, Settings
from finetuning.letters import Case

KINDS = Kinds(
    elsewhere=frozenset({"model", "train", "valid", "audio", "exp_dir", "continue_with_changes"}),
    free=frozenset({"validate_every", "beam_size", "accelerator", "precision", "workers"}),
    rates=frozenset({"max_steps", "freeze_steps", "lr", "head_lr", "warmup_ratio"}),
)


@dataclass
class FinetuneConfig:
    """How to fine-tune."""

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

    def __post_init__(self) -> None:
        if not 0 <= self.freeze_steps < self.max_steps:
            raise UserError(
                f"--freeze_steps {self.freeze_steps}: it must be at least 0 and less than --max_steps {self.max_steps}"
            )
        if min(self.lr, self.head_lr, self.seconds_per_batch) <= 0 or not 0 <= self.warmup_ratio <= 1:
            raise UserError("--lr, --head_lr and --seconds_per_batch must be positive, --warmup_ratio within [0, 1]")


@dataclass
class FinetuneRun:
    """What to fine-tune on what, and where."""

    model: str
    """Model: .pth, .safetensors, a folder of export.py, or a hub id."""
    train: Path
    """LibriSpeech or Kaldi folder, Common Voice .tsv, JSON lines, or lines of path<TAB>text."""
    valid: Path
    """The same kinds, to measure on."""
    exp_dir: Path
    """Folder of the run."""
    config: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Length and rates."""
    audio: Path | None = None
    """Folder of prepare_data.py --convert, whose copies are taken for the files that lists and folders name; of another
    folder, what relative paths start from, NAME.mp3.flac or NAME.flac for a NAME.mp3 that it does not hold."""
    case: Case = "upper"
    """Capitals, as LibriSpeech has them, or letters as they are; composed (NFC) in any case."""
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
    continue_with_changes: bool = False
    """Go on although length or rates are others now."""

    def __post_init__(self) -> None:
        if min(self.validate_every - 1, self.beam_size, self.workers) < 0:
            raise UserError("--validate_every must be at least 1, --beam_size and --workers at least 0")
        if self.audio is not None and not self.audio.is_dir():
            raise UserError(f"--audio {self.audio} is not a folder")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed {self.seed}: it must lie in [0, 2^32)")

    def identity(self, content: Settings) -> Identity:
        """What is trained.

        Args:
            content: of the files.
        """
        settings = {name.removeprefix("config."): value for name, value in flat_settings(self).items()}
        return Identity.of(settings, KINDS, content)
