"""Convert the released students FitHuBERT, ARMHuBERT, MaskHuBERT and STaRHuBERT: a .ckpt and its .yaml."""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml

from distillation.commandline import make_parser, parse_arguments
from distillation.errors import UserError, command
from distillation.students import backbone_params
from wav2vec2.checkpoint import model_from_state, save_model
from wav2vec2.importers import load_pickled, naming
from wav2vec2.importers.students import import_student

logger = logging.getLogger("convert")

MAX_YAML_BYTES = 20_000  # the released files have under 4,000


def convert(checkpoint: Path, config: Path, out: Path | None = None) -> None:
    """Convert a released student to a .pth file, without running its pickle; needs neither fairseq nor s3prl.

    Every tensor of the file is used exactly once or named as dropped. The heads of training are kept beside the model,
    so that recipes with the same objective can go on with them.

    Args:
        checkpoint: the .ckpt file of FitHuBERT, FitW2V2, MaskHuBERT, ARMHuBERT, ARMwavLM or STaRHuBERT.
        config: the .yaml file published or written beside it.
        out: the file; by default pretrained/NAME.student.pth.
    """
    out = out or Path("pretrained") / f"{checkpoint.stem}.student.pth"
    source = f"{checkpoint} with {config}"
    settings = read_settings(config)
    content = load_pickled(checkpoint)
    with naming(source):
        imported = import_student(content, settings)
    if imported.dropped:
        parts = Counter(name.split(".")[0] for name in imported.dropped)
        named = ", ".join(f"{part}.* ({number} tensors)" for part, number in parts.items())
        logger.info("dropped from %s: %s", checkpoint, named)
    model = model_from_state(imported.config, imported.state_dict, source=source)
    with torch.no_grad():
        output, _ = model(torch.randn(1, 16_000))
    if not all(tensor.isfinite().all() for tensor in (output, *imported.heads.values())):
        raise UserError(f"{checkpoint}: the converted model gives values that are not finite; nothing saved")
    if "encoder_reuse_attention" in imported.config:
        logger.warning(
            "the released code puts reused attention maps through a second softmax, this toolkit reuses them as they "
            "are: the layers from 2 on differ from the released model's until it is trained further"
        )
    save_model(out, model, imported.heads)
    logger.info(
        "%s: %s parameters and %s in heads, %d layers; %d tensors used once, %d dropped",
        out,
        f"{backbone_params(model):,}",
        f"{sum(head.numel() for head in imported.heads.values()):,}",
        model.num_layers,
        len(imported.state_dict) + len(imported.heads),
        len(imported.dropped),
    )


def read_settings(path: Path) -> Any:
    """Content of a YAML file in plain types.

    Raises:
        UserError: no such file, too large a file, not YAML, or YAML with objects or aliases in it.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if path.stat().st_size > MAX_YAML_BYTES:
        raise UserError(f"{path}: over {MAX_YAML_BYTES} bytes, not the settings of a student")
    text = path.read_bytes()
    try:
        # aliases can make a small file unfold to any size
        has_aliases = any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text))
        content = None if has_aliases else yaml.safe_load(text)
    except Exception as error:  # PyYAML's constructors fail in many ways
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if has_aliases:
        raise UserError(f"{path}: has YAML aliases, which the released files have not; refused")
    return content


@command
def main() -> None:
    """Parse the command line and run."""
    parser = make_parser(__doc__)
    parser.add_function_arguments(convert, as_group=False, as_positional=False)
    convert(**vars(parse_arguments(parser)))


if __name__ == "__main__":
    main()
