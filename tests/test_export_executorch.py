"""Files of ExecuTorch: students of each kind against PyTorch, what the files say, and what is refused."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch

import export
from distillation.errors import UserError
from exporting import verify
from exporting.source import ExportOptions
from tests.configs import first_layers
from tests.exports import VOCABULARY, make
from tests.test_export import EVERYTHING, KINDS
from wav2vec2 import load_model

needs_executorch = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None, reason="requirements/executorch.txt"
)


BOUND = ExportOptions(max_seconds=1)


@pytest.fixture
def few_batches(monkeypatch):
    """The shortest, an odd number of frames, and the longest."""
    monkeypatch.setattr(verify, "BATCHES", [[0.025], [0.31], [2.0]])


@pytest.mark.slow
@needs_executorch
def test_everything_at_once_in_a_fresh_process(tiny_config, tmp_path, capsys, few_batches):
    changes = {**EVERYTHING, "aux_num_out": len(VOCABULARY)}
    path = make(tmp_path / "model.pth", first_layers({**tiny_config, **changes}, 2))
    export.run(path, "executorch", None, BOUND)
    assert 0 <= float(capsys.readouterr().out.split("PyTorch ")[1].split()[0]) <= 1e-4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.pte", "model.pth"]


@pytest.mark.slow
@needs_executorch
def test_large_students_and_what_the_file_says(exported_here, tiny_config, tmp_path, few_batches):
    from executorch.runtime import Runtime

    path = make(tmp_path / "model.pth", first_layers({**tiny_config, **KINDS["DPHuBERT of Large"]}, 1))
    export.run(path, "executorch", None, ExportOptions(last=True, max_seconds=1))
    program = Runtime.get().load_program(tmp_path / "model.pte")
    says = {name: program.load_method(name).execute([])[0] for name in program.method_names - {"forward"}}
    assert says == {"sample_rate": 16_000, "min_samples": 720, "max_samples": 16_000}
    forward, model = program.load_method("forward"), load_model(path)
    for samples in (1039, 1040, 7777, 800):
        waveform = 0.1 * torch.randn(1, samples)
        with torch.no_grad():
            expected = model.extract_features(waveform)[0][-1]
        torch.testing.assert_close(forward.execute([waveform])[0], expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(RuntimeError, match="set_inputs"):
        forward.execute([torch.zeros(1, 16_001)])


def test_what_is_refused(tiny_config, tmp_path, monkeypatch):
    path = make(tmp_path / "model.pth", first_layers(tiny_config, 1))
    with pytest.raises(UserError, match="--max_seconds 1: only with --to executorch"):
        export.run(path, "safetensors", None, BOUND)
    monkeypatch.setitem(sys.modules, "executorch.exir", None)
    with pytest.raises(UserError, match=r"package executorch: pip install -r requirements/executorch.txt"):
        export.run(path, "executorch", None, ExportOptions())
    monkeypatch.setattr("exporting.executorch.require_packages", lambda *names, **kwargs: None)
    with pytest.raises(UserError, match=r"--max_seconds 0\.5: must be at least 1"):
        export.run(path, "executorch", None, ExportOptions(max_seconds=0.5))
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]
