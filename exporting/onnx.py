"""ONNX files of a model, in float32 and in 8 bits."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.export import ExportedProgram

from distillation.errors import UserError
from exporting import graphs
from exporting.source import Exported, ExportOptions, Source
from exporting.verify import ExportedOutputs, max_difference, require_agreement

logger = logging.getLogger(__name__)
OPSET = 22  # 23 and later have an Attention operator whose mask ONNX Runtime does not broadcast


def export(source: Source, out: Path, options: ExportOptions) -> Exported:
    """Write the file, and run it in a fresh process against PyTorch before it is kept.

    Inputs ``waveforms`` [B, N] float32 and ``lengths`` [B] int64, any B and N; outputs as in ExportedOutputs.

    Raises:
        UserError: a package is missing, or the result differs by more than ``verify.TOLERANCE`` (int8 may).
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        _require(package)
    outputs = ExportedOutputs(source.model, options.last)
    with graphs.unfinished(out) as made:
        if not options.quantize:
            _save_onnx(graphs.trace(outputs), outputs.names, made)
            return Exported(require_agreement(outputs, "onnx", made))
        exact = made.with_name("exact.onnx")
        _save_onnx(graphs.trace(outputs), outputs.names, exact)
        logger.info("float32: max difference %.1e", require_agreement(outputs, "onnx", exact))
        _quantize(exact, made)
        for file in made.parent.glob("exact.onnx*"):
            file.unlink()
        return Exported(max_difference(outputs, "onnx", made)[0])


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what exporters log of their own doings: what a user must know is logged here."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _save_onnx(program: ExportedProgram, names: list[str], path: Path) -> None:
    with _quiet():
        made = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=["waveforms", "lengths"], output_names=names,
            verbose=False,
        )  # fmt: skip
    assert made is not None
    made.save(path)


def _quantize(source: Path, out: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _quiet():
        quantize_dynamic(
            source, out, op_types_to_quantize=["MatMul", "Gemm"], weight_type=QuantType.QInt8, per_channel=True
        )


def _require(package: str) -> None:
    try:
        __import__(package)
    except ImportError:
        raise UserError(f"--to onnx needs the package {package}: pip install -r requirements/export.txt") from None
