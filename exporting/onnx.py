"""ONNX files of a model, in float32 and in 8 bits."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from exporting import graphs
from exporting.folders import unfinished_file
from exporting.packages import quiet, require_packages
from exporting.source import Exported, ExportOptions, Source
from exporting.verify import ExportedOutputs, max_difference, require_agreement
from wav2vec2.feature_extractor import SAMPLE_RATE
from wav2vec2.kernels import forms_in_graphs

if TYPE_CHECKING:
    import onnx_ir as ir

logger = logging.getLogger(__name__)
OPSET = 22  # 23 and later have an Attention operator whose mask ONNX Runtime does not broadcast
PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # that writing and trying a file take
VERSION = "2"  # of the inputs, outputs and metadata of a file
MAX_BYTES = 2**31 - 2**20  # of a file of ONNX, with some room for the graph


def export(source: Source, out: Path, options: ExportOptions) -> Exported:
    """Write the file, and run it in a fresh process against PyTorch before it is kept.

    Inputs ``waveforms`` [B, N] float32 and ``lengths`` [B] int64, any B, N of a frame at least and no length above it;
    outputs as in ExportedOutputs.

    Raises:
        UserError: a package is missing, or the result differs by more than ``verify.TOLERANCE`` (int8 may).
    """
    require_packages("onnx", *PACKAGES)
    outputs = ExportedOutputs(source.model, options.last)
    shortest = source.model.feature_extractor.receptive_field
    with unfinished_file(out) as made:
        model = convert(outputs, shortest)
        save(model, made)
        difference = require_agreement(outputs, "onnx", made)
        if options.quantize:
            logger.info("float32: max difference %.1e", difference)
            for file in made.parent.iterdir():
                file.unlink()
            quantize(model)
            save(model, made)
            difference = max_difference(outputs, "onnx", made)[0]
    return Exported(difference)


def convert(outputs: ExportedOutputs, shortest: int = 0) -> "ir.Model":
    """The graph in float32.

    Args:
        outputs: of which model.
        shortest: samples that waveforms must have at least.
    """
    from exporting import onnx_graphs, onnx_operators

    with forms_in_graphs(["folded_norm"]):
        program = graphs.trace(outputs)
    with quiet():
        made = torch.onnx.export(
            program, dynamo=True, opset_version=OPSET, input_names=["waveforms", "lengths"],
            output_names=outputs.names, custom_translation_table=onnx_operators.TABLE, verbose=False,
        )  # fmt: skip
        assert made is not None
        onnx_graphs.tidy(made.model)
    onnx_graphs.check_inputs(made.model, shortest)
    onnx_graphs.name_sizes(made.model)
    extractor = outputs.model.feature_extractor
    made.model.metadata_props.update({
        "producer": "wav2vec2-compressed",
        "version": VERSION,
        "sample_rate": str(SAMPLE_RATE),
        "samples_per_frame": str(extractor.frame_shift),
        "samples_of_first_frame": str(extractor.receptive_field),
        "parameters": str(sum(p.numel() for p in outputs.model.parameters())),
    })  # fmt: skip
    return made.model


def quantize(model: "ir.Model") -> None:
    """Write products in 8 bits, in place."""
    from exporting import quantization

    quantization.quantize(model)
    model.metadata_props["quantization"] = "int8"


def save(model: "ir.Model", out: Path) -> None:
    """Write the file; weights that do not fit one of ONNX lie beside it."""
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    ir.save(model, out, external_data=f"{out.name}.data" if size > MAX_BYTES else None)
