"""Fine-tune a model to write down speech: characters, CTC, no lexicon and no language model.

    python finetune_ctc.py final.pth --train LibriSpeech/train-clean-100 --valid LibriSpeech/dev-clean --exp_dir E

Transcripts are LibriSpeech or Kaldi folders, Common Voice's .tsv, JSON lines as NeMo writes them, or lines of
path<TAB>text; what cannot be used is listed in E/left_out.tsv. First the output layer alone learns, then all above the
convolutions. Leaves E/final.pth, which holds its vocabulary (export.py --to hf or onnx-asr makes a recogniser of it),
E/metrics.csv and E/results.json. Run again to resume.
"""

import dataclasses

from distillation.commandline import add_continue_flag, make_parser, parse_arguments
from distillation.errors import command
from finetuning.config import FinetuneConfig, FinetuneRun


@command
def main() -> None:
    """Parse the command line, run, print the error rates."""
    parser = make_parser(__doc__)
    parser.add_argument("model", type=str, help="Model: .pth, .safetensors, a folder of export.py, or a hub id.")
    parser.add_class_arguments(FinetuneRun, as_group=False, skip={"model", "config", "continue_with_changes"})
    parser.add_class_arguments(FinetuneConfig, as_group=False)
    add_continue_flag(parser)
    flags = vars(parse_arguments(parser))
    config = FinetuneConfig(**{field.name: flags.pop(field.name) for field in dataclasses.fields(FinetuneConfig)})
    run = FinetuneRun(config=config, **flags)
    from finetuning.training import finetune  # Lightning takes seconds: not for --help

    results = finetune(run)
    print(", ".join(f"{name.replace('_', ' ').upper()} {value:.2f} %" for name, value in results.items()))


if __name__ == "__main__":
    main()
