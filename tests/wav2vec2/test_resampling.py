"""The resampler against the mathematics, and against soxr, which the commands use."""

from __future__ import annotations

import numpy as np
import pytest
import soxr
import torch

from distillation.data import resampling as of_files
from wav2vec2.resampling import ATTENUATION, PASS_BAND, make_kernels, resample, resampled_length

RATES = [8000, 11_025, 16_010, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000, 192_000]
EDGE = 4000  # output samples that the silence before and after may touch


def tone(frequency: float, rate: int, num_samples: int) -> torch.Tensor:
    return torch.from_numpy(np.sin(2 * np.pi * frequency * np.arange(num_samples) / rate + 0.3))


def decibels(power: torch.Tensor, reference: torch.Tensor) -> float:
    ratio = power[EDGE:-EDGE].square().mean() / reference[EDGE:-EDGE].square().mean()
    return 10 * ratio.double().log10().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rate", RATES)
def test_the_pass_band_passes(rate, dtype):
    for share in (0.02, 0.5, 0.8, PASS_BAND):
        frequency = share * min(rate, 16_000) / 2
        output = resample(tone(frequency, rate, rate).to(dtype), rate).double()
        expected = tone(frequency, 16_000, len(output))
        assert decibels(output - expected, expected) < -ATTENUATION + 3  # the formula is an estimate


@pytest.mark.parametrize("rate", [rate for rate in RATES if rate > 17_000])
def test_the_stop_band_stops(rate):
    for frequency in np.linspace(8001, 0.49 * rate, 7):
        output = resample(tone(frequency, rate, rate), rate)
        assert decibels(output, torch.ones(len(output)) / 2**0.5) < -ATTENUATION + 0.5


@pytest.mark.parametrize("rate", [8000, 12_000])
def test_no_images_above_the_old_nyquist_frequency(rate):
    output = resample(tone(0.45 * rate, rate, rate), rate).numpy()
    spectrum = np.abs(np.fft.rfft(output * np.kaiser(len(output), 20)))
    images = spectrum[np.fft.rfftfreq(len(output), 1 / 16_000) > 0.52 * rate]
    assert 20 * np.log10(images.max() / spectrum.max()) < -ATTENUATION + 1


def test_against_soxr():
    """Noise, which fills the transition band too, where the two differ; in speech there is next to nothing."""
    generator = np.random.default_rng(0)
    for rate in (8000, 22_050, 44_100, 48_000):
        noise = generator.normal(size=rate)
        ours, theirs = resample(torch.from_numpy(noise), rate).numpy(), soxr.resample(noise, rate, 16_000, "VHQ")
        assert len(ours) == len(theirs)
        band = np.fft.rfftfreq(len(ours), 1 / 16_000) < PASS_BAND * min(rate, 16_000) / 2
        difference, spectrum = np.fft.rfft((ours - theirs) * np.hanning(len(ours)))[band], np.fft.rfft(theirs)[band]
        assert np.square(np.abs(difference)).mean() < 1e-6 * np.square(np.abs(spectrum)).mean()


@pytest.mark.parametrize("rate", RATES)
def test_the_length_is_that_of_the_commands(rate):
    for num_samples in (0, 1, 2, 3, 400, 441, rate - 1, rate, rate + 7):
        wanted = of_files.resampled_length(num_samples, rate)
        assert len(resample(torch.zeros(num_samples), rate)) == resampled_length(num_samples, rate) == wanted
    assert resampled_length(1, 32_000) == 1 and resampled_length(3, 32_000) == 2  # a half up


@pytest.mark.parametrize("rate", [8000, 16_010, 44_100])
def test_blocks_do_not_show(rate, monkeypatch):
    waveform = torch.randn(rate, dtype=torch.float64)
    expected = resample(waveform, rate)
    monkeypatch.setattr("wav2vec2.resampling.BLOCK", 5000)
    make_kernels.cache_clear()
    monkeypatch.setattr("wav2vec2.resampling.PHASES", 37)
    torch.testing.assert_close(resample(waveform, rate), expected, atol=1e-12, rtol=1e-9)


def test_every_sample_is_the_sum_over_the_filter():
    """The definition, written out."""
    waveform, rate = torch.randn(300, dtype=torch.float64), 44_100
    output = resample(waveform, rate)
    band = 16_000 / rate
    half_width = (ATTENUATION - 8) / (2.285 * np.pi * band * (1 - PASS_BAND)) / 2
    cutoff, beta = band * (1 + PASS_BAND) / 2, 0.1102 * (ATTENUATION - 8.7)
    for n in (0, 1, 50, len(output) - 1):
        time = np.arange(300) - n * rate / 16_000
        window = np.i0(beta * np.sqrt(np.maximum(1 - (time / half_width) ** 2, 0))) / np.i0(beta)
        taps = cutoff * np.sinc(cutoff * time) * window * (np.abs(time) < half_width)
        assert output[n].item() == pytest.approx(float(waveform.numpy() @ taps), abs=1e-12)


def test_types_and_same_rates():
    waveform = torch.randn(4410)
    assert resample(waveform, 16_000) is waveform
    exact = resample(waveform, 44_100)
    for dtype in (torch.float16, torch.bfloat16):
        output = resample(waveform.to(dtype), 44_100)
        assert output.dtype == dtype and torch.equal(output, resample(waveform.to(dtype).float(), 44_100).to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(resample(waveform, 44_100), exact)
