"""Convert the original .pt files: HuBERT and wav2vec 2.0 of fairseq, WavLM of unilm. Needs neither package."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal

import torch

from distillation.commandline import make_parser, parse_arguments
from distillation.errors import UserError, command
from wav2vec2.checkpoint import model_from_state, save_model
from wav2vec2.importers import import_fairseq, load_pickled, naming

logger = logging.getLogger("convert")


def convert(checkpoint: Path, out: Path | None = None, normalize: Literal["auto", "yes", "no"] = "auto") -> None:
    """Convert a .pt file of fairseq or unilm to a .pth file, without running its pickle.

    Every tensor of the file is used exactly once or named as a dropped head.

    Args:
        checkpoint: HuBERT or wav2vec 2.0 in fairseq's old (args) or new (cfg) layout, or WavLM; fine-tuned ones lose
            their head.
        out: the file; by default pretrained/NAME.fairseq.pth.
        normalize: give the waveform zero mean and unit variance; auto does what the checkpoint's task says.
    """
    out = out or Path("pretrained") / f"{checkpoint.stem}.fairseq.pth"
    content = load_pickled(checkpoint)
    with naming(checkpoint):
        imported = import_fairseq(content, None if normalize == "auto" else normalize == "yes")
    if imported.dropped:
        logger.info("dropped the heads of %s: %s", checkpoint, ", ".join(sorted(imported.dropped)))
    model = model_from_state(imported.config, imported.state_dict, source=checkpoint)
    with torch.no_grad():
        output, _ = model(torch.randn(1, 16_000))
    if not output.isfinite().all():
        raise UserError(f"{checkpoint}: the converted model gives values that are not finite; nothing saved")
    extra: dict[str, Any] = {} if imported.mask_embedding is None else {"mask_embedding": imported.mask_embedding}
    save_model(out, model, **extra)
    num_params = sum(parameter.numel() for parameter in model.parameters())
    used = len(imported.state_dict) + (imported.mask_embedding is not None)
    logger.info(
        "%s: %s parameters, %d layers; %d tensors used once, %d dropped",
        out,
        f"{num_params:,}",
        model.num_layers,
        used,
        len(imported.dropped),
    )


@command
def main() -> None:
    """Parse the command line and run."""
    parser = make_parser(__doc__)
    parser.add_function_arguments(convert, as_group=False, as_positional=False)
    convert(**vars(parse_arguments(parser)))


if __name__ == "__main__":
    main()
