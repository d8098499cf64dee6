"""Files of ExecuTorch for phones: one waveform at a time, its products by XNNPACK.

Shapes: N samples, S states, T frames, D width, V vocabulary; h heads of width E.
"""

from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as fx_config

from distillation.errors import UserError
from exporting.folders import unfinished_file
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
    alone. The methods ``sample_rate``, ``min_samples`` and ``max_samples`` say what N may be; all else is an error.

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
    with unfinished_file(out) as made:
        with quiet():
            made.write_bytes(_lower(_trace(outputs, says["min_samples"], says["max_samples"]), says))
        return Exported(require_agreement(outputs, "executorch", made, padded=False, bounds=bounds))


def _min_samples(model: Wav2Vec2Model) -> int:
    """Of one frame; of two in the layers where WavLM's bias is gated.

    Where the first waveform of a loaded file has a single one there, ExecuTorch 1.2.0 writes over other memory at more
    frames; after a longer first one nothing is wrong. Probably memory is planned once, and a product may take the place
    of an input of its size: in a single frame the gate [1, h, T, 1] is as large as the bias [h, T, T].
    """
    extractor, transformer = model.feature_extractor, model.encoder.transformer
    frames = 1 if transformer.position_block() is None else 2 * transformer.reduction
    return extractor.receptive_field + (frames - 1) * extractor.frame_shift


class Checked(torch.nn.Module):
    """Outputs of a graph that ends with an error where a waveform is too short; checks of torch are left out of files.

    Args:
        outputs: for whole waveforms.
        min_samples: that a waveform must have.
    """

    def __init__(self, outputs: ExportedOutputs, min_samples: int) -> None:
        super().__init__()
        self.outputs, self.min_samples = outputs, min_samples

    def forward(self, waveforms: Tensor) -> tuple[Tensor, ...]:
        """As in ExportedOutputs."""
        needed = waveforms.select(1, self.min_samples - 1)  # fails where there is none
        return self.outputs(waveforms + 0 * needed)  # used, or it would not be computed


def _trace(outputs: ExportedOutputs, min_samples: int, max_samples: int) -> ExportedProgram:
    """The computation for one waveform of that many samples, in operations that XNNPACK has."""
    from executorch.exir.passes.constant_prop_pass import constant_prop_pass

    # the longest is the example: where it is asked which of two sizes is larger, the answer must not lower the bound
    example = (torch.zeros(1, max_samples),)
    shapes = {"waveforms": {1: Dim.DYNAMIC(min=min_samples, max=max_samples)}}
    oblivious = fx_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with torch.no_grad(), oblivious:
        program = torch.export.export(Checked(outputs, min_samples), example, dynamic_shapes=shapes)
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
    if b.dim() == 2:  # of a linear layer, over the frames or over those of every head
        return torch.mm(a.flatten(0, -2), b).unflatten(0, a.shape[:-1])
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
