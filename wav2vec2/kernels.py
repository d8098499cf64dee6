"""Operations whose fastest form depends on the machine; each computes what its name says, whichever form runs.

Those for a CPU were chosen by measurements on one with AVX-512 (``benchmarks/speed.py`` shows the sum of them); on a
GPU they are torch's own, without cuDNN's attention. Shapes: B batch, T frames, C channels, K kernel size.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_MACS = 1e8  # a smaller product is over before oneDNN has prepared one of a new shape
MAX_WRITTEN_OUT = 2048  # frames up to which bfloat16 attention without a fused kernel is faster on a CPU
SHARE_BITS = 16  # of randomness per element that may be dropped
HEAD_MULTIPLE = 8  # widths of heads that fused attention with a mask takes on a GPU


@functools.cache
def _slow_mkl() -> bool:
    """Whether MKL multiplies float32 with half of the vector width: it does on other makers' AVX-512 processors."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False


def traced() -> bool:
    """Whether a compiler or an exporter looks on: it gets the usual form of every operation."""
    return torch.compiler.is_compiling()


def computes_in_float32(x: Tensor) -> bool:
    """Whether an operation on ``x`` runs in float32: that is its type, and autocast does not lower it."""
    device = x.device.type
    lowered = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return x.dtype == torch.float32 and not lowered


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: [..., C_in] -> [..., C_out].

    Large float32 products go through oneDNN, as a convolution of kernel size 1, where MKL does not use the processor.
    """
    if not (
        x.device.type == "cpu"
        and x.dim() == 3
        and x.numel() * len(weight) >= MIN_MACS
        and computes_in_float32(x)
        and not traced()
        and _slow_mkl()
    ):
        return F.linear(x, weight, bias)
    x = x.transpose(1, 2).unsqueeze(2)  # channels last, as it lies in memory
    return F.conv2d(x, weight[:, :, None, None], bias).squeeze(2).transpose(1, 2)


def keeps_channels_first(x: Tensor) -> bool:
    """Whether :func:`conv1d` of ``x`` is fastest with the frames of a channel next to each other in memory.

    It is where float32 gradients follow: oneDNN's float32 backward pass is up to twice as slow with the channels last.
    Lower precisions (also on a GPU, whose tensor cores want it so) and float32 without gradients are faster with the
    channels of a frame together. A graph to be exported has the usual layout.
    """
    return traced() or (computes_in_float32(x) and (torch.is_grad_enabled() or x.device.type != "cpu"))


def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Convolution over frames without padding: [B, T, C_in] -> [B, T', C_out], ``weight`` [C_out, C_in, K]."""
    x = x.transpose(1, 2)
    if keeps_channels_first(x):
        return F.conv1d(x, weight, bias, stride).transpose(1, 2)
    # F.conv1d would copy its input to have the channels first
    return F.conv2d(x.unsqueeze(2), weight.unsqueeze(2), bias, (1, stride)).squeeze(2).transpose(1, 2)


class _WideConv1d(torch.autograd.Function):
    """Grouped convolution of stride 1 to as many frames, with the kernel cut into parts.

    Few channels per group and a long kernel suit no CPU kernel. The same sum is taken over more channels with a shorter
    kernel: copies of the input, shifted against each other, next to the parts of the kernel. The copies are made again
    in the backward pass, not kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, parts: int) -> Tensor:
        """x [B, C, T], weight [C, C / groups, K] -> [B, C, T]; ``parts`` divides K."""
        ctx.save_for_backward(x, weight)
        ctx.groups, ctx.parts = groups, parts
        left = weight.shape[-1] // 2
        return F.conv1d(_shifted(x, weight, parts, left), _cut(weight, parts), bias, groups=groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the input is such a convolution too, with the kernel turned around."""
        (grad,), (x, weight), groups, parts = grads, ctx.saved_tensors, ctx.groups, ctx.parts
        left = weight.shape[-1] // 2
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            turned = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(-1)
            copies = _shifted(grad, weight, parts, weight.shape[-1] - 1 - left)
            grad_x = F.conv1d(copies, _cut(turned, parts), groups=groups)
        if ctx.needs_input_grad[1]:
            copies = _shifted(x, weight, parts, left)
            _, found, _ = torch.ops.aten.convolution_backward(
                grad, copies, _cut(weight, parts), None, [1], [0], [1], False, [0], groups, [False, True, False]
            )
            grad_weight = found.unflatten(1, (-1, parts)).flatten(2)
        return grad_x, grad_weight, grad.sum((0, 2)) if ctx.needs_input_grad[2] else None, None, None


