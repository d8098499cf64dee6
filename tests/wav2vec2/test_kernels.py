"""Every form of an operation computes the same."""

from __future__ import annotations

from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from wav2vec2 import kernels
from wav2vec2.feature_extractor import LiveNorm, instance_norm, normalized_conv1d


def gradients(result, inputs, seed=0):
    torch.manual_seed(seed)
    weights = torch.randn(result.shape, dtype=result.dtype)  # randn_like would follow the layout in memory
    return torch.autograd.grad((result * weights).sum(), inputs)


def assert_same(left, right, inputs, tolerance=1e-5):
    torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)
    for a, b in zip(gradients(left, inputs), gradients(right, inputs), strict=True):
        torch.testing.assert_close(a, b, atol=20 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_by_onednn(monkeypatch, with_bias):
    monkeypatch.setattr(kernels, "_slow_mkl", lambda: True)
    monkeypatch.setattr(kernels, "MIN_MACS", 0)
    x, weight = torch.randn(3, 50, 24, requires_grad=True), torch.randn(40, 24, requires_grad=True)
    bias = torch.randn(40, requires_grad=True) if with_bias else None
    inputs = [x, weight, *([bias] if with_bias else [])]
    with mock.patch.object(F, "conv2d", wraps=F.conv2d) as used:
        result = kernels.linear(x, weight, bias)
    assert used.called
    assert result.is_contiguous()
    assert_same(result, F.linear(x, weight, bias), inputs)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 2), (2, 2), (1, 1)])
