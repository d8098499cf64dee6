"""ONNX files: operators against PyTorch's, 8 bits, and what exported graphs refuse."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from exporting import graphs, onnx, verify
from exporting.source import ExportOptions, Source
from exporting.verify import ExportedOutputs
from tests.configs import first_layers
from tests.exports import make
from tests.helpers import run_exported_here
from wav2vec2 import load_model

onnxruntime = pytest.importorskip("onnxruntime", reason="requirements/export.txt")
pytest.importorskip("onnxscript", reason="requirements/export.txt")
ir = pytest.importorskip("onnx_ir", reason="requirements/export.txt")

pytestmark = pytest.mark.slow
WIDE = {
    "extractor_conv_layer_config": [(16, 10, 5), *[(20, 3, 2)] * 4, *[(24, 2, 2)] * 2],
    "encoder_embed_dim": 96,
    "encoder_head_dim": 24,
    "encoder_pos_conv_kernel": 32,
    "encoder_ff_interm_features": [512] * 4,
}  # most of its weights are of products with more than a few columns


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_config) -> Path:
    """model.pth, float32.onnx and int8.onnx with what is said of it."""
    folder = tmp_path_factory.mktemp("onnx")
    path = make(folder / "model.pth", first_layers({**tiny_config, **WIDE}, 2))
    convert = onnx.convert

    def keeping(outputs: ExportedOutputs, shortest: int) -> Any:
        model = convert(outputs, shortest)
        onnx.save(model, folder / "float32.onnx")
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "run_exported", run_exported_here)
        patch.setattr(verify, "BATCHES", [[0.05], [0.05, 0.4]])
        patch.setattr(onnx, "convert", keeping)
        done = onnx.export(Source.read(path), folder / "int8.onnx", ExportOptions(quantize="int8"))
    (folder / "difference").write_text(str(done.difference))
    return folder


def run(path: Path, samples: int, lengths: list[int]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip(("waveforms", "lengths"), (x.numpy() for x in batch(samples, lengths)))))


def batch(samples: int, lengths: Sequence[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise [B, N] whose padding is 0."""
    waveforms = torch.randn(len(lengths), samples, generator=torch.Generator().manual_seed(0))
    return waveforms * (torch.arange(samples) < torch.tensor(lengths)[:, None]), torch.tensor(lengths)


