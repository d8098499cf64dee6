"""What the Python API cannot mean is refused in one line of its own, before a kernel's error or silent nonsense."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wav2vec2 import load_model, prune, save_model
from wav2vec2.inputs import check_batch
from wav2vec2.passes import PassOptions


@pytest.fixture(scope="module")
def model(tiny):
    torch.manual_seed(0)
    return tiny("hubert_large")  # frames of 30 samples


def refuses(message, call, *arguments, **options):
    with pytest.raises(ValueError, match=message) as error:
        call(*arguments, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("entry", ["extract_features", "forward", "run"])
@pytest.mark.parametrize(
    ("waveforms", "message"),
    [
        (torch.zeros(2, 500, dtype=torch.int16), "floats with full scale 1, got torch.int16: divide .* 32768"),
        (torch.zeros(2, 500, dtype=torch.uint8), "got torch.uint8"),
        (torch.zeros(2, 500, dtype=torch.complex64), "got torch.complex64"),
        (np.zeros((2, 500), np.float32), r"a tensor \[batch, samples\], got ndarray of float32 \[2, 500\]"),
        ([[0.0] * 500], "got list"),
        (torch.zeros(500), r"\[batch, samples\], got shape \(500,\)"),
        (torch.zeros(1, 2, 500), r"got shape \(1, 2, 500\)"),
        (torch.zeros(2, 29), "29 samples give no frame, which takes 30: pad"),
        (torch.zeros(2, 0), "0 samples give no frame"),
        (torch.zeros(0, 500), "an empty batch"),
        (torch.zeros(2, 500, dtype=torch.float64), r"are torch.float64, the model torch.float32: give waveforms.to"),
        (torch.zeros(2, 500, dtype=torch.bfloat16), "are torch.bfloat16, the model torch.float32"),
        (torch.zeros(2, 500, device="meta"), "waveforms are on meta, the model on cpu"),
    ],
)
def test_waveforms(model, entry, waveforms, message):
    refuses(message, getattr(model, entry), waveforms)


@pytest.mark.parametrize("entry", ["extract_features", "forward", "run"])
@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([500, 400], r"an int64 tensor \[batch\] of samples, got list"),
        (torch.tensor([500.0, 400.0]), r"int64 tensor .* got torch.float32 \[2\]"),
        (torch.tensor([1.0, 0.8]), "got torch.float32"),
        (torch.tensor([200, 100], dtype=torch.uint8), "got torch.uint8"),
        (torch.tensor([True, False]), "got torch.bool"),
        (np.array([500, 400]), "got ndarray of int64"),
        (torch.tensor([500]), r"lengths must be \[2\], got shape \(1,\)"),
        (torch.tensor([[500, 400]]), r"got shape \(1, 2\)"),
        (torch.tensor([501, 400]), r"lengths \[501, 400\] exceed the 500 samples"),
        (torch.tensor([500, -1]), r"lengths \[500, -1\] must not be negative"),
        (torch.tensor([500, 400], device="meta"), "lengths are on meta, waveforms on cpu"),
    ],
)
def test_lengths(model, entry, lengths, message):
    refuses(message, getattr(model, entry), torch.zeros(2, 500), lengths)


def test_what_can_be_meant_still_runs(model):
    waveforms = torch.randn(2, 500)
    expected, frames = model.extract_features(waveforms, torch.tensor([500, 0]))
    assert frames.tolist() == [model.output_length(torch.tensor([500])).item(), 0]
    short, _ = model.extract_features(waveforms, torch.tensor([500, 0], dtype=torch.int32))
    assert all(torch.equal(a, b) for a, b in zip(expected, short, strict=True))
    assert model.extract_features(torch.randn(1, 30))[0][0].shape[1] == 1


def test_autocast_takes_other_floats(model):
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.randn(1, 500).bfloat16())[0].isfinite().all()
        refuses("are torch.float64", model, torch.randn(1, 500).double())


@pytest.mark.parametrize("num_layers", [-1, 4, 1.0, True, "all"])
def test_number_of_layers(model, num_layers):
    message = "the model has 3 layers" if num_layers in (-1, 4) else "num_layers must be an integer"
    refuses(message, model.extract_features, torch.zeros(1, 500), num_layers=num_layers)
    refuses(message, model.run, torch.zeros(1, 500), None, PassOptions(num_layers=num_layers))


def test_no_value_on_another_device_is_waited_for():
    """Reading one from "meta" raises, as it would wait for a GPU."""
    waveforms, lengths = torch.empty(2, 500, device="meta"), torch.empty(2, dtype=torch.int64, device="meta")
    check_batch(waveforms, lengths, torch.empty(1, device="meta"), 30)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "device 'gpu': no such device; give cpu, cuda"),
        ("", "device '': no such device"),
        (None, "device None: no such device"),
        ("cuda:99", "device 'cuda:99'"),
        ("fpga", "device 'fpga': this build of torch does not run on it"),
        ("meta", "device 'meta': holds no values"),
    ],
)
def test_devices_that_are_not_there(tmp_path, device, message):
    refuses(message, load_model, tmp_path / "not looked at.pth", device=device)


@pytest.mark.parametrize("dtype", ["float32", torch.int8, torch.complex64, torch.float8_e4m3fn, float, None])
def test_types_that_no_model_runs_in(tmp_path, dtype):
    refuses(r"dtype must be one of torch.float32, .* got ", load_model, tmp_path / "not looked at.pth", dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_types_that_they_run_in(tmp_path, model, dtype):
    save_model(tmp_path / "model.pth", model)
    loaded = load_model(tmp_path / "model.pth", device=torch.device("cpu"), dtype=dtype)
    assert loaded(torch.zeros(1, 500, dtype=dtype))[0].dtype == dtype


def test_other_methods(model):
    refuses("lengths must be an int64 tensor", model.output_length, 16_000)
    refuses("lengths must be an int64 tensor", model.output_length, torch.tensor([500.0]))
    refuses("num_frames must be an integer, got 2.5", model.frame_times, 2.5)
    refuses("num_frames -1: must not be negative", model.frame_times, -1)
    refuses("num_samples must be an integer, got 1.5", model.get_num_macs, [500, 1.5])
    refuses("num_samples -500: must not be negative", model.get_num_macs, -500)
    assert model.get_num_macs(np.int64(500)) == model.get_num_macs(torch.tensor([500])) == model.get_num_macs(500)


def test_models_that_are_wrapped(model, tmp_path):
    for call in (prune, lambda wrapped: save_model(tmp_path / "model.pth", wrapped)):
        refuses("must be a Wav2Vec2Model, got Sequential", call, torch.nn.Sequential(model))
    assert not list(tmp_path.iterdir())


def test_survivors_of_other_masks(tiny):
    masked, other = tiny("hubert_base", ("interm",)), tiny("hubert_base", ("interm",))
    chosen = {mask: torch.ones(len(mask), dtype=torch.bool) for mask in masked.masks().values()}
    assert prune(masked, chosen)[1]["encoder_ff_interm_features"] == [24] * 3
    refuses(r"survivors of .*layers.0.* must be bool \[24\], got NoneType", prune, other, chosen)
    floats = {mask: kept.float() for mask, kept in chosen.items()}
    refuses(r"must be bool \[24\], got torch.float32", prune, masked, floats)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_entries_that_could_not_be_read_again(model, tmp_path, suffix):
    refuses("config: an entry of this name", save_model, tmp_path / f"m{suffix}", model, **{"config": {}})
    refuses("note: a PosixPath must hold", save_model, tmp_path / f"m{suffix}", model, note=tmp_path)
    assert not list(tmp_path.iterdir())
