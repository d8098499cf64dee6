"""The comparison of recognisers: the output layer behind a map, noise that is the same every time, equal updates."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch

from benchmarks import noises
from benchmarks.recognisers import Setup, behind_the_map, table
from wav2vec2 import load_model, save_model, wav2vec2_model
from wav2vec2.checkpoint import with_output_layer


def test_the_output_layer_behind_the_map(tiny_config, tmp_path):
    """What a student's last layer says of the teacher's goes into the teacher's output layer."""
    torch.manual_seed(0)
    model = with_output_layer(wav2vec2_model(**tiny_config), ["<pad>", "|", "A"]).eval()
    heads = {f"{i}.{name}": torch.randn(24, 24) if name == "weight" else torch.randn(24)
             for i in range(3) for name in ("weight", "bias")}  # fmt: skip
    save_model(tmp_path / "final.pth", model, heads)
    waveforms = torch.randn(2, 4000)
    with torch.no_grad():
        last = model.extract_features(waveforms)[0][-1]
        expected = model.aux(last @ heads["2.weight"].T + heads["2.bias"])
        found, _ = load_model(behind_the_map(tmp_path / "final.pth"))(waveforms)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_noises_are_the_same_every_time(tmp_path, monkeypatch):
    monkeypatch.setattr(noises, "SECONDS", 2)
    monkeypatch.setattr(noises, "FILES", 2)
    folders = [noises.make_noises(tmp_path / name) for name in "ab"]
    names = [sorted(path.name for path in folder.iterdir()) for folder in folders]
    assert names[0] == names[1] == sorted(f"{kind}{i}.flac" for kind in noises.KINDS for i in range(2))
    heard = [[soundfile.read(folder / name)[0] for name in names[0]] for folder in folders]
    assert all(np.array_equal(a, b) for a, b in zip(*heard))
    assert all(len(x) == 32000 and 0.25 < np.abs(x).max() < 0.35 for x in heard[0])
    assert not np.allclose(heard[0][0], heard[0][1])


def test_every_recogniser_is_trained_for_as_many_updates():
    setup = Setup()
    assert sum(setup.steps) > sum(setup.features) and pytest.approx(0.29, abs=0.02) == setup.steps[1] / sum(setup.steps)


def test_table():
    rows = {"teacher": [[1.0, 2.0, 3.0, 4.0, 5.0]], "student": [[1.0] * 5, [2.0] * 5], "none yet": []}
    found = table(rows).splitlines()
    assert found[0] == "| model | clean | 20 dB | 10 dB | 5 dB | 0 dB |" and len(found) == 4
    assert found[2].startswith("| teacher | 1.0 | 2.0") and "1.5 ± 0.7" in found[3]
