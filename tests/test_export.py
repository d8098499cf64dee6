"""Exports: each kind of student in each format against PyTorch."""

from __future__ import annotations

import importlib.util
import os
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

import export
from distillation.errors import UserError
from exporting import folders, runner, verify
from exporting.source import ExportOptions
from exporting.verify import make_batches
from tests.configs import first_layers
from tests.exports import EVERYTHING, FEW_CONVOLUTIONS, KINDS, LARGE, MASKS, exported, make
from tests.helpers import ROOT
from wav2vec2 import Wav2Vec2Model, load_model, save_model, wav2vec2_model

ALL_BATCHES = verify.BATCHES
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="requirements/export.txt",
)


def error_in_8_bits(path: Path) -> float:
    """Of all states, over their size; the file is in float32."""
    import onnx_ir

    from exporting.quantization import quantize

    model = onnx_ir.load(path)
    quantize(model)
    onnx_ir.save(model, path.with_suffix(".int8.onnx"))
    waveforms, lengths = make_batches()[1]
    exact, rounded = (runner.onnx(str(file))(waveforms, lengths) for file in (path, path.with_suffix(".int8.onnx")))
    valid = np.arange(exact["hidden_states"].shape[2]) < exact["frames"][:, None]
    expected, found = (states["hidden_states"][:, valid] for states in (exact, rounded))
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


@pytest.mark.slow
@needs_onnx
def test_everything_at_once(trace_once, exported_here, tiny_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verify, "BATCHES", ALL_BATCHES)
    model = make(tmp_path / "model.pth", first_layers({**tiny_config, **EVERYTHING}, 2), aux_num_out=5)
    for to in ("torch-export", "onnx", "hf"):
        exported(model, to, tmp_path / f"out{export.FORMATS[to].suffix}", last=to != "hf")
        printed = float(capsys.readouterr().out.split("PyTorch ")[1].split()[0])
        assert 0 <= printed <= 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pth", "out.hf", "out.onnx", "out.pt2"]


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_every_format(trace_once, exported_here, kind, tiny_config, tmp_path, monkeypatch):
    """On long audio and with its own convolutions where these are not part of everything at once."""
    batches = ALL_BATCHES if "Large" in kind else [batch for batch in ALL_BATCHES if max(batch) < 10]
    monkeypatch.setattr(verify, "BATCHES", batches)
    changes = KINDS[kind] if "Large" in kind else {**KINDS[kind], **FEW_CONVOLUTIONS}
    model = make(tmp_path / "model.pth", first_layers({**tiny_config, **changes}, 2))
    for to in ("torch-export", "onnx", "hf"):
        exported(model, to, tmp_path / f"out{export.FORMATS[to].suffix}")
    assert 1e-4 < error_in_8_bits(tmp_path / "out.onnx") < 0.1


@pytest.mark.slow
@needs_onnx
def test_large_values_are_compared_as_float32_rounds_them(tiny_config, tmp_path, short_batches, capsys):
    """Inner layers of large pre-norm models reach thousands, where two orders of one sum differ by more than 1e-4."""
    path = make(tmp_path / "model.pth", first_layers({**tiny_config, **LARGE}, 1))
    model = load_model(path)
    model.encoder.transformer.layers[0].feed_forward.output_dense.weight.data *= 1e4
    save_model(path, model)
    assert exported(path, "onnx", tmp_path / "model.onnx").is_file()
    assert float(capsys.readouterr().out.split()[4]) > 1e-4


