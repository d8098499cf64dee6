"""The formats that export.py writes: one row each."""

from typing import NamedTuple


class Format(NamedTuple):
    """One row: how the name of what is written ends, and which of ``ExportOptions`` it takes."""

    module: str
    """Has ``export(source, out, options)``; loaded when it is wanted."""
    suffix: str
    flags: tuple[str, ...] = ()
    is_folder: bool = False


FORMATS = {
    "hf": Format("exporting.huggingface", ".hf", ("native", "report"), is_folder=True),
    "onnx": Format("exporting.onnx", ".onnx", ("last", "quantize")),
    "onnx-asr": Format("exporting.onnx_asr", ".onnx-asr", ("quantize",), is_folder=True),
    "torch-export": Format("exporting.graphs", ".pt2", ("last",)),
    "executorch": Format("exporting.executorch", ".pte", ("last", "max_seconds")),
    "safetensors": Format("exporting.weights", ".safetensors"),
}