class Convolutions(torch.nn.Module):
    """Of every stride that the operators distinguish: all, some or no frames of a stride seen, or seen again."""

    def __init__(self) -> None:
        super().__init__()
        kinds = [(7, 3, 3), (4, 2, 2), (1, 1, 1), (3, 1, 1), (10, 5, 1), (2, 3, 1), (8, 1, 2), (12, 1, 4), (5, 1, 2)]
        self.convolutions = torch.nn.ModuleList(
            torch.nn.Conv1d(4, 8, kernel, stride, kernel // 2 * (groups > 1), groups=groups, bias=kernel != 4)
            for kernel, stride, groups in ((k, s, g if s == 1 else 1) for k, s, g in kinds)
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(convolution(x) for convolution in self.convolutions)


def test_convolutions_as_products(tmp_path):
    from exporting.onnx_operators import TABLE

    torch.manual_seed(0)
    model, x = Convolutions().eval(), torch.randn(2, 4, 61)
    program = torch.export.export(model, (x,), dynamic_shapes=[{2: torch.export.Dim.DYNAMIC}])
    made = torch.onnx.export(program, dynamo=True, opset_version=onnx.OPSET, custom_translation_table=TABLE)
    assert made is not None
    made.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for num_frames in (61, 12, 35):
        x = torch.randn(2, 4, num_frames)
        for found, expected in zip(session.run(None, {"x": x.numpy()}), model(x), strict=True):
            torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-5, rtol=1e-5)


def test_int8_is_close_and_names_its_difference(folder):
    waveforms, lengths = batch(7_000, [7_000, 4_100])
    with torch.no_grad():
        states, frames = load_model(folder / "model.pth").extract_features(waveforms, lengths)
    exact, rounded = (run(folder / f"{name}.onnx", 7_000, [7_000, 4_100]) for name in ("float32", "int8"))
    assert frames is not None
    valid = torch.arange(states[0].shape[1]) < frames[:, None]
    expected = torch.stack(states)[:, valid]
    difference, error = (torch.from_numpy(found[0])[:, valid] - expected for found in (exact, rounded))
    assert difference.abs().max() < 1e-4
    assert 1e-3 < error.square().mean().sqrt() / expected.square().mean().sqrt() < 0.03
    assert 1e-4 < float((folder / "difference").read_text()) < 1.0


def test_int8_is_a_quarter_and_nothing_large_stays_behind(folder):
    parameters = sum(p.numel() for p in load_model(folder / "model.pth").parameters())
    overhead = 150_000  # of the graph
    assert (folder / "int8.onnx").stat().st_size < 1.05 * parameters + overhead
    assert (folder / "float32.onnx").stat().st_size > 3.8 * parameters
    exact, rounded = (ir.load(folder / f"{name}.onnx") for name in ("float32", "int8"))
    count = [[node.op_type for node in model.graph].count for model in (exact, rounded)]
    assert count[0]("Conv") == count[1]("Conv") == 0
    # the feature projection, the positional convolution, 6 of each layer; not those of the feature extractor
    assert count[0]("MatMul") - count[1]("MatMul") == count[1]("MatMulInteger") == 1 + 1 + 2 * 6
    left = [
        v.name
        for v in rounded.graph.initializers.values()
        if v.dtype == ir.DataType.FLOAT and v.const_value.size > 5000
    ]
    assert left == []


def test_8_bits_are_laid_out_for_products_and_shared_by_them(folder):
    model = ir.load(folder / "int8.onnx")
    types = {node.op_type for node in model.graph for value in node.outputs[:1] if value.dtype == ir.DataType.UINT8}
    assert types >= {"Concat", "Pad", "Reshape", "Slice", "Transpose"}
    # queries, keys and values of a layer are of one
    assert [node.op_type for node in model.graph].count("DynamicQuantizeLinear") == 1 + 1 + 2 * 4


def test_sizes_have_names(folder):
    graph = ir.load(folder / "int8.onnx").graph
    assert [str(value.shape) for value in graph.inputs] == ["[batch,samples]", "[batch]"]
    assert [str(value.shape) for value in graph.outputs] == ["[3,batch,frames,96]", "[batch]"]
    sizes = {str(size) for node in graph for value in node.outputs for size in value.shape or ()}
    assert not any(re.search(r"\bs\d", size) for size in sizes)


def test_metadata(folder):
    assert ir.load(folder / "float32.onnx").metadata_props["sample_rate"] == "16000"
    session = onnxruntime.InferenceSession(folder / "int8.onnx", providers=["CPUExecutionProvider"])
    properties = session.get_modelmeta().custom_metadata_map
    assert properties["samples_per_frame"] == "320" and properties["quantization"] == "int8"


@pytest.mark.parametrize("name", ["float32", "int8"])
def test_an_onnx_file_refuses_wrong_lengths_and_short_waveforms(folder, name):
    path = folder / f"{name}.onnx"
    for lengths in ([4_001, 4_000], [4_000, -1]):
        with pytest.raises(Exception, match="lengths_must_be_0_to_the_number_of_samples"):
            run(path, 4_000, lengths)
    with pytest.raises(Exception, match="waveforms_must_have_400_samples_at_least"):
        run(path, 399, [399])
    assert run(path, 400, [400])[1].tolist() == [1]
    states, frames = run(path, 4_000, [0, 4_000])
    assert frames.tolist() == [0, 12] and np.isfinite(states).all()


def test_a_graph_of_torch_refuses_wrong_lengths_and_short_waveforms(folder):
    model = graphs.trace(ExportedOutputs(load_model(folder / "model.pth"), last=True)).module()
    for lengths in ([4_001, 4_000], [4_000, -1]):
        with pytest.raises(RuntimeError, match="lengths must be 0 to the number of samples of the waveforms"):
            model(*batch(4_000, lengths))
    with pytest.raises(RuntimeError, match="Expected: Long, Got: float"):
        model(*batch(4_000, [4_000.0, 100.0]))
    with pytest.raises(AssertionError, match=r"waveforms.* >= 400"):
        model(*batch(399, [399]))
    assert model(*batch(4_000, [0, 4_000]))[1].tolist() == [0, 12]
