"""Convert a teacher: HuBERT, wav2vec 2.0 or WavLM of transformers (any size), or a torchaudio pipeline."""

import logging
from pathlib import Path
from typing import Literal

from distillation.commandline import command_of
from exporting.originals import TORCHAUDIO, read_huggingface, read_torchaudio
from wav2vec2.importers import save_imported

logger = logging.getLogger("convert")


def convert(
    model: str = "facebook/hubert-base-ls960", out: Path | None = None, normalize: Literal["auto", "yes", "no"] = "auto"
) -> None:
    """Convert a teacher to a .pth file and prove that it computes the same as the original.

    Random waveforms go through both, alone and as a padded batch. Nothing is saved when any layer differs by more than
    1e-4 (times the layer's largest value where that exceeds 1).

    Args:
        model: hub id or local folder of a transformers model (hubert, wav2vec2, wavlm; fine-tuned ones lose their
            head), or torchaudio:NAME for a bundle of torchaudio.pipelines such as torchaudio:WAVLM_BASE_PLUS.
        out: the file; by default pretrained/NAME.hf.pth, pretrained/NAME.torchaudio.pth for a bundle.
        normalize: give the waveform zero mean and unit variance; auto does what the model was trained with: yes for
            models with a layer-norm extractor (Large), no for those with a group norm (Base).
    """
    bundle = model.startswith(TORCHAUDIO)
    name = Path(model.removeprefix(TORCHAUDIO)).resolve().name
    wanted = None if normalize == "auto" else normalize == "yes"
    imported, converted = read_torchaudio(name, wanted) if bundle else read_huggingface(model, wanted)
    if imported.dropped:
        logger.info("dropped the head of %s: %s", model, ", ".join(sorted(imported.dropped)))
    out = out or Path("pretrained") / f"{name}.{'torchaudio' if bundle else 'hf'}.pth"
    save_imported(out, imported, converted, model)


main = command_of(convert, __doc__)

if __name__ == "__main__":
    main()
