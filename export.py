"""Write a model in another format, and run it there against PyTorch before it is kept.

    python export.py final.pth --to hf [--native] [--out DIR]  for transformers, with its own code
    python export.py final.pth --to onnx [--last] [--quantize int8] [--out FILE]
    python export.py exp/ctc/final.pth --to onnx-asr [--quantize int8] [--out DIR]  a fine-tuned one, for onnx-asr
    python export.py final.pth --to torch-export [--last] [--out FILE]
    python export.py final.pth --to executorch [--last] [--max_seconds 30] [--out FILE]  for phones
    python export.py final.pth --to safetensors [--out FILE]

Whatever differs from PyTorch by more than 1e-4 (of a layer's largest value where that exceeds 1), between 0.05 s and
35 s, padded or not, is not kept; int8 is reported. A safetensors file must hold the same weights bit for bit.
--native writes HubertModel or WavLMModel of transformers, without code; one with a group norm is compared unpadded
alone, since padding changes what transformers computes there.
"""

import dataclasses
from importlib import import_module
from pathlib import Path

from distillation.commandline import make_parser, parse_arguments
from distillation.errors import UserError, command
from exporting.folders import require_place
from exporting.formats import FORMATS
from exporting.source import ExportOptions, Source
from wav2vec2.hub import FOLDER_FILES


def run(model: Path, to: str, out: Path | None, options: ExportOptions) -> None:
    """Export; the arguments are the flags."""
    format = FORMATS[to]
    for field in dataclasses.fields(options):
        flag, value = field.name, getattr(options, field.name)
        if value != field.default and flag not in format.flags:
            takes = " or ".join(name for name, other in FORMATS.items() if flag in other.flags)
            raise UserError(f"--{flag}{'' if value is True else f' {value}'}: only with --to {takes}")
    suffix = (f".{options.quantize}" if options.quantize else "") + format.suffix
    out = out or model.with_suffix(suffix)
    if not format.is_folder and out.suffix != format.suffix:
        raise UserError(f"--out {out}: its name must end in {format.suffix}")
    if out.resolve() in (file.resolve() for file in (model, *(model / name for name in FOLDER_FILES))):
        raise UserError(f"--out {out}: is the model itself; name another file with --out")
    require_place(out, format.is_folder)
    place = out.resolve() if format.is_folder else out  # the card has its name, which "." would not be
    done = import_module(format.module).export(Source.read(model), place, options)
    words = f" ({done.words})" if done.words else ""
    print(f"max difference from PyTorch {done.difference:.1e} -> {out}{words}")


@command
def main() -> None:
    """Parse the command line and run."""
    parser = make_parser(__doc__)
    parser.add_argument("model", type=Path, help="Model to export, .pth or .safetensors.")
    parser.add_argument("--to", choices=list(FORMATS), required=True, help="Format.")
    parser.add_argument("--out", type=Path | None, help="File or folder to write. (default: beside the model)")
    parser.add_argument("--last", action="store_true", help="Give the last layer alone, not all L + 1 states.")
    parser.add_argument("--native", action="store_true", help="With --to hf: transformers' own class, no code.")
    parser.add_class_arguments(ExportOptions, as_group=False, skip={"last", "native"})
    arguments = vars(parse_arguments(parser))
    options = ExportOptions(**{f.name: arguments.pop(f.name) for f in dataclasses.fields(ExportOptions)})
    run(options=options, **arguments)


if __name__ == "__main__":
    main()
