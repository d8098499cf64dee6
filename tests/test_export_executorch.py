"""Files of ExecuTorch: all that is special about students in one, what it says of itself, and what is refused.

Every kind by itself: tests/endurance/executorch_kinds.py.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import export
from distillation.errors import UserError
from exporting import verify
from exporting.source import ExportOptions, Source
from exporting.verify import ExportedOutputs
from tests.configs import first_layers
from tests.exports import EVERYTHING, FEW_CONVOLUTIONS, VOCABULARY, make

needs_executorch = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None, reason="requirements/executorch.txt"
)
BOUND = ExportOptions(max_seconds=1)


def run_in_one_method(file: Path, source: Source) -> dict[str, int]:
    """Compare waveforms of many lengths, one after another, with PyTorch; what the file says of itself."""
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(file)
    says = {name: program.load_method(name).execute([])[0] for name in program.method_names - {"forward"}}
    shortest, longest = says["min_samples"], says["max_samples"]
    forward, outputs = program.load_method("forward"), ExportedOutputs(source.model, last=False)
    random = np.random.default_rng(0)
    for samples in (shortest, longest, shortest + 1, *random.integers(shortest, longest + 1, 12), shortest):
        waveform = 0.1 * torch.from_numpy(random.standard_normal((1, samples), np.float32))
        with torch.no_grad():
            expected = outputs(waveform)
        for found, tensor in zip(forward.execute([waveform]), expected, strict=True):
            torch.testing.assert_close(found, tensor, atol=1e-4, rtol=1e-4)
        for beyond in (1, shortest - 1, longest + 1):
            with pytest.raises(RuntimeError, match="failed with error"):
                forward.execute([torch.zeros(1, beyond)])
    return says


@pytest.mark.slow
@needs_executorch
def test_everything_at_once_in_a_fresh_process(tiny_config, tmp_path, capsys, monkeypatch):
    """The second softmax besides; without it the same is left out."""
    monkeypatch.setattr(verify, "BATCHES", [[0.31], [2.0]])
    changes = {**EVERYTHING, **FEW_CONVOLUTIONS, "encoder_reuse_softmax": True, "aux_num_out": len(VOCABULARY)}
    changes["encoder_prune_attention_layer"] = False  # heads are pruned, and some are left
    path = make(tmp_path / "model.pth", first_layers({**tiny_config, **changes}, 2))
    export.run(path, "executorch", None, BOUND)
    assert 0 <= float(capsys.readouterr().out.split("PyTorch ")[1].split()[0]) <= 1e-4
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.pte", "model.pth"]
    says = run_in_one_method(tmp_path / "model.pte", Source.read(path))
    assert says == {"sample_rate": 16_000, "min_samples": 400 + 3 * 320, "max_samples": 16_000}


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
