"""Features of unequal waveforms, and when their frames are."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from wav2vec2 import wav2vec2_model
from wav2vec2.embed import MAX_BATCH_SECONDS, batches_by_length
from wav2vec2.feature_extractor import SAMPLE_RATE
from wav2vec2.resampling import resample, resampled_length


@pytest.mark.parametrize("changes", [{}, {"encoder_time_reduction": 2}])
@pytest.mark.parametrize("architecture", ["hubert_base", "wavlm_large"])
def test_unequal_waveforms_equal_each_alone(tiny, architecture, changes):
    model = tiny(architecture, **changes)
    waveforms = [torch.randn(n) for n in (700, 35, 411, 699)]
    for layer in (0, 2, -1):
        features = model.embed(waveforms, layer)
        for waveform, feature in zip(waveforms, features, strict=True):
            expected = model.extract_features(waveform[None])[0][layer][0]
            torch.testing.assert_close(feature, expected, atol=2e-5, rtol=1e-5)
    assert torch.equal(model.embed(waveforms[0])[0], model.embed(waveforms[0][None])[0])


def test_too_short_and_empty(tiny):
    model = tiny("hubert_base")
    assert [f.shape for f in model.embed([torch.randn(500), torch.randn(3), torch.empty(0)])][1:] == [(0, 16)] * 2
    assert model.embed([]) == []


def test_training_mode_returns_and_does_not_matter(tiny):
    model = tiny("hubert_base", ("head",), encoder_dropout=0.5)
    waveform = torch.randn(600)
    expected = model.embed(waveform)[0]
    assert torch.equal(model.train().embed(waveform)[0], expected) and model.training
    assert not expected.requires_grad


def test_other_dtypes_of_model_and_waveform(tiny):
    model, waveform = tiny("hubert_base").double(), torch.randn(600)
    assert model.embed(waveform)[0].dtype == torch.float64


def test_numpy_arrays_as_readers_give_them(tiny):
    model, array = tiny("hubert_base"), np.random.default_rng(0).normal(size=700).astype(np.float32)
    expected = model.embed(torch.from_numpy(array))[0]
    fixed = array.copy()
    fixed.flags.writeable = False
    for given in (array, fixed, [array], array[None], array.astype(np.float64), array.astype(">f4"), array[::-1][::-1]):
        assert torch.equal(model.embed(given)[0], expected)
    assert model.embed(array.astype(np.float16))[0].isfinite().all()
    assert torch.equal(model.embed(row for row in [array])[0], expected)


@pytest.mark.parametrize(
    ("waveforms", "message"),
    [
        (torch.zeros(1, 1, 500), r"waveform 0 must be a float tensor \[samples\].*torch.float32 \[1, 500\]"),
        ([torch.zeros(500), torch.zeros(500, dtype=torch.int16)], r"waveform 1 must be .* \(int16 / 32768\).*int16"),
        (np.zeros(500, np.int16), r"waveform 0 must be a float tensor .* got torch.int16 \[500\]"),
        (np.zeros((2, 500), np.int16), r"waveform 0 .* got torch.int16 \[500\]"),
        (np.array("audio.wav"), r"waveforms must be float tensors or numpy arrays, got ndarray of <U9 \[\]"),
        (torch.tensor(0.5), r"waveform 0 .* got torch.float32 \[\]"),
        (np.zeros((480, 2), np.float32), r"waveforms \[480, 2\] look like \[samples, channels\]: average"),
        (torch.zeros(480, 1), r"\[480, 1\] look like \[samples, channels\]"),
        ([[0.0, 1.0]], "got list"),
        ([0.0, 1.0], "waveform 0 .* got float"),
        ("audio.wav", "waveform 0 .* got str"),
        (None, "waveforms must be float tensors or numpy arrays, got NoneType"),
        (torch.full((500,), torch.nan), "waveform 0 has NaN"),
        (np.full(500, np.inf), "waveform 0 has NaN or infinite"),
    ],
)
def test_refusals(tiny, waveforms, message):
    with pytest.raises(ValueError, match=message):
        tiny("hubert_base").embed(waveforms)


@pytest.mark.parametrize("layer", [4, -5, 1.0, True, "last"])
def test_no_such_layer(tiny, layer):
    message = rf"layer {layer}: .* to 3" if layer in (4, -5) else "layer must be an integer"
    with pytest.raises(ValueError, match=message):
        tiny("hubert_base").embed(torch.zeros(500), layer=layer)


def test_other_rates_give_nearly_the_features_of_the_same_audio(tiny):
    """Audio without anything above 3.4 kHz, at every rate as it would have been recorded."""
    model, generator = tiny("hubert_base"), np.random.default_rng(0)
    tones = generator.uniform(100, 3400, 40), generator.uniform(0, 6, 40), generator.normal(size=40)

    def recorded(rate: int) -> torch.Tensor:
        time = np.arange(round(0.5 * rate))[:, None] / rate
        audio = (tones[2] * np.sin(2 * np.pi * tones[0] * time + tones[1])).sum(1) / 40
        return torch.from_numpy(audio * np.sin(2 * np.pi * time[:, 0]) ** 2)  # silent at both ends

    expected = model.embed(recorded(SAMPLE_RATE))[0]
    for rate in (8000, 22_050, 44_100, 48_000):
        features = model.embed([recorded(rate), recorded(rate)[:1000]], sample_rate=rate)
        torch.testing.assert_close(features[0], expected, atol=1e-4, rtol=1e-4)
        assert len(features[1]) == model.output_length(torch.tensor([resampled_length(1000, rate)])).item()


def test_half_precision_resamples_in_float32(tiny):
    model, waveform = tiny("hubert_base").bfloat16(), torch.randn(4410)
    features = model.embed(waveform, sample_rate=44_100)[0]
    assert features.dtype == torch.bfloat16
    assert torch.equal(features, model.embed(resample(waveform, 44_100))[0])


@pytest.mark.parametrize("rate", [0, -16_000, 16, 44_100.0, "44100", True, None, 10**9])
def test_no_such_rate(tiny, rate):
    with pytest.raises(ValueError, match=r"sample_rate (-?\d+: must be in Hz|must be an integer)"):
        tiny("hubert_base").embed(torch.zeros(500), sample_rate=rate)


def test_batches_lose_nothing_and_hold_the_budget():
    lengths = [*torch.randint(0, 40 * SAMPLE_RATE, (60,)).tolist(), 300 * SAMPLE_RATE]
    batches = batches_by_length(lengths, 400)
    assert sorted(i for batch in batches for i in batch) == list(range(61))
    assert len(batches) < 30 and batches[-1] == [60]
    budget = MAX_BATCH_SECONDS * SAMPLE_RATE
    assert all(len(batch) * max(lengths[i] for i in batch) <= budget for batch in batches[:-1])


def test_frame_times_are_the_middles_of_what_the_convolutions_see(tiny, tiny_config):
    times = tiny("hubert_base").frame_times(3)  # kernels 10, 3, 2 and strides 5, 2, 2: field 30, shift 20
    torch.testing.assert_close(times, torch.tensor([15, 35, 55], dtype=torch.float64) / 16000)
    base = [(512, 10, 5), *[(512, 3, 2)] * 4, *[(512, 2, 2)] * 2]
    with torch.device("meta"):
        published = wav2vec2_model(**{**tiny_config("hubert_base"), "extractor_conv_layer_config": base})
    torch.testing.assert_close(published.frame_times(2), torch.tensor([0.0125, 0.0325], dtype=torch.float64))


def test_the_frame_of_a_click_is_the_nearest_in_time(tiny):
    model = tiny("hubert_base", extractor_mode="layer_norm")
    quiet = 0.01 * torch.randn(900)
    click = quiet.clone()
    click[455] += 1.0
    changed = (model.embed(click, 0)[0] - model.embed(quiet, 0)[0]).norm(dim=-1)
    times = model.frame_times(len(changed))
    seen = changed > 0
    assert seen.any() and (times[seen] - 455 / 16000).abs().max() <= 15 / 16000
