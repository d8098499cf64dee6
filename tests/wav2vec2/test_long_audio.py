"""Audio in pieces gives what it gives in one: statistics, every kind of layer, windows, bounded memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.configs import TINY
from tests.exports import EVERYTHING, KINDS
from wav2vec2 import Wav2Vec2Model, long_audio, wav2vec2_model
from wav2vec2.long_audio import long_states, statistics_of
from wav2vec2.passes import PassOptions
from wav2vec2.statistics import Statistics, StatisticsStream
from wav2vec2.windows import Window, make_windows

MODELS: dict[str, dict[str, Any]] = {
    **KINDS,
    "everything": EVERYTHING,
    "maps through a second softmax": {**KINDS["ARMHuBERT"], "encoder_reuse_softmax": True},
    "reduced and not a multiple": {"encoder_time_reduction": 3},
}


def build(**changes: Any) -> Wav2Vec2Model:
    """A random model; masks leave about half of it."""
    torch.manual_seed(0)
    model = wav2vec2_model(**{**TINY, **changes}).eval()
    for name, parameter in model.named_parameters():
        if not name.endswith("log_alpha"):
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    for mask in model.masks().values():
        torch.nn.init.normal_(mask.log_alpha, 0.0, 2.0)
    return model


def uneven(seconds: float) -> Tensor:
    """Noise whose level and mean change: what a piece knows of itself is not what the whole knows."""
    num = int(seconds * 16_000)
    level = torch.linspace(0.01, 0.3, num).roll(num // 3)
    return torch.randn(num, generator=torch.Generator().manual_seed(1)) * level + 2 * level


def in_pieces(
    model: Wav2Vec2Model, x: Tensor, windows: list[Window] | None = None, at_once: float = 1.0
) -> list[Tensor]:
    """All states [T, D] of a waveform by `long_states`; every frame is given exactly once."""
    num_frames = int(model.output_length(torch.tensor([len(x)])))
    states = [torch.full((num_frames, model.embed_dim), torch.nan) for _ in range(model.num_layers + 1)]

    def read(begin: int, end: int) -> Tensor:
        assert begin % 16_000 == 0 and 0 <= begin < end <= len(x)
        return x[begin:end]

    statistics = statistics_of(model, read, len(x), at_once)
    for window in windows or [Window(0, len(x), 0, num_frames)]:
        for layer, first, values in long_states(model, read, window, range(len(states)), statistics, at_once):
            rows = states[layer][first : first + len(values)]
            assert rows.shape == values.shape and rows.isnan().all()
            rows.copy_(values)
    assert all(state.isfinite().all() for state in states)
    return states


@pytest.mark.parametrize("kind", MODELS)
def test_the_whole_in_pieces(monkeypatch, kind):
    monkeypatch.setattr(long_audio, "PIECE", 37)
    monkeypatch.setattr(long_audio, "PAIRS", 3000)
    model, x = build(**MODELS[kind]), uneven(4.3)
    with torch.no_grad():
        whole, _ = model.extract_features(x[None])
    for found, expected in zip(in_pieces(model, x), whole, strict=True):
        torch.testing.assert_close(found, expected[0], atol=2e-5, rtol=1e-5)


def test_the_first_layers_alone():
    model, x = build(), uneven(2.5)
    read = lambda begin, end: x[begin:end]  # noqa: E731
    window = Window(0, len(x), 3, 90)
    statistics = statistics_of(model, read, len(x), 1.0)
    found = list(long_states(model, read, window, [2, 0], statistics, 1.0))
    assert [(state.layer, state.first, len(state.values)) for state in found] == [(0, 3, 87), (2, 3, 87)]
    with torch.no_grad():
        whole, _ = model.extract_features(x[None])
    for layer, _, values in found:
        torch.testing.assert_close(values, whole[layer][0, 3:90], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "DPHuBERT of Large"])
def test_a_piece_with_the_statistics_of_the_whole(kind):
    """And without them it is something else: the test could not fail otherwise."""
    model, x = build(**MODELS.get(kind, {})), uneven(6.0)
    statistics = statistics_of(model, lambda begin, end: x[begin:end], len(x), 1.0)
    piece = x[None, 32_000:64_080]
    with torch.no_grad():
        whole = model.run(x[None])[0].features[0, 100:200]
        known = model.run(piece, None, PassOptions(statistics=statistics))[0].features[0]
        padded = torch.nn.functional.pad(piece, (0, 700))
        lengths = torch.tensor([piece.shape[1]])
        of_padded = model.run(padded, lengths, PassOptions(statistics=statistics))[0].features[0, :100]
        unknown = model.run(piece)[0].features[0]
    torch.testing.assert_close(known, whole, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(of_padded, whole, atol=2e-5, rtol=1e-5)
    assert (unknown - whole).abs().max() > 0.1


@pytest.mark.parametrize("sizes", [[50_000], [1, 3, 7, 49_989], [10] * 40 + [49_600], [16_000] * 3 + [2_000]])
def test_statistics_are_those_of_all_windows(sizes):
    x = uneven(50_000 / 16_000)
    stream = StatisticsStream(10, 5)
    for block in x.split(sizes):
        stream.add(block)
    found, windows = stream.result(), x.double().unfold(0, 10, 5)
    expected = Statistics(
        x.double().mean()[None],
        x.double().var(correction=0)[None],
        windows.mean(0)[None],
        torch.cov(windows.t(), correction=0)[None],
    )
    for name, value in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), value, rtol=1e-10, atol=1e-12)


def test_statistics_where_windows_do_not_touch():
    x, stream = torch.arange(40.0), StatisticsStream(3, 7)
    for block in x.split([2, 5, 1, 20, 12]):
        stream.add(block)
    torch.testing.assert_close(stream.result().window_mean[0], x.double().unfold(0, 3, 7).mean(0))


def test_what_takes_no_statistics_is_read_once():
    model = build(extractor_mode="layer_norm", normalize_waveform=False)
    assert statistics_of(model, lambda begin, end: pytest.fail("read"), 99_999, 1.0) is None


@pytest.mark.parametrize("reduction", [1, 2])
def test_windows_of_what_sees_no_further(reduction):
    """A model without attention: each frame depends on the samples around it, and windows do not show at all."""
    model = build(encoder_use_attention=[False] * 4, encoder_time_reduction=reduction)
    x = uneven(9.3)
    windows = make_windows(model, len(x), 5.0, 1.0)
    assert len(windows) > 2
    with torch.no_grad():
        whole, _ = model.extract_features(x[None])
    for found, expected in zip(in_pieces(model, x, windows), whole, strict=True):
        torch.testing.assert_close(found, expected[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("seconds", [4.9, 5.1, 40.0, 61.234, 600.0])
@pytest.mark.parametrize("reduction", [1, 2, 3])
def test_windows_cover_every_frame_once_with_context(seconds, reduction):
    model = wav2vec2_model(**{**TINY, "encoder_time_reduction": reduction})
    num_samples = int(seconds * 16_000)
    windows = make_windows(model, num_samples, 12.0, 1.0)
    num_frames = int(model.output_length(torch.tensor([num_samples])))
    kept = [frame for window in windows for frame in range(window.first, window.last)]
    assert kept == list(range(num_frames))
    for window in windows:
        assert window.end - window.begin <= 12 * 16_000
        assert window.begin == 0 or window.first * 320 - window.begin >= 16_000
        assert window.end == num_samples or window.end - window.last * 320 >= 16_000
        assert window.begin % 16_000 == 0 and window.begin % (320 * reduction) == 0


@pytest.mark.parametrize("kind", ["DPWavLM", "ARMHuBERT"])
def test_no_map_of_all_frames_is_written_out(monkeypatch, kind):
    monkeypatch.setattr(long_audio, "PAIRS", 20_000)
    largest = []
    softmax = Tensor.softmax
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(Tensor, "softmax", lambda x, dim: (largest.append(x.numel()), softmax(x, dim))[1])
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, attn_mask=None, **rest: (
            largest.append(0 if attn_mask is None else attn_mask.numel()),
            attend(q, k, v, attn_mask, **rest),
        )[1],
    )
    model, x = build(**KINDS[kind]), uneven(8.0)
    in_pieces(model, x)
    assert 0 < max(largest) <= 20_000 < 399**2