def test_conv1d_in_both_layouts(grad, dtype, kernel_size, stride):
    x = torch.randn(2, 31, 12).to(dtype).requires_grad_()
    weight, bias = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((7, 12, kernel_size), (7,)))
    with nullcontext() if grad else torch.no_grad():
        result = kernels.conv1d(x, weight, bias, stride)
    expected = F.conv1d(x.transpose(1, 2), weight, bias, stride).transpose(1, 2)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    if grad:
        assert_same(result, expected, [x, weight, bias], tolerance)
    torch.testing.assert_close(result, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kernel_size", [128, 32, 31, 8, 7])
@pytest.mark.parametrize("num_frames", [1, 9, 100])
def test_wide_convolution(kernel_size, num_frames):
    x = torch.randn(2, 12, num_frames, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(12, 4, kernel_size, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(12, dtype=torch.float64, requires_grad=True)
    result = kernels.wide_conv1d(x, weight, bias, 3)
    expected = F.conv1d(x, weight, bias, padding=kernel_size // 2, groups=3)[..., :num_frames]
    assert_same(result, expected, [x, weight, bias], 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_dropout(dtype, p):
    torch.manual_seed(1)
    x = torch.ones(500, 1001, dtype=dtype, requires_grad=True)
    result = kernels.dropout(x, p)
    assert result.dtype == dtype
    share = (result == 0).double().mean().item()
    assert share == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5 + 2**-17)
    kept = result[result != 0].unique()
    assert kept.numel() == 1
    assert kept.item() == pytest.approx(1 / (1 - p), rel=1e-2 if dtype == torch.bfloat16 else 1e-4)
    (grad,) = torch.autograd.grad(result.sum(), x)
    assert torch.equal(grad, result.detach())
    # every position and its neighbours are independent
    dropped = (result == 0).double()
    for shift in (1, 2, 3, 4):
        together = (dropped[:, shift:] * dropped[:, :-shift]).mean().item()
        assert together == pytest.approx(p * p, abs=6 * p / x.numel() ** 0.5)
    torch.manual_seed(1)
    assert torch.equal(kernels.dropout(x, p), result)
    assert torch.equal(kernels.dropout(x, 0.0), x)


def test_dropout_of_nearly_everything():
    x = torch.ones(1000)
    assert torch.isfinite(kernels.dropout(x, 1 - 1e-9)).all()
    assert not kernels.dropout(x, 1.0).any()


def test_dropout_module_is_silent_in_eval():
    x, module = torch.randn(4, 5), kernels.Dropout(0.5)
    assert not torch.equal(module(x), x)
    assert torch.equal(module.eval()(x), x)


@pytest.mark.parametrize("mask", [None, "bool", "bias"])
def test_attention_written_out_equals_the_fused_one(mask):
    q, k, v = (torch.randn(2, 3, 20, 8, requires_grad=True) for _ in range(3))
    given = {None: None, "bool": torch.rand(2, 1, 1, 20) > 0.3, "bias": torch.randn(3, 20, 20)}[mask]
    written = kernels.attention_weights(q, k, given) @ v
    assert_same(kernels.attend(q, k, v, given, 0.0), written, [q, k, v])
    low = kernels.attend(*(t.bfloat16() for t in (q, k, v)), given, 0.0)
    torch.testing.assert_close(low.float(), written, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("mask", [None, "bool", "bias"])
@pytest.mark.parametrize("width", [8, 9, 15])
def test_attention_of_heads_that_no_fused_kernel_takes(mask, width, monkeypatch):
    q, k, v = (torch.randn(2, 3, 20, width, requires_grad=True) for _ in range(3))
    given = {None: None, "bool": torch.rand(2, 1, 1, 20) > 0.3, "bias": torch.randn(3, 20, 20)}[mask]
    seen = []
    usual = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *a, **b: seen.append(q.shape[-1]) or usual(q, *a, **b)
    )
    fused = kernels.fused_attention(q, k, v, given, 0.0)
    assert seen == [width if mask is None else -(-width // 8) * 8]
    assert_same(fused, kernels.attention_weights(q, k, given) @ v, [q, k, v])


def test_attention_drops_weights_without_bias():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 6, 4) for _ in range(3))
    mean = torch.stack([kernels.attend(q, k, v, None, 0.3) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, kernels.attend(q, k, v, None, 0.0), atol=0.06, rtol=0)


@pytest.mark.parametrize("lengths", [None, [40, 17]])
@pytest.mark.parametrize("grad", [True, False])
def test_norm_folded_into_the_first_convolution(lengths, grad):
    x = torch.randn(2, 203, 1, dtype=torch.float64) + 3
    kernel = torch.randn(6, 1, 10, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    length = None if lengths is None else torch.tensor(lengths)
    convolved = F.conv1d(x.transpose(1, 2), kernel, None, 5).transpose(1, 2)
    expected = instance_norm(convolved, length, LiveNorm(weight, bias, 1e-5))
    with nullcontext() if grad else torch.no_grad():
        result = normalized_conv1d(x, length, kernel, LiveNorm(weight, bias, 1e-5), 5)
    torch.testing.assert_close(result, expected, atol=1e-10, rtol=1e-10)
    if grad:
        assert_same(result, expected, [kernel, weight, bias], 1e-9)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 0.0])
def test_folded_norm_hears_what_a_filter_almost_removes(scale):
    """Low-frequency audio through a filter that cancels it: the variance is far below the windows' own."""
    time = torch.arange(16_000) / 16_000
    x = scale * (torch.sin(2 * torch.pi * 60 * time) + 1e-3 * torch.randn(16_000))[None, :, None] + 0.1
    kernel = torch.tensor([1.0, -4.0, 6.0, -4.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])[None, None]
    weight, bias = torch.ones(1), torch.zeros(1)
    exact = instance_norm(F.conv1d(x.double().transpose(1, 2), kernel.double(), None, 5).transpose(1, 2), None,
                          LiveNorm(weight.double(), bias.double(), 1e-5))  # fmt: skip
    result = normalized_conv1d(x, None, kernel, LiveNorm(weight, bias, 1e-5), 5)
    torch.testing.assert_close(result.double(), exact, atol=2e-3, rtol=1e-3)
