"""Convolutional front end: waveform to frames at 50 Hz, and its projection to the Transformer's width.

Shapes: B batch, N samples, T frames, C channels (c of them live), D Transformer width.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .hardconcrete import Alive, Gate, Gates, HardConcrete, Pruned, each_num_live, scale, select
from .kernels import Dropout, conv1d, keeps_channels_first, linear, takes, traced
from .statistics import Statistics

SAMPLE_RATE = 16_000  # of every model of this family, in Hz
CONV_DROP_RATE = 0.01  # initial probability that a channel is dropped (released DPHuBERT)


def valid_frames(lengths: Tensor, num_frames: int) -> Tensor:
    """Bool [B, T]: which frames lie within the first ``lengths`` [B]."""
    return torch.arange(num_frames, device=lengths.device)[None] < lengths[:, None]


class LiveNorm(NamedTuple):
    """What a norm applies to the live channels after it has normalised."""

    weight: Tensor  # [C]
    bias: Tensor  # [C]
    eps: float  # added to the variance

    def over_channels(self, x: Tensor) -> Tensor:
        """Layer norm of [B, T, C]."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class ConvLayerBlock(nn.Module):
    """1-D convolution, optional normalisation, GELU, and a mask over the output channels.

    Args:
        in_channels: of the layer below.
        shape: output channels, kernel size and stride.
        bias: of the convolution.
        norm: "group_norm", "layer_norm" or "none".
        prune: give each output channel a gate.
        is_last: the feature projection follows.
    """

    def __init__(
        self, in_channels: int, shape: Sequence[int], bias: bool, norm: str, prune: bool, is_last: bool
    ) -> None:
        super().__init__()
        out_channels, kernel_size, stride = shape
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

    def live_weights(self, gate_in: Gate | None, gate: Gate | None) -> dict[str, Tensor]:
        """What exists of the weights, by name, under the gates of the layer below and of this one.

        ``gate_in`` is folded into the weights; the own gate's values are left to the next layer.
        """
        live = {"conv.weight": scale(select(select(self.conv.weight, gate, 0), gate_in, 1), gate_in, 1)}
        if self.conv.bias is not None:
            live["conv.bias"] = select(self.conv.bias, gate, 0)
        if self.layer_norm is not None:
            live["layer_norm.weight"] = select(self.layer_norm.weight, gate, 0)
            live["layer_norm.bias"] = select(self.layer_norm.bias, gate, 0)
        return live

    def forward(
        self,
        x: Tensor,
        length: Tensor | None,
        gate_in: Gate | None,
        gate: Gate | None,
        statistics: Statistics | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x [B, T, c_in] and lengths [B] -> x [B, T', c] and lengths [B].

        Both gates are as drawn for this pass. A group norm takes the statistics of whole waveforms where they are
        given, else those of ``x``.
        """
        live = self.live_weights(gate_in, gate)
        weight, bias, stride = live["conv.weight"], live.get("conv.bias"), self.conv.stride[0]
        if length is not None:
            length = self.output_length(length)
        if self.layer_norm is None:
            return F.gelu(conv1d(x, weight, bias, stride)), length
        norm = LiveNorm(live["layer_norm.weight"], live["layer_norm.bias"], self.layer_norm.eps)
        if isinstance(self.layer_norm, nn.LayerNorm):
            x = norm.over_channels(conv1d(x, weight, bias, stride))
        elif statistics is None and (not takes("folded_norm") or x.device.type == "mps"):  # which has no float64
            x = instance_norm(conv1d(x, weight, bias, stride), length, norm)
        else:
            x = normalized_conv1d(x, length, weight, norm, stride, statistics)
        return F.gelu(x), length

    def pruned(self, gate_in: Gate | None, gate: Gate | None) -> Pruned:
        """What is left of the layer."""
        weights = self.live_weights(gate_in, gate)
        shape = (len(weights["conv.weight"]), self.conv.kernel_size[0], self.conv.stride[0])
        return Pruned(weights, {"extractor_conv_layer_config": shape})

    def num_params(self, num_in: Tensor | int, num_out: Tensor | int) -> Tensor | int:
        """Parameters with ``num_in`` live input and ``num_out`` live output channels."""
        vectors = (self.conv.bias is not None) + 2 * (self.layer_norm is not None)
        return num_in * num_out * self.conv.kernel_size[0] + num_out * vectors

    def num_macs(self, frames: Tensor, num_in: Tensor | int, num_out: Tensor | int) -> Tensor | int:
        """Multiply-accumulates of output ``frames`` [B], with live channels as for :meth:`num_params`."""
        return int(frames.sum()) * self.conv.kernel_size[0] * num_in * num_out


def instance_norm(x: Tensor, length: Tensor | None, norm: LiveNorm) -> Tensor:
    """Group norm with one channel per group over valid frames only, so that a padded row equals the row alone.

    Args:
        x: [B, T, C].
        length: [B] valid frames; None for all.
        norm: of the channels.
    """
    if length is None:
        return F.group_norm(x.transpose(1, 2), len(norm.weight), *norm).transpose(1, 2)
    dtype = x.dtype
    valid = valid_frames(length, x.shape[1])[..., None].to(torch.promote_types(dtype, torch.float32))
    x = x.to(valid.dtype)
    count = length.clamp(min=1)[:, None, None]
    mean = (x * valid).sum(1, keepdim=True) / count
    variance = ((x - mean).square() * valid).sum(1, keepdim=True) / count
    return ((x - mean) * torch.rsqrt(variance + norm.eps) * norm.weight + norm.bias).to(dtype)


def normalized_conv1d(
    x: Tensor, length: Tensor | None, kernel: Tensor, norm: LiveNorm, stride: int, statistics: Statistics | None = None
) -> Tensor:
    """Convolution of one input channel and :func:`instance_norm` in a single product.

    Where windows of K samples have mean m and covariance S, the output of a channel with kernel w has mean w m and
    variance w S w. So both are known before the largest tensor of the model is computed: the norm needs no pass over
    it, and keeps nothing of it for backward.

    Args:
        x: [B, N, 1].
        length: [B] valid frames of the output; None for all.
        kernel: [C, 1, K]. A bias of the convolution would not change the result.
        norm: of the channels.
        stride: of the convolution.
        statistics: m and S of whole waveforms, of which ``x`` are pieces; by default those of ``x``.

    Returns:
        [B, T, C].
    """
    taps = kernel[:, 0]
    exact = torch.float32 if x.device.type == "mps" else torch.float64  # much cancels where a channel hears little
    windows = x[..., 0].unfold(-1, taps.shape[-1], stride).to(exact)  # [B, T, K]
    if statistics is not None:
        centered, covariance = windows - statistics.window_mean[:, None], statistics.window_covariance
    else:
        valid = None if length is None else valid_frames(length, windows.shape[1])[..., None].to(windows.dtype)
        count = windows.shape[1] if length is None else length.clamp(min=1)[:, None, None]
        centered = windows - (windows if valid is None else windows * valid).sum(1, keepdim=True) / count
        covariance = centered.transpose(1, 2) @ (centered if valid is None else centered * valid) / count
    doubles = taps.to(exact).expand(windows.shape[0], -1, -1)  # a length would fix the number in graphs
    variance = (doubles @ covariance * doubles).sum(-1)  # [B, C]
    factor = (norm.weight * torch.rsqrt(variance + norm.eps)).to(norm.weight.dtype)
    # the bias is one more tap, on a sample of 1: to be added, it would first be written out to the size of the result
    taps = torch.cat([factor[..., None] * taps, norm.bias.expand_as(factor)[..., None]], dim=-1)
    centered = F.pad(centered.to(taps.dtype), (0, 1), value=1.0)
    if not traced() and keeps_channels_first(centered, centered.numel() * len(kernel)):
        return (taps @ centered.transpose(1, 2)).transpose(1, 2)
    return centered @ taps.transpose(1, 2)


class FeatureExtractor(nn.Module):
    """The stack of conv layers. ``dummy_weight`` [C] holds what the last layer's mask left of each channel."""

    def __init__(self, conv_layers: Sequence[ConvLayerBlock]) -> None:
        super().__init__()
        self.conv_layers = cast(Sequence[ConvLayerBlock], nn.ModuleList(conv_layers))
        self.dummy_weight = nn.Parameter(torch.ones(conv_layers[-1].conv.out_channels), requires_grad=False)

    @property
    def frame_shift(self) -> int:
        """Samples from one frame to the next: 320 for every published model."""
        return math.prod(layer.conv.stride[0] for layer in self.conv_layers)

    @property
    def receptive_field(self) -> int:
        """Samples that the convolutions of one frame see: 400 for every published model."""
        field, shift = 1, 1
        for layer in self.conv_layers:
            field += (layer.conv.kernel_size[0] - 1) * shift
            shift *= layer.conv.stride[0]
        return field

    def frame_times(self, num_frames: int) -> Tensor:
        """Middle of each frame's receptive field in seconds from the start of the audio, float64 [T]."""
        start = self.receptive_field / 2
        return (torch.arange(num_frames, dtype=torch.float64) * self.frame_shift + start) / SAMPLE_RATE

    def output_length(self, length: Tensor) -> Tensor:
        """Frames [B] from samples [B]."""
        for layer in self.conv_layers:
            length = layer.output_length(length)
        return length

    def forward(
        self, x: Tensor, length: Tensor | None, gates: Gates, statistics: Statistics | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Waveforms [B, N], lengths [B] in samples -> features [B, T, c], lengths [B] in frames.

        With ``statistics`` the waveforms are pieces of longer ones.
        """
        x = x.unsqueeze(-1)
        drawn = self._drawn(gates)
        for layer, gate_in, gate in zip(self.conv_layers, [None, *drawn], drawn):
            x, length = layer(x, length, gate_in, gate, statistics)
        return x * self._live_dummy_weight(drawn[-1]).to(x.dtype), length

    def _drawn(self, gates: Gates) -> list[Gate | None]:
        """The gate of each layer."""
        return [gates.get(layer.hard_concrete) for layer in self.conv_layers]

    def _live_dummy_weight(self, gate: Gate | None) -> Tensor:
        return scale(select(self.dummy_weight, gate, 0), gate, 0)

    def pruned(self, gates: Gates) -> list[Pruned]:
        """What is left of each layer, and with the last one of ``dummy_weight``."""
        drawn = self._drawn(gates)
        layers = [Pruned() for _ in drawn]
        for i, (left, layer, gate_in, gate) in enumerate(zip(layers, self.conv_layers, [None, *drawn], drawn)):
            left.add(f"conv_layers.{i}", layer.pruned(gate_in, gate))
        layers[-1].weights["dummy_weight"] = self._live_dummy_weight(drawn[-1])
        return layers

    def num_live(self, alive: Alive) -> list[Tensor | int]:
        """Live output channels of each layer."""
        masks = [layer.hard_concrete for layer in self.conv_layers]
        return each_num_live(masks, [layer.conv.out_channels for layer in self.conv_layers], alive)

    def num_params(self, channels: Sequence[Tensor | int]) -> Tensor | int:
        """Parameters of the extractor with these numbers of live channels."""
        total = channels[-1]  # dummy_weight
        for layer, num_in, num_out in zip(self.conv_layers, [1, *channels], channels):
            total = total + layer.num_params(num_in, num_out)
        return total

    def num_macs(self, lengths: Tensor, channels: Sequence[Tensor | int]) -> Tensor | int:
        """Multiply-accumulates for waveforms of ``lengths`` [B] samples with these numbers of live channels."""
        total: Tensor | int = 0
        for layer, num_in, num_out in zip(self.conv_layers, [1, *channels], channels):
            lengths = layer.output_length(lengths)
            total = total + layer.num_macs(lengths, num_in, num_out)
        return total


class FeatureProjection(nn.Module):
    """Layer norm over the live channels, linear map to the Transformer's width, dropout.

    Thin students whose extractor is as wide as their Transformer have no linear map, DistilHuBERT has no norm.
    """

    def __init__(
        self, in_features: int, out_features: int, dropout: float, linear: bool = True, norm: bool = True
    ) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(in_features) if norm else None
        self.projection = nn.Linear(in_features, out_features) if linear else None
        self.dropout = Dropout(dropout)

    def live_weights(self, gate: Gate | None) -> dict[str, Tensor]:
        """What exists of the weights, by name, under the gate of the last conv layer."""
        live: dict[str, Tensor] = {}
        if self.layer_norm is not None:
            live["layer_norm.weight"] = select(self.layer_norm.weight, gate, 0)
            live["layer_norm.bias"] = select(self.layer_norm.bias, gate, 0)
        if self.projection is not None:
            live["projection.weight"] = select(self.projection.weight, gate, 1)
        return live

    def forward(self, x: Tensor, gate: Gate | None) -> Tensor:
        """[B, T, c] -> [B, T, D]."""
        live = self.live_weights(gate)
        if self.layer_norm is not None:
            x = LiveNorm(live["layer_norm.weight"], live["layer_norm.bias"], self.layer_norm.eps).over_channels(x)
        if self.projection is not None:
            x = linear(x, live["projection.weight"], self.projection.bias)
        return self.dropout(x)

    def num_params(self, num_in: Tensor | int) -> Tensor | int:
        """Parameters with ``num_in`` live channels."""
        width = 0 if self.projection is None else self.projection.out_features
        return num_in * (2 * (self.layer_norm is not None) + width) + width

    def num_macs(self, frames: Tensor, num_in: Tensor | int) -> Tensor | int:
        """Multiply-accumulates of ``frames`` [B] with ``num_in`` live channels."""
        return 0 if self.projection is None else int(frames.sum()) * num_in * self.projection.out_features