def test_safetensors(tiny_config, tmp_path):
    model = make(tmp_path / "model.pth", tiny_config, **KINDS["DPWavLM"])
    export.run(model, "safetensors", None, ExportOptions())
    waveform = torch.randn(1, 4000)
    ours, theirs = load_model(tmp_path / "model.safetensors"), load_model(model)
    assert not ours.masks() and theirs.masks()
    torch.testing.assert_close(ours(waveform)[0], theirs(waveform)[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["run.safetensors", "folder"])
def test_the_model_itself_is_not_overwritten(name, tiny_config, tmp_path, monkeypatch):
    """Its masks would be lost, or its folder's config would not fit any more."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    make(tmp_path / "run.safetensors", first_layers(tiny_config, 1), **MASKS)
    out = None if name == "run.safetensors" else Path("folder") / "model.safetensors"
    with pytest.raises(UserError, match="safetensors: is the model itself; name another file with --out"):
        export.run(Path(name), "safetensors", out, ExportOptions())
    assert load_model("run.safetensors").masks()


def test_a_file_that_is_not_the_same_when_read_is_not_kept(tiny_config, tmp_path, monkeypatch):
    model = make(tmp_path / "model.pth", first_layers(tiny_config, 1))
    monkeypatch.setattr("exporting.weights.load_model", lambda path: wav2vec2_model(**tiny_config))
    with pytest.raises(UserError, match=r"model.safetensors: does not hold the model's weights"):
        export.run(model, "safetensors", None, ExportOptions())
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_what_is_in_the_place_of_a_file(tiny_config, tmp_path):
    (tmp_path / "new.onnx").mkdir()
    with pytest.raises(UserError, match=r"new.onnx: is a folder; name a file"):
        export.run(tmp_path / "model.pth", "onnx", tmp_path / "new.onnx", ExportOptions())


def test_an_empty_folder_is_filled_and_rights_are_the_users(tmp_path):
    (tmp_path / "here").mkdir()
    before = (tmp_path / "here").stat()
    umask = os.umask(0o027)
    try:
        for name in ("here", "new"):
            with folders.unfinished(tmp_path / name) as made:
                (made / "config.json").touch(0o600)
    finally:
        os.umask(umask)
    assert (tmp_path / "here").stat().st_ino == before.st_ino
    assert {path.name for path in tmp_path.rglob("*")} == {"here", "new", "config.json"}
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("new", "new/config.json", "here/config.json")]
    assert modes == [0o750, 0o640, 0o640]


def test_batches_cover_the_promised_lengths(monkeypatch):
    assert min(map(min, ALL_BATCHES)) == 0.05 and max(map(max, ALL_BATCHES)) == 35.0
    monkeypatch.setattr(verify, "BATCHES", ALL_BATCHES)
    for (batch, lengths), seconds in zip(make_batches(), ALL_BATCHES, strict=True):
        assert lengths.tolist() == [round(16_000 * s) for s in seconds] and batch.shape == (len(lengths), max(lengths))
        assert all(not row[n:].any() and row[:n].all() for row, n in zip(batch, lengths))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to", "hf", "--quantize", "int8"], "--quantize int8: only with --to onnx"),
        (["--to", "safetensors", "--last"], "--last: only with --to onnx or torch-export"),
        (["--to", "onnx", "--out", "x.bin"], "--out x.bin: its name must end in .onnx"),
        (["--to", "tflite"], "tflite"),
        (["--to", "hf", "--report", "nowhere.json"], "nowhere.json: no report of report.py"),
        (["--to", "hf", "--out", "tests"], "--out tests: exists; name a new folder"),
        (["--to", "hf", "--out", "."], "--out .: exists; name a new folder"),
        (["--to", "onnx", "--max_seconds", "0"], "--max_seconds 0.0: only with --to executorch"),
        (["--to", "hf", "--out", "README.md/new"], "--out README.md/new: Not a directory; choose a folder that can be"),
    ],
)
def test_mistakes_on_the_command_line(flags, message, teacher_path, script_error, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert message in script_error("export.py", teacher_path, *flags)


def test_an_output_layer_without_vocabulary(tiny_config, tmp_path):
    model: Wav2Vec2Model = wav2vec2_model(**{**tiny_config, "aux_num_out": 5})
    save_model(tmp_path / "model.pth", model)
    with pytest.raises(UserError, match="an output layer but no vocabulary for it; fine-tune with"):
        exported(tmp_path / "model.pth", "hf", tmp_path / "out")
