"""Files of ExecuTorch for phones: one waveform at a time, its products by XNNPACK.

Shapes: N samples, S states, T frames, D width, V vocabulary; h heads of width E.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as fx_config

from distillation.errors import UserError
from exporting.graphs import unfinished
from exporting.packages import quiet, require_packages
from exporting.source import Exported, ExportOptions, Source
from exporting.verify import ExportedOutputs, require_agreement
from wav2vec2 import Wav2Vec2Model
from wav2vec2.feature_extractor import SAMPLE_RATE
from wav2vec2.kernels import attention_weights

MAX_SECONDS = 30.0  # memory is planned for it
SHORTEST = 1.0  # of --max_seconds: below, sizes of the frames and of the model could be mistaken for each other


def export(source: Source, out: Path, options: ExportOptions) -> Exported:
    """Write the file, and run it in a fresh process with ExecuTorch's own runtime before it is kept.

    Its method ``forward`` takes one waveform [1, N] float32 and gives the states [S, 1, T, D] or the last [1, T, D],
    and logits [1, T, V] where the model has an output layer. It has no lengths: nothing is padded where waveforms come
    alone. The methods ``sample_rate``, ``min_samples`` and ``max_samples`` say what N may be; the runtime refuses more,
    and not always less.

    Raises:
        UserError: a package is missing, or the result differs by more than ``verify.TOLERANCE``.
    """
    require_packages("executorch", "executorch.exir", requirements="requirements/executorch.txt")
    seconds = MAX_SECONDS if options.max_seconds is None else options.max_seconds
    if not seconds >= SHORTEST:  # nor NaN
        raise UserError(f"--max_seconds {seconds:g}: must be at least {SHORTEST:g}")
    outputs = ExportedOutputs(source.model, options.last)
    says = {
        "sample_rate": SAMPLE_RATE,
        "min_samples": _min_samples(source.model),
        "max_samples": round(seconds * SAMPLE_RATE),
    }
    bounds = says["min_samples"] / SAMPLE_RATE, seconds
    with unfinished(out) as made:
        with quiet():
            made.write_bytes(_lower(_trace(outputs, says["min_samples"], says["max_samples"]), says))
        return Exported(require_agreement(outputs, "executorch", made, padded=False, bounds=bounds))


def _min_samples(model: Wav2Vec2Model) -> int:
    """Of two frames in the layers.

    A single one is right, but after it ExecuTorch 1.2.0 may compute something else for the next waveform.
    """
    extractor, frames = model.feature_extractor, 2 * model.encoder.transformer.reduction
    return extractor.receptive_field + (frames - 1) * extractor.frame_shift


def _trace(outputs: ExportedOutputs, min_samples: int, max_samples: int) -> ExportedProgram:
    """The computation for one waveform of that many samples, in operations that XNNPACK has."""
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass

    # the longest is the example: where it is asked which of two sizes is larger, the answer must not lower the bound
    example = (torch.zeros(1, max_samples),)
    shapes = {"waveforms": {1: Dim.DYNAMIC(min=min_samples, max=max_samples)}}
    oblivious = fx_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with torch.no_grad(), oblivious:
        program = torch.export.export(outputs, example, dynamic_shapes=shapes)
        program._guards_code.clear()
        program = program.run_decompositions(
            {
                torch.ops.aten.scaled_dot_product_attention.default: _attend,
                torch.ops.aten.matmul.default: _matmul,
                torch.ops.aten.var_mean.correction: _var_mean,
                torch.ops.aten.pad.default: _pad,
            }
        )
        # the positional convolution's weight is a product of two: XNNPACK takes constants alone
        return constant_prop_pass(program)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False
) -> Tensor:
    """Attention [1, h, T, E]; torch's own also looks for rows that attend to nothing, which XNNPACK does not have."""
    assert dropout_p == 0 and not is_causal
    return _matmul(attention_weights(q, k, attn_mask), v)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Product of a single row's heads [1, h, ...]; torch's own expands the batch, which XNNPACK does not have."""
    if b.dim() == 2:  # of a linear layer
        return torch.mm(a.squeeze(0), b).unsqueeze(0)
    return torch.bmm(a.squeeze(0), b.squeeze(0)).unsqueeze(0)


def _var_mean(x: Tensor, dim: list[int], *, correction: int, keepdim: bool) -> tuple[Tensor, Tensor]:
    """Of a waveform; the operation itself is none that ExecuTorch takes."""
    assert correction == 0 and keepdim
    mean = x.mean(dim, keepdim=True)
    return (x - mean).square().mean(dim, keepdim=True), mean


def _pad(x: Tensor, pad: list[int]) -> Tensor:
    """Frames [1, T, D] of time reduction: the runtime cuts none off, and its convolution leaves them out by itself."""
    return torch.ops.aten.constant_pad_nd(x, [torch.sym_max(size, 0) for size in pad])


def _lower(program: ExportedProgram, says: dict[str, int]) -> bytes:
    """The file; ``says`` are methods that return a constant."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import EdgeCompileConfig, to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(
        program,
        partitioner=[XnnpackPartitioner()],
        constant_methods=says,
        # which the runtime knows, and the check does not
        compile_config=EdgeCompileConfig(_core_aten_ops_exception_list=[torch.sym_max]),  # type: ignore[list-item]
    )
    return lowered.to_executorch().buffer
