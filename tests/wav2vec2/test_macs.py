"""Multiply-accumulates in closed form against torch's counter and the published total; of masks: test_counting.py."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from wav2vec2 import prune, wav2vec2_model
from wav2vec2.architecture import HUBERT_BASE


def num_macs(model, lengths: int | list[int]) -> int:
    return round(model.get_num_macs(lengths).item())


def traced_macs(model, lengths: list[int]) -> int:
    """What torch counts; a fused attention call would count as nothing, hence the math kernel."""
    usual = mock.patch("torch.compiler.is_compiling", return_value=True)  # the usual form of every operation
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad(), usual:
        for length in lengths:
            model.extract_features(torch.randn(1, length, device=model.feature_extractor.dummy_weight.device))
    return counter.get_total_flops() // 2


def hubert_base(**changes):
    return wav2vec2_model(**{**HUBERT_BASE, **changes})


@pytest.mark.parametrize("architecture", ["hubert_base", "hubert_large", "wavlm_base", "wavlm_large"])
@pytest.mark.parametrize("kernel_size", [8, 7])
def test_tiny_models_agree_with_torchs_counter(tiny, flags, architecture, kernel_size):
    lengths = [800, 2345, 4000]
    model = tiny(architecture, tuple(flags), encoder_pos_conv_kernel=kernel_size)
    pruned, _ = prune(model)
    assert num_macs(pruned, lengths) == pytest.approx(traced_macs(pruned, lengths), rel=0.005)
    dense = tiny(architecture)
    assert num_macs(dense, lengths) == sum(num_macs(dense, length) for length in lengths)
    assert num_macs(dense, lengths) == pytest.approx(traced_macs(dense, lengths), rel=0.005)


def test_hubert_base_agrees_with_torchs_counter():
    with torch.device("meta"):
        model = hubert_base()
    lengths = [800, 16_000, 160_000]
    assert num_macs(model, lengths) == pytest.approx(traced_macs(model, lengths), rel=0.005)


def test_hubert_base_against_the_published_total():
    """1669 G is the sum over 32 utterances of 224.86 s in all, whose lengths were not published.

    Attention grows with the square of the length, so equal lengths give the least: 1635.9 G, 2.0 % below. The rest is a
    spread of the lengths by 4.8 s around their mean of 7.0 s, which is what read speech has.
    """
    with torch.device("meta"):
        model = hubert_base()
    length = round(224.86 * 16_000 / 32)
    equal = num_macs(model, [length] * 32)
    assert equal == pytest.approx(1635.9e9, rel=1e-4)
    quadratic = 12 * 2 * 768  # multiply-accumulates per pair of frames
    spread = ((1669e9 - equal) / quadratic / 32) ** 0.5 / 50  # standard deviation in seconds
    assert spread == pytest.approx(4.8, abs=0.1)
    shorter, longer = (length + round(sign * spread * 16_000) for sign in (-1, 1))
    assert num_macs(model, [shorter, longer] * 16) == pytest.approx(1669e9, rel=0.005)


def test_a_clip_too_short_for_a_frame_costs_only_its_convolutions(tiny):
    model = tiny("hubert_base")
    assert num_macs(model, 5) == 0
    assert num_macs(model, 12) == 12 * 10  # one frame of the first layer
