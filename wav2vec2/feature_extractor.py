"""Convolutional front end: waveform to frames at 50 Hz, and its projection to the Transformer's width.

Shapes: B batch, N samples, T frames, C channels (c of them live), D Transformer width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hardconcrete import Alive, Gate, Gates, HardConcrete, expected_live, scale, select
from .kernels import Dropout, conv1d, keeps_channels_first, linear, takes

CONV_DROP_RATE = 0.01  # initial probability that a channel is dropped (released DPHuBERT)


def valid_frames(lengths: Tensor, num_frames: int) -> Tensor:
    """Bool [B, T]: which frames lie within the first ``lengths`` [B]."""
    return torch.arange(num_frames, device=lengths.device)[None] < lengths[:, None]


class ConvLayerBlock(nn.Module):
    """1-D convolution, optional normalisation, GELU, and a mask over the output channels."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        bias: bool,
        norm: str,
        prune: bool,
        is_last: bool,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride, bias=bias)
        self.layer_norm: nn.GroupNorm | nn.LayerNorm | None = None
        if norm == "group_norm":
            self.layer_norm = nn.GroupNorm(out_channels, out_channels, affine=True)
        elif norm == "layer_norm":
            self.layer_norm = nn.LayerNorm(out_channels)
        # group norm knows no other channel; the last layer is followed by a layer norm
        paddable = norm != "layer_norm" and not is_last
        self.hard_concrete = HardConcrete(out_channels, CONV_DROP_RATE, 1, paddable) if prune else None

    def output_length(self, length: Tensor) -> Tensor:
        """Frames that see no padding, from the number of input frames [B]."""
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        return (torch.div(length - kernel, stride, rounding_mode="floor") + 1).clamp(min=0)

    def forward(
        self, x: Tensor, length: Tensor | None, gate_in: Gate | None, gate: Gate | None
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, c_in] and lengths [B] -> x [B, T', c] and lengths [B]; both gates as drawn for this pass.

        ``gate_in`` is folded into the weights; the own gate's values are left to the next layer.
        """
        weight = scale(select(select(self.conv.weight, gate, 0), gate_in, 1), gate_in, 1)
        bias = None if self.conv.bias is None else select(self.conv.bias, gate, 0)
        if length is not None:
            length = self.output_length(length)
        if self.layer_norm is None:
            return F.gelu(conv1d(x, weight, bias, self.conv.stride[0])), length
        norm_weight, norm_bias = select(self.layer_norm.weight, gate, 0), select(self.layer_norm.bias, gate, 0)
        if isinstance(self.layer_norm, nn.LayerNorm):
            x = conv1d(x, weight, bias, self.conv.stride[0])
            x = F.layer_norm(x, norm_weight.shape, norm_weight, norm_bias, self.layer_norm.eps)
        elif not takes("folded_norm") or x.device.type == "mps":  # which has no float64
            x = conv1d(x, weight, bias, self.conv.stride[0])
            x = instance_norm(x, length, norm_weight, norm_bias, self.layer_norm.eps)
        else:
            x = normalized_conv1d(x, length, weight, norm_weight, norm_bias, self.layer_norm.eps, self.conv.stride[0])
        return F.gelu(x), length

    def num_params(self, num_in: Tensor | int, num_out: Tensor | int) -> Tensor | int:
        """Parameters with ``num_in`` live input and ``num_out`` live output channels."""
        vectors = (self.conv.bias is not None) + 2 * (self.layer_norm is not None)
        return num_in * num_out * self.conv.kernel_size[0] + num_out * vectors


def instance_norm(x: Tensor, length: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Group norm with one channel per group over valid frames only, so that a padded row equals the row alone.

    Args:
        x: [B, T, C].
        length: [B] valid frames; None for all.
        weight: [C].
        bias: [C].
        eps: added to the variance.
    """
    if length is None:
        return F.group_norm(x.transpose(1, 2), len(weight), weight, bias, eps).transpose(1, 2)
    dtype = x.dtype
    valid = valid_frames(length, x.shape[1])[..., None].to(torch.promote_types(dtype, torch.float32))
    x = x.to(valid.dtype)
    count = length.clamp(min=1)[:, None, None]
    mean = (x * valid).sum(1, keepdim=True) / count
    variance = ((x - mean).square() * valid).sum(1, keepdim=True) / count
    return ((x - mean) * torch.rsqrt(variance + eps) * weight + bias).to(dtype)


def normalized_conv1d(
    x: Tensor, length: Tensor | None, kernel: Tensor, weight: Tensor, bias: Tensor, eps: float, stride: int
) -> Tensor:
    """Convolution of one input channel and :func:`instance_norm` in a single product.

    Where windows of K samples have mean m and covariance S, the output of a channel with kernel w has mean w m and
    variance w S w. So both are known before the largest tensor of the model is computed: the norm needs no pass over
    it, and keeps nothing of it for backward.

    Args:
        x: [B, N, 1].
        length: [B] valid frames of the output; None for all.
        kernel: [C, 1, K]. A bias of the convolution would not change the result.
        weight: [C].
        bias: [C].
        eps: added to the variance.
        stride: of the convolution.

    Returns:
        [B, T, C].
    """
    taps = kernel[:, 0]
    windows = x[..., 0].unfold(-1, taps.shape[-1], stride).double()  # [B, T, K]; cancels where a channel hears little
    valid = None if length is None else valid_frames(length, windows.shape[1])[..., None].to(windows.dtype)
    count = windows.shape[1] if length is None else length.clamp(min=1)[:, None, None]
    centered = windows - (windows if valid is None else windows * valid).sum(1, keepdim=True) / count
    covariance = centered.transpose(1, 2) @ (centered if valid is None else centered * valid) / count
    doubles = taps.double().expand(len(windows), -1, -1)
    variance = (doubles @ covariance * doubles).sum(-1)  # [B, C]
    factor = (weight * torch.rsqrt(variance + eps)).to(weight.dtype)
    # the bias is one more tap, on a sample of 1: to be added, it would first be written out to the size of the result
    taps = torch.cat([factor[..., None] * taps, bias.expand_as(factor)[..., None]], dim=-1)
    centered = F.pad(centered.to(taps.dtype), (0, 1), value=1.0)
    if keeps_channels_first(centered):
        return (taps @ centered.transpose(1, 2)).transpose(1, 2)
    return centered @ taps.transpose(1, 2)


class FeatureExtractor(nn.Module):
    """The stack of conv layers. ``dummy_weight`` [C] holds what the last layer's mask left of each channel."""

    def __init__(self, conv_layers: Sequence[ConvLayerBlock]) -> None:
        super().__init__()
        self.conv_layers = cast(Sequence[ConvLayerBlock], nn.ModuleList(conv_layers))
        self.dummy_weight = nn.Parameter(torch.ones(conv_layers[-1].conv.out_channels), requires_grad=False)

    def output_length(self, length: Tensor) -> Tensor:
        """Frames [B] from samples [B]."""
        for layer in self.conv_layers:
            length = layer.output_length(length)
        return length

    def forward(self, x: Tensor, length: Tensor | None, gates: Gates) -> tuple[Tensor, Tensor | None]:
        """Waveforms [B, N], lengths [B] in samples -> features [B, T, c], lengths [B] in frames."""
        x = x.unsqueeze(-1)
        gate_in: Gate | None = None
        for layer in self.conv_layers:
            gate = gates.get(layer.hard_concrete)
            x, length = layer(x, length, gate_in, gate)
            gate_in = gate
        weight = scale(select(self.dummy_weight, gate_in, 0), gate_in, 0)
        return x * weight.to(x.dtype), length

    def num_live(self, alive: Alive) -> list[Tensor | int]:
        """Live output channels of each layer."""
        return [
            layer.conv.out_channels if mask is None else expected_live(mask, alive(mask))
            for layer in self.conv_layers
            for mask in [layer.hard_concrete]
        ]

    def num_params(self, alive: Alive) -> Tensor | int:
        """Parameters of the extractor with only the live channels."""
        channels = self.num_live(alive)
        total = channels[-1]  # dummy_weight
        for layer, num_in, num_out in zip(self.conv_layers, [1, *channels], channels):
            total = total + layer.num_params(num_in, num_out)
        return total


class FeatureProjection(nn.Module):
    """Layer norm over the live channels, linear map to the Transformer's width, dropout.

    Thin students whose extractor is as wide as their Transformer have no linear map.
    """

    def __init__(self, in_features: int, out_features: int, dropout: float, linear: bool = True) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(in_features)
        self.projection = nn.Linear(in_features, out_features) if linear else None
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, gate: Gate | None) -> Tensor:
        """[B, T, c] -> [B, T, D]."""
        weight, bias = select(self.layer_norm.weight, gate, 0), select(self.layer_norm.bias, gate, 0)
        x = F.layer_norm(x, weight.shape, weight, bias, self.layer_norm.eps)
        if self.projection is not None:
            x = linear(x, select(self.projection.weight, gate, 1), self.projection.bias)
        return self.dropout(x)

    def num_params(self, num_in: Tensor | int) -> Tensor | int:
        """Parameters with ``num_in`` live channels."""
        width = 0 if self.projection is None else self.projection.out_features
        return num_in * (2 + width) + width
