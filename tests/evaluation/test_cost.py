from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch

from distillation.budget import SUPERB_SAMPLES
from evaluation import cost
from evaluation.cost import cost_of_file, format_costs, name_files
from evaluation.peak_memory import peak_memory
from wav2vec2 import prune, save_model, wav2vec2_model
from wav2vec2.architecture import HUBERT_BASE
from wav2vec2.checkpoint import add_masks


def test_superb_protocol_gives_the_published_macs(tiny_config):
    assert len(SUPERB_SAMPLES) == 32 and sum(SUPERB_SAMPLES) / 16000 == pytest.approx(224.86, abs=1e-9)
    with torch.device("meta"):
        model = wav2vec2_model(**HUBERT_BASE)
    assert model.get_num_macs(SUPERB_SAMPLES) / 1e9 == pytest.approx(1669, rel=5e-3)
    # the profiling tool's own example, by quarters of the utterances
    for i, published in enumerate((149.26, 261.28, 422.37, 836.25)):
        assert model.get_num_macs(SUPERB_SAMPLES[8 * i : 8 * i + 8]) / 1e9 == pytest.approx(published, rel=5e-3)


def test_cost_of_file(tiny_config, tmp_path):
    model = wav2vec2_model(**tiny_config)
    shared = torch.nn.Linear(24, 24)
    heads = {f"{i}.{name}": value for i in range(3) for name, value in shared.state_dict().items()}
    save_model(tmp_path / "m.pth", model, heads)
    found = cost_of_file("m", tmp_path / "m.pth")
    assert found.num_params == sum(p.numel() for p in model.parameters())
    assert found.num_head_params == 24 * 24 + 24, "a map that layers share counts once"
    assert found.loaded_bytes == 4 * found.num_params
    assert found.file_bytes == (tmp_path / "m.pth").stat().st_size > found.loaded_bytes
    assert found.macs_10s == model.get_num_macs(160000)
    assert found.macs_superb == sum(model.get_num_macs(n) for n in SUPERB_SAMPLES)


def test_masks_are_no_parameters(tiny_config, tmp_path):
    model = wav2vec2_model(**tiny_config)
    masked = add_masks(model, encoder_prune_attention_heads=True, encoder_prune_feed_forward_intermediate=True)
    save_model(tmp_path / "m.pth", masked)
    assert cost_of_file("m", tmp_path / "m.pth").num_params == sum(p.numel() for p in model.parameters())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only")
def test_peak_memory_counts_weights_and_activations(tiny_config, tmp_path):
    wide = {**tiny_config, "encoder_ff_interm_features": [40_000] * 4}
    model = wav2vec2_model(**wide)
    save_model(tmp_path / "m.pth", model)
    weights = 4 * sum(p.numel() for p in model.parameters())
    peaks = peak_memory(tmp_path / "m.pth", [(0.5, 1), (10, 4)])
    if peaks is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    units = 4 * 40_000 * 4 * 499  # bytes of one FFN activation: 4 x 10 s at 50 frames per second
    assert weights < peaks[0] < weights + 24e6  # a little is the first run's own
    assert weights + units < peaks[1] < weights + 3.5 * units


def test_names():
    assert name_files([Path("a/x.pth"), Path("y.pth")]) == {"x": Path("a/x.pth"), "y": Path("y.pth")}
    assert list(name_files([Path("a/x.pth"), Path("b/x.pth")])) == ["a/x.pth", "b/x.pth"]


def test_command(server, teacher_path, tmp_path):
    small = prune(add_masks(wav2vec2_model(**torch.load(teacher_path, weights_only=True)["config"])))[0]
    save_model(tmp_path / "small.pth", small)
    words = [str(teacher_path), str(tmp_path / "small.pth"), "--seconds", "1", "0.5", "--batch", "2", "--rounds", "1"]
    words += ["--device", "cpu", "--out", str(tmp_path / "cost.json")]
    result = server.run("-m", "evaluation.cost", *words)
    found = json.loads((tmp_path / "cost.json").read_text())
    assert [m["name"] for m in found["models"]] == ["teacher", "small"]
    for model in found["models"]:
        assert f"{model['num_params']:,}" in result.stdout
        assert [(s["seconds"], s["batch"]) for s in model["speed"]] == [(0.5, 2), (1.0, 2)]
        for s in model["speed"]:
            assert (
                s["milliseconds"] == pytest.approx(2000 * s["seconds"] * s["real_time_factor"])
                and s["milliseconds"] > 0
            )


@pytest.mark.slow
def test_a_stopped_measurement_goes_on(server, teacher_path, tmp_path):
    words = ["-m", "evaluation.cost", teacher_path, "--seconds", 0.5, 1, 2, 4, 8, "--batch", 1, 4, "--rounds", 8]
    words += ["--device", "cpu", "--out", tmp_path / "cost.json"]
    journal = tmp_path / ".cost.jsonl"
    process = server.start(*words)
    process.until(lambda: journal.is_file() and journal.read_text().count("\n") > 3)
    process.kill(signal.SIGTERM)
    stopped = process.wait()
    assert stopped.code == 75
    assert stopped.error == f"stopped: SIGTERM: what was measured so far is in {journal}; the same command goes on"
    first, *before = map(json.loads, journal.read_text().splitlines())
    assert first["of"]["rounds"] == 8 and first["of"]["cores"] and first["of"]["cpu"] and 3 <= len(before) < 11
    again = server.run(*words)
    assert f"going on after {len(before)} measurements" in again.stderr and not journal.exists()
    (model,) = json.loads((tmp_path / "cost.json").read_text())["models"]
    assert [(s["seconds"], s["batch"]) for s in model["speed"]] == [
        (0.5, 1), (1, 1), (0.5, 4), (2, 1), (1, 4), (4, 1), (2, 4), (8, 1), (4, 4), (8, 4)
    ]  # fmt: skip
    factors = {f"{s['batch']} x {s['seconds']:g} s on cpu": s["real_time_factor"] for s in model["speed"]}
    for line in before[1:]:
        size, _, length, *_ = line["key"].split()
        assert factors[line["key"]] == line["value"][0] / (int(size) * float(length))


def test_table_shows_speed_up_against_the_first():
    models = [
        cost.Cost(name, f"{name}.pth", 1, 10, 0, 40, 1, 1, [cost.Speed("cpu", 1, 1, factor, None)])
        for name, factor in (("slow", 0.5), ("fast", 0.125))
    ]
    last = format_costs(models).splitlines()[-1].split()
    assert last == ["fast", "1", "1", "0.12500", "4.00", "-"]


def test_bad_input_is_one_line(script_error, teacher_path, tmp_path):
    name = "evaluation/cost.py"
    assert "no such file" in script_error(name, tmp_path / "none.pth")
    assert "--seconds 0.001" in script_error(name, teacher_path, "--seconds", 0.001)
    assert "--seconds inf" in script_error(name, teacher_path, "--seconds", ".inf")
    assert "--batch 0" in script_error(name, teacher_path, "--batch", 0)
    assert "--rounds 0" in script_error(name, teacher_path, "--rounds", 0)
    assert "choose auto, cpu or cuda" in script_error(name, teacher_path, "--device", "tpu")
