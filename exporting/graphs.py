"""The whole computation for any number of waveforms of any length: its trace, and torch.export's file of it."""

from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram
from torch.fx.experimental import _config as fx_config
from torch.nn.attention import SDPBackend, sdpa_kernel

from exporting.folders import unfinished_file
from exporting.source import Exported, ExportOptions, Source
from exporting.verify import ExportedOutputs, require_agreement
from wav2vec2.feature_extractor import SAMPLE_RATE


def export(source: Source, out: Path, options: ExportOptions) -> Exported:
    """Write a file of torch.export, and run it in a fresh process against PyTorch before it is kept.

    Inputs ``waveforms`` [B, N] float32 and ``lengths`` [B] int64, any B, N of a frame at least and no length above it;
    outputs as in ExportedOutputs.

    Raises:
        UserError: the result differs by more than ``verify.TOLERANCE``.
    """
    outputs = ExportedOutputs(source.model, options.last)
    with unfinished_file(out) as made:
        torch.export.save(trace(outputs), made)
        return Exported(require_agreement(outputs, "torch_export", made))


class Checked(torch.nn.Module):
    """Outputs of a graph that refuses lengths as the model does outside of one.

    Waveforms too short for a frame are refused by what torch.export writes down of the convolutions.
    """

    def __init__(self, outputs: ExportedOutputs) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        """As in ExportedOutputs."""
        torch._assert_tensor_metadata(lengths, dtype=torch.int64)
        inside = (lengths >= 0) & (lengths <= waveforms.shape[1])
        torch._assert_async(inside.all(), "lengths must be 0 to the number of samples of the waveforms")
        return self.outputs(waveforms, lengths)


def trace(outputs: ExportedOutputs) -> ExportedProgram:
    """The computation for any number of waveforms of any length."""
    example = torch.zeros(2, SAMPLE_RATE), torch.tensor([SAMPLE_RATE, SAMPLE_RATE // 2])
    shapes = {"waveforms": {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}, "lengths": {0: Dim.DYNAMIC}}
    # fused attention leaves its result in another memory layout on each device; the graph must not depend on that
    # and a size that happens to be 1 (one waveform, one frame) is like any other
    oblivious = fx_config.patch(backed_size_oblivious=True)  # type: ignore[attr-defined]
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), oblivious:
        program = torch.export.export(Checked(outputs), example, dynamic_shapes=shapes)
    # what is left of such guards would refuse one frame after time reduction, which the check runs
    program._guards_code.clear()
    return program
