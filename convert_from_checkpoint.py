"""Convert a checkpoint file of fairseq, unilm, s3prl or a released student, without any of their packages.

python convert_from_checkpoint.py --checkpoint hubert_base_ls960.pt
python convert_from_checkpoint.py --checkpoint student.ckpt --config student.yaml
python convert_from_checkpoint.py --checkpoint distilhubert.ckpt
python convert_from_checkpoint.py --checkpoint hubert_large_ll60k_finetune_ls960.pt --ctc_dict dict.ltr.txt
"""

import logging
from collections import Counter
from pathlib import Path
from typing import Literal

from distillation.commandline import command_of
from distillation.errors import UserError
from distillation.yamlfile import read_yaml
from wav2vec2.checkpoint import model_from_state
from wav2vec2.importers import Source, check_replaced, keep_head, load_pickled, naming, recognise, save_imported
from wav2vec2.importers.vocabulary import FAIRSEQ_HEAD, read_dictionary

logger = logging.getLogger("convert")

MAX_YAML_BYTES = 20_000  # the released files have under 4,000


def convert(
    checkpoint: Path,
    config: Path | None = None,
    out: Path | None = None,
    normalize: Literal["auto", "yes", "no"] = "auto",
    ctc_dict: Path | None = None,
) -> None:
    """Convert a checkpoint to a .pth file, without running its pickle; what it holds says which kind it is.

    Every tensor of the file is used exactly once or named as dropped. A student's heads of training are kept beside the
    model, so that recipes with the same objective can go on with them. The file names its source; a file of another one
    is not replaced.

    Args:
        checkpoint: a .pt file with HuBERT (ContentVec's legacy files too) or wav2vec 2.0 in fairseq's old (args) or new
            (cfg) layout, UniSpeech or UniSpeech-SAT of Microsoft, or WavLM of unilm; fine-tuned ones lose their head
            without --ctc_dict. Or the .ckpt file of FitHuBERT, FitW2V2, MaskHuBERT, ARMHuBERT, ARMwavLM, STaRHuBERT, or
            of DistilHuBERT in s3prl.
        config: for a released student, the .yaml file published or written beside it.
        out: the file; by default pretrained/NAME.fairseq.pth, pretrained/NAME.student.pth for a student.
        normalize: give the waveform zero mean and unit variance; auto does what the model was trained with.
        ctc_dict: keep the output layer of a model that fairseq fine-tuned with CTC, and its vocabulary: the dictionary
            that it was trained with, such as dict.ltr.txt.
    """
    vocabulary = None if ctc_dict is None else read_dictionary(ctc_dict)
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
    check_replaced(out, str(checkpoint), files, ctc=vocabulary is not None)
    source = " with ".join(map(str, files))
    with naming(source):
        imported = layout.read(content, settings, None if normalize == "auto" else normalize == "yes")
        if vocabulary is not None:
            with naming(f"--ctc_dict {ctc_dict}"):
                imported = keep_head(imported, content.get("model", {}), FAIRSEQ_HEAD, vocabulary)
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
