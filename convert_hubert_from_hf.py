"""Convert a teacher: HuBERT, wav2vec 2.0, WavLM or UniSpeech of transformers (any size), or a torchaudio pipeline."""

import logging
from pathlib import Path
from typing import Literal

from distillation.commandline import make_parser, parse_arguments
from distillation.errors import command
from distillation.originals import find_vocabulary
from exporting.originals import read_huggingface, read_torchaudio
from wav2vec2.checkpoint import fingerprint
from wav2vec2.importers import Source, check_replaced, converted_file, save_imported
from wav2vec2.importers.folder import locate_folder, model_files
from wav2vec2.importers.source import TORCHAUDIO

logger = logging.getLogger("convert")


def convert(
    model: str = "facebook/hubert-base-ls960",
    out: Path | None = None,
    normalize: Literal["auto", "yes", "no"] = "auto",
    ctc: bool = False,
) -> None:
    """Convert a teacher to a .pth file and prove that it computes the same as the original.

    Random waveforms go through both, alone and as a padded batch. Nothing is saved when any layer differs by more than
    1e-4 (times the layer's largest value where that exceeds 1). The file names its source; a file of another one is not
    replaced.

    Args:
        model: hub id or local folder of a transformers model (hubert, wav2vec2, wavlm, unispeech, unispeech-sat;
            fine-tuned ones lose their head without --ctc), or torchaudio:NAME for a bundle of torchaudio.pipelines, as
            torchaudio:WAVLM_BASE_PLUS.
        out: the file; by default pretrained/NAME.hf.pth, pretrained/NAME.torchaudio.pth for a bundle.
        normalize: give the waveform zero mean and unit variance; auto does what the model was trained with: yes for
            models with a layer-norm extractor (Large), no for those with a group norm (Base).
        ctc: keep the output layer of a model fine-tuned with CTC, and its vocabulary.
    """
    out = converted_file(model) if out is None else out
    check_replaced(out, model, model_files(Path(model)), ctc)
    wanted = None if normalize == "auto" else normalize == "yes"
    vocabulary = find_vocabulary(model) if ctc else None  # refused before the weights are fetched
    if model.startswith(TORCHAUDIO):
        imported, converted = read_torchaudio(model, wanted, vocabulary)
        source = Source(model, None, fingerprint(converted))
    else:
        folder = locate_folder(model)
        imported, converted = read_huggingface(folder, wanted, vocabulary)
        source = Source.of(model, model_files(folder))
    if imported.dropped:
        logger.info("dropped the head of %s: %s", model, ", ".join(sorted(imported.dropped)))
    save_imported(out, imported, converted, source)


@command
def main() -> None:
    """Parse the command line and convert."""
    parser = make_parser(__doc__)
    parser.add_function_arguments(convert, as_group=False, as_positional=False, skip={"ctc"})
    text = "Keep the output layer of a model fine-tuned with CTC, and its vocabulary."
    parser.add_argument("--ctc", action="store_true", help=text)
    convert(**vars(parse_arguments(parser)))


if __name__ == "__main__":
    main()
