"""What is exported, what the flags ask for, and what came of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from distillation.errors import UserError
from wav2vec2 import Wav2Vec2Model, prune
from wav2vec2.checkpoint import Checkpoint, load_checkpoint


@dataclass
class ExportOptions:
    """What the flags of export.py say; each format takes some of them."""

    last: bool = False
    quantize: Literal["int8"] | None = None
    """All but the feature extractor in 8 bits, inputs scaled as they come."""
    native: bool = False
    report: Path | None = None
    """Fills the model card. (default: report.json of the run)"""
    max_seconds: float | None = None
    """Longest audio that the file takes, for which its memory is planned. (default: 30)"""


class Exported(NamedTuple):
    """The largest difference from PyTorch, and what was written, in words, where that needs any."""

    difference: float
    words: str = ""


@dataclass(frozen=True)
class Source:
    """A file, and its model as other formats can hold it: dense, in eval mode."""

    path: Path
    model: Wav2Vec2Model
    checkpoint: Checkpoint

    @classmethod
    def read(cls, path: Path) -> "Source":
        """Load a file; the masked network becomes the pruned one, since other formats have no masks."""
        checkpoint = load_checkpoint(path)
        model = checkpoint.model
        return cls(path, prune(model)[0].eval() if model.masks() else model, checkpoint)

    @property
    def vocabulary(self) -> list[str] | None:
        """What each output of a CTC layer stands for, blank first and "|" between words; None without such a layer.

        Raises:
            UserError: the file does not say.
        """
        if self.model.aux is None:
            return None
        if self.model.vocabulary is None:
            raise UserError(
                f"{self.path}: has an output layer but no vocabulary for it; fine-tune with finetune_ctc.py"
            )
        return self.model.vocabulary

    def report(self, named: Path | None) -> dict[str, Any] | None:
        """The named report, or that of the run that made the model: beside it, or one folder up.

        Raises:
            UserError: it is no report of report.py.
        """
        places = [
            self.path.with_suffix(".report.json"),
            *(folder / "report.json" for folder in self.path.resolve().parents[:2]),
        ]
        path = named or next((place for place in places if place.is_file()), None)
        if path is None:
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(f"{path}: no report of report.py") from None
        models = content.get("models", []) if isinstance(content, dict) else None
        if not isinstance(models, list) or not all(isinstance(model, dict) and "name" in model for model in models):
            raise UserError(f"{path}: no report of report.py")
        return content
