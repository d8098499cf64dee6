"""Write a model in another format, and run it there against PyTorch before it is kept.

    python export.py final.pth --to hf [--native] [--out DIR]  for transformers, with its own code
    python export.py final.pth --to onnx [--last] [--quantize int8] [--out FILE]
    python export.py final.pth --to torch-export [--last] [--out FILE]
    python export.py final.pth --to safetensors [--out FILE]

Whatever differs from PyTorch by more than 1e-4 (of a layer's largest value where that exceeds 1), between 0.05 s and
35 s, padded or not, is not kept; int8 is reported. A safetensors file must hold the same weights bit for bit.
--native writes HubertModel or WavLMModel of transformers, without code; one with a group norm is compared unpadded
alone, since padding changes what transformers computes there.
"""

import json
from pathlib import Path
from typing import Any, Literal

from distillation.commandline import make_parser, parse_arguments
from distillation.errors import UserError, command
from exporting.verify import ExportedOutputs
from wav2vec2 import Wav2Vec2Model, load_model, prune, save_model
from wav2vec2.checkpoint import fingerprint, load_checkpoint

SUFFIXES = {"hf": ".hf", "onnx": ".onnx", "torch-export": ".pt2", "safetensors": ".safetensors"}


def run(
    model: Path,
    to: str,
    out: Path | None,
    last: bool,
    quantize: Literal["int8"] | None,
    report: Path | None,
    native: bool = False,
) -> None:
    """Export; the arguments are the flags."""
    if quantize and to != "onnx":
        raise UserError(f"--quantize {quantize}: only with --to onnx")
    if last and to not in ("onnx", "torch-export"):
        raise UserError(f"--last: only with --to onnx or torch-export; {to} keeps every layer")
    if native and to != "hf":
        raise UserError("--native: only with --to hf")
    out = out or model.with_suffix((f".{quantize}" if quantize else "") + SUFFIXES[to])
    if to != "hf" and out.suffix != SUFFIXES[to]:
        raise UserError(f"--out {out}: its name must end in {SUFFIXES[to]}")
    checkpoint = load_checkpoint(model)
    network = checkpoint.model
    if network.masks():  # the masked network is the pruned one, and other formats have no masks
        network = prune(network)[0].eval()
    words = ""
    if to == "safetensors":
        save_model(out, network, checkpoint.heads, **checkpoint.extra)
        if fingerprint(load_model(out)) != fingerprint(network):
            out.unlink()
            raise UserError(f"{out}: does not hold the model's weights when read back; not kept")
        difference = 0.0
    elif to == "hf":
        from exporting.huggingface import export_huggingface

        vocabulary = _vocabulary(model, network, checkpoint.extra)
        difference, kind = export_huggingface(network, out, vocabulary, model, _read_report(model, report), native)
        words = f" ({kind})"
    else:
        from exporting.graphs import export_graph

        difference = export_graph(ExportedOutputs(network, last), to, out, quantize is not None)
    print(f"max difference from PyTorch {difference:.1e} -> {out}{words}")


def _vocabulary(path: Path, model: Wav2Vec2Model, extra: dict[str, Any]) -> list[str] | None:
    vocabulary = extra.get("vocabulary")
    if model.aux is None:
        return None
    if not isinstance(vocabulary, list) or len(set(map(str, vocabulary))) != model.aux.out_features:
        raise UserError(f"{path}: has an output layer but no vocabulary for it; fine-tune with finetune_ctc.py")
    return [str(token) for token in vocabulary]


def _read_report(model: Path, report: Path | None) -> dict[str, Any] | None:
    """The named report, or that of the run that made the model: beside it, or one folder up."""
    places = [model.with_suffix(".report.json"), *(folder / "report.json" for folder in model.resolve().parents[:2])]
    path = report or next((place for place in places if place.is_file()), None)
    if path is None:
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{path}: no report of report.py") from None
    models = content.get("models", []) if isinstance(content, dict) else None
    if not isinstance(models, list) or not all(isinstance(model, dict) and "name" in model for model in models):
        raise UserError(f"{path}: no report of report.py")
    return content


@command
def main() -> None:
    """Parse the command line and run."""
    parser = make_parser(__doc__)
    parser.add_argument("model", type=Path, help="Model to export, .pth or .safetensors.")
    parser.add_argument("--to", choices=list(SUFFIXES), required=True, help="Format.")
    parser.add_argument("--out", type=Path | None, help="File or folder to write. (default: beside the model)")
    parser.add_argument("--last", action="store_true", help="Give the last layer alone, not all L + 1 states.")
    parser.add_argument("--quantize", choices=["int8"], help="Linear layers in 8 bits, inputs scaled as they come.")
    parser.add_argument("--report", type=Path | None, help="Fills the model card. (default: report.json of the run)")
    parser.add_argument("--native", action="store_true", help="With --to hf: transformers' own class, no code.")
    run(**vars(parse_arguments(parser)))


if __name__ == "__main__":
    main()
