"""One file with the whole computation: ONNX, its 8-bit version, and torch.export."""

import contextlib
import logging
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as fx_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from distillation.errors import UserError
from exporting.verify import ExportedOutputs, max_difference, require_agreement
from wav2vec2.feature_extractor import SAMPLE_RATE

logger = logging.getLogger(__name__)
OPSET = 22  # 23 and later have an Attention operator whose mask ONNX Runtime does not broadcast


def export_graph(outputs: ExportedOutputs, to: str, out: Path, int8: bool) -> float:
    """Write the file, and run it in a fresh process against PyTorch before it is kept.

    Inputs ``waveforms`` [B, N] float32 and ``lengths`` [B] int64, any B and N; outputs as in ExportedOutputs.

    Args:
        outputs: dense model in eval mode.
        to: "onnx" or "torch-export".
        out: file to write.
        int8: ONNX only, linear layers in 8 bits with inputs scaled as they come (dynamic quantisation).

    Returns:
        The largest difference.

    Raises:
        UserError: a package is missing, or the result differs by more than ``verify.TOLERANCE`` (int8 may).
    """
    if to == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            _require(package)
    out.parent.mkdir(parents=True, exist_ok=True)
    # the file keeps its name while it is checked: large ONNX models keep their weights in a second file, by name
    folder = Path(tempfile.mkdtemp(prefix=f".{out.stem}.", dir=out.parent))
    try:
        made = folder / out.name
        program = trace(outputs)
        if to == "torch-export":
            torch.export.save(program, made)
            difference = require_agreement(outputs, "torch_export", made)
        elif int8:
            exact = folder / "exact.onnx"
            _save_onnx(program, outputs.names, exact)
            logger.info("float32: max difference %.1e", require_agreement(outputs, "onnx", exact))
            _quantize(exact, made)
            for file in folder.glob("exact.onnx*"):
                file.unlink()
            difference, _ = max_difference(outputs, "onnx", made)
        else:
            _save_onnx(program, outputs.names, made)
            difference = require_agreement(outputs, "onnx", made)
        for file in folder.iterdir():
            file.replace(out.parent / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return difference


def trace(outputs: ExportedOutputs) -> ExportedProgram:
    """The computation for any number of waveforms of any length."""
    example = torch.zeros(2, SAMPLE_RATE), torch.tensor([SAMPLE_RATE, SAMPLE_RATE // 2])
    shapes = {"waveforms": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, "lengths": {0: Dim.DYNAMIC}}
    # fused attention leaves its result in another memory layout on each device; the graph must not depend on that
    # and a size that happens to be 1 (one waveform, one frame) is like any other
    oblivious = fx_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), oblivious:
        program = torch.export.export(outputs, example, dynamic_shapes=shapes)
    # what is left of such guards would refuse one frame after time reduction, which the check runs
    program._guards_code.clear()
    return program


@contextlib.contextmanager
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
