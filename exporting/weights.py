"""The weights alone, in a safetensors file with the config in its header."""

from pathlib import Path

from distillation.errors import UserError
from exporting.folders import unfinished_file
from exporting.source import Exported, ExportOptions, Source
from wav2vec2 import load_model, save_model
from wav2vec2.checkpoint import fingerprint


def export(source: Source, out: Path, options: ExportOptions) -> Exported:
    """Write the file and read it back.

    Raises:
        UserError: it does not hold the same weights bit for bit; it is not kept.
    """
    with unfinished_file(out) as made:
        save_model(made, source.model, source.checkpoint.heads, **source.checkpoint.extra)
        if fingerprint(load_model(made)) != fingerprint(source.model):
            raise UserError(f"{out}: does not hold the model's weights when read back; not kept")
    return Exported(0.0)
