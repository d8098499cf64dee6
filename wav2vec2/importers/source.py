"""What a converted model was made from: named in its file, so that nobody trains with another teacher unawares."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wav2vec2.checkpoint import CheckpointError, load_checkpoint
from wav2vec2.vocabulary import VOCABULARY

SOURCE = "source"  # entry of a converted file
TORCHAUDIO = "torchaudio:"  # before the name of a bundle of torchaudio.pipelines


@dataclass(frozen=True)
class Source:
    """What a model was converted from; as a string, for messages.

    Attributes:
        id: hub id, torchaudio:NAME, or the local folder or file; what is given by an absolute path has its name alone.
        revision: commit on the hub; None where it is not known.
        sha256: of the files that were read, or of the model that a bundle of torchaudio gives.
    """

    id: str
    revision: str | None
    sha256: str

    @classmethod
    def of(cls, model: str, files: Sequence[Path]) -> "Source":
        """A model that was read from files.

        Args:
            model: as the user named it.
            files: at least one; in the cache of the hub their folder is named after the commit.
        """
        folder = files[0].absolute().parent
        is_commit = folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name)
        return cls(source_id(model), folder.name if is_commit else None, _digest(files))

    @classmethod
    def read(cls, extra: Mapping[str, Any]) -> "Source | None":
        """What the further entries of a converted file say; None where they say nothing, as in released files."""
        entry = extra.get(SOURCE)
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), str):
            return None
        revision = entry.get("revision")
        return cls(entry["id"], None if revision is None else str(revision), str(entry.get("sha256")))

    def entry(self) -> dict[str, str | None]:
        """What goes into the file."""
        return asdict(self)

    def __str__(self) -> str:
        return self.id if self.revision is None else f"{self.id} at {self.revision[:7]}"

    def difference(self, model: str, files: Sequence[Path]) -> str | None:
        """In words, how a model is another than this one; None where it is the same.

        Args:
            model: as the user names it now.
            files: of it, where they are local: content counts then, not where it lies. Else the id counts.
        """
        if self.sha256 == _digest(files) if files else self.id == source_id(model):
            return None
        changed = "which has changed since, or was another of this name"
        return f"was converted from {self}, {changed if self.id == source_id(model) else f'not from {model}'}"


def source_id(model: str) -> str:
    """The name under which a file remembers a source: without the folders of one machine."""
    path = Path(model)
    return path.name if path.is_absolute() else str(path)


def converted_file(model: str) -> Path:
    """The file that a teacher is converted to unless another is named.

    Args:
        model: hub id or local folder of a transformers model, or torchaudio:NAME.
    """
    kind = "torchaudio" if model.startswith(TORCHAUDIO) else "hf"
    return Path("pretrained") / f"{Path(model.removeprefix(TORCHAUDIO)).resolve().name}.{kind}.pth"


def check_replaced(out: Path, model: str, files: Sequence[Path], ctc: bool) -> None:
    """Look that a conversion replaces no model of another source.

    Args:
        out: the file to be written; what is no converted model, or names no source, may be replaced.
        model: to convert, as the user names it.
        files: of it, where they are local.
        ctc: keep its output layer. The same source makes two models, with it and without.

    Raises:
        CheckpointError: the file holds another model.
    """
    try:
        extra = load_checkpoint(out).extra
    except CheckpointError:  # not there, or damaged
        return
    if (recorded := Source.read(extra)) is None:
        return
    difference = recorded.difference(model, files)
    if difference is None and (VOCABULARY in extra) != ctc:
        difference = f"was converted {'without' if ctc else 'with'} the output layer of {recorded}"
    if difference is not None:
        raise CheckpointError(f"{out} {difference}: give another file by --out, or remove this one first")


def _digest(files: Sequence[Path]) -> str:
    """SHA-256 over those of the files, whatever their names."""
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
