"""Convert a checkpoint file of fairseq, unilm, s3prl or a released student, without any of their packages.

python convert_from_checkpoint.py --checkpoint hubert_base_ls960.pt
python convert_from_checkpoint.py --checkpoint student.ckpt --config student.yaml
python convert_from_checkpoint.py --checkpoint distilhubert.ckpt
"""

import logging
from collections import Counter
from pathlib import Path
from typing import Literal

from distillation.commandline import command_of
from distillation.errors import UserError
from distillation.yamlfile import read_yaml
from wav2vec2.checkpoint import model_from_state
from wav2vec2.importers import Source, check_replaced, load_pickled, naming, recognise, save_imported

logger = logging.getLogger("convert")

MAX_YAML_BYTES = 20_000  # the released files have under 4,000


def convert(
    checkpoint: Path,
    config: Path | None = None,
    out: Path | None = None,
    normalize: Literal["auto", "yes", "no"] = "auto",
) -> None:
    """Convert a checkpoint to a .pth file, without running its pickle; what it holds says which kind it is.

    Every tensor of the file is used exactly once or named as dropped. A student's heads of training are kept beside the
    model, so that recipes with the same objective can go on with them. The file names its source; a file of another one
    is not replaced.

    Args:
        checkpoint: a .pt file with HuBERT (ContentVec's legacy files too) or wav2vec 2.0 in fairseq's old (args) or new
            (cfg) layout, UniSpeech or UniSpeech-SAT of Microsoft, or WavLM of unilm; fine-tuned ones lose their head.
            Or the .ckpt file of FitHuBERT, FitW2V2, MaskHuBERT, ARMHuBERT, ARMwavLM, STaRHuBERT, or of DistilHuBERT in
            s3prl.
        config: for a released student, the .yaml file published or written beside it.
        out: the file; by default pretrained/NAME.fairseq.pth, pretrained/NAME.student.pth for a student.
        normalize: give the waveform zero mean and unit variance; auto does what the model was trained with.
    """
    content = load_pickled(checkpoint)
    with naming(checkpoint):
        layout = recognise(content)
    logger.info("%s is %s", checkpoint, layout.name)
    if layout.has_settings and config is None:
        raise UserError(f"{checkpoint} is {layout.name}: give the .yaml file published beside it by --config")
    if config is not None and not layout.has_settings:
        raise UserError(f"{checkpoint} is {layout.name}, which holds its own settings: leave --config out")
    settings = None if config is None else read_yaml(config, MAX_YAML_BYTES, "the settings of a student", aliases=False)
    files = [checkpoint] if config is None else [checkpoint, config]
    out = Path("pretrained") / f"{checkpoint.stem}.{layout.suffix}.pth" if out is None else out
    check_replaced(out, str(checkpoint), files)
    source = " with ".join(map(str, files))
    with naming(source):
        imported = layout.read(content, settings, None if normalize == "auto" else normalize == "yes")
    if imported.dropped:
        parts = Counter(name.split(".")[0] for name in imported.dropped)
        last = {name.split(".")[0]: name for name in imported.dropped}
        named = ", ".join(f"{part}.* ({n} tensors)" if n > 1 else last[part] for part, n in parts.items())
        logger.info("dropped from %s: %s", checkpoint, named)
    model = model_from_state(imported.config, imported.state_dict, source=source)
    save_imported(out, imported, model, Source.of(str(checkpoint), files))


main = command_of(convert, __doc__)

if __name__ == "__main__":
    main()
