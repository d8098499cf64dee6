"""Features of unequal waveforms, and when their frames are."""

from __future__ import annotations

import pytest
import torch

from wav2vec2 import wav2vec2_model
from wav2vec2.embed import MAX_BATCH_SECONDS, batches_by_length
from wav2vec2.feature_extractor import SAMPLE_RATE


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


@pytest.mark.parametrize(
    ("waveforms", "message"),
    [
        (torch.zeros(1, 1, 500), r"waveform 0 must be a float tensor \[samples\].*torch.float32 \[1, 500\]"),
        ([torch.zeros(500), torch.zeros(500, dtype=torch.int16)], "waveform 1 must be a float tensor.*int16"),
        ([[0.0, 1.0]], "got list"),
        (torch.full((500,), torch.nan), "waveform 0 has NaN"),
    ],
)
def test_refusals(tiny, waveforms, message):
    with pytest.raises(ValueError, match=message):
        tiny("hubert_base").embed(waveforms)


def test_no_such_layer(tiny):
    with pytest.raises(ValueError, match=r"layer 4: .* to 3"):
        tiny("hubert_base").embed(torch.zeros(500), layer=4)


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


@pytest.mark.parametrize("architecture", ["hubert_base", "wavlm_large"])
def test_lengths_that_cannot_be(tiny, architecture):
    model = tiny(architecture)
    waveforms = torch.randn(2, 500)
    for lengths, message in (
        ([900, 500], r"lengths \[900, 500\] exceed the 500 samples"),
        ([500], r"lengths must be \[2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model.extract_features(waveforms, torch.tensor(lengths))