def _shifted(x: Tensor, weight: Tensor, parts: int, left: int) -> Tensor:
    """[B, C, T] -> [B, C * parts, T + K / parts - 1], of ``x`` padded with K - 1 zeros, ``left`` of them before it."""
    kernel_size = weight.shape[-1]
    part = kernel_size // parts
    x = F.pad(x, (left, kernel_size - 1 - left))
    return x.unfold(-1, x.shape[-1] - kernel_size + part, part).flatten(1, 2)


def _cut(weight: Tensor, parts: int) -> Tensor:
    """[C_out, C_in, K] -> [C_out, C_in * parts, K / parts]."""
    return weight.unflatten(-1, (parts, -1)).flatten(1, 2)


def wide_conv1d(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """Grouped convolution of large kernel: [B, C, T] -> [B, C, T]; an even kernel sees one frame more to the left."""
    num_frames, kernel_size = x.shape[-1], weight.shape[-1]
    float32 = computes_in_float32(x)
    parts = math.isqrt(2 * kernel_size) // (2 if float32 else 1)  # 8 or 16 of the usual 128
    if x.device.type != "cpu" or parts < 2 or kernel_size % parts or traced():
        return F.conv1d(x, weight, bias, padding=kernel_size // 2, groups=groups)[..., :num_frames]
    if not float32 and torch.is_autocast_enabled("cpu"):
        x, weight, bias = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (x, weight, bias))
    return _WideConv1d.apply(x, weight, bias, groups, parts)


class _CPUDropout(torch.autograd.Function):
    """Dropout from 16 random bits per element; keeps one byte per element for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        """Drop with probability ``p``, rounded to a multiple of 2^-16 below 1."""
        threshold = min(round(p * 2**SHARE_BITS), 2**SHARE_BITS - 1)
        words = torch.empty(-(-x.numel() * SHARE_BITS // 64), dtype=torch.int64).random_(-(2**63), None)
        shares = words.view(torch.int16)[: x.numel()].view(x.shape)
        keep = torch.empty(x.shape, dtype=torch.uint8)  # not bool, whose conversion to another type is slow
        torch.ge(shares, threshold - 2 ** (SHARE_BITS - 1), out=keep)
        ctx.save_for_backward(keep)
        ctx.factor = 1 / (1 - threshold / 2**SHARE_BITS)
        return (x * keep).mul_(ctx.factor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Scale what was kept."""
        return (grads[0] * ctx.saved_tensors[0]).mul_(ctx.factor), None


def dropout(x: Tensor, p: float) -> Tensor:
    """``F.dropout`` in training; torch's own draws a double per element on a CPU, which costs as much as a layer."""
    if p == 0:
        return x
    if x.device.type != "cpu" or not 0 < p < 1 or traced():
        return F.dropout(x, p)
    return _CPUDropout.apply(x, p)


class Dropout(nn.Dropout):
    """``nn.Dropout`` by :func:`dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape."""
        return dropout(input, self.p) if self.training else input


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over keys of q k^T / sqrt(E), written out: [B, h, T, E] twice -> [B, h, T, T].

    Args:
        q: queries.
        k: keys.
        mask: broadcast to [B, h, T, T]; bool with False where nothing is attended to, or an additive bias; or None.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """Attention with dropout ``p`` on its weights: [B, h, T, E] three times -> [B, h, T, E]; ``mask`` as above.

    Fused, except on a CPU where that is slower: with dropout, and in bfloat16 over few frames.
    """
    slow = p > 0 or (q.dtype != torch.float32 and q.shape[2] <= MAX_WRITTEN_OUT)
    if q.is_cuda and not traced():
        with _without_cudnn_attention():
            return fused_attention(q, k, v, mask, p)
    if q.device.type != "cpu" or not slow or traced():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    return dropout(attention_weights(q, k, mask).to(v.dtype), p) @ v


@contextlib.contextmanager
def _without_cudnn_attention() -> Iterator[None]:
    """cuDNN is torch's first choice on Hopper, and takes half a second to plan for a new shape.

    Live heads, rows and frames change with every batch.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """:func:`attend` for a GPU, where no fused kernel takes a mask and heads whose width is no multiple of 8.

    Zeros beside them change nothing; without a fused kernel all weights would be kept, in float32.
    """
    width = q.shape[-1]
    if mask is None or width % HEAD_MULTIPLE == 0:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    q, k, v = (F.pad(x, (0, -width % HEAD_MULTIPLE)) for x in (q, k, v))
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, scale=width**-0.5)
    return x[..., :width]
