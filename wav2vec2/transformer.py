"""Transformer encoder with prunable feed-forward units; blocks may be missing and sizes differ per layer.

Shapes: B batch, T frames, D width, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import LAYER_DROP_RATE, SelfAttention, WavLMSelfAttention, probability_any
from .feature_extractor import FeatureProjection, valid_frames
from .hardconcrete import Alive, Gates, HardConcrete, scale, select, touch

FFN_DROP_RATE = 0.5  # initial probability that an FFN unit is dropped (released DPHuBERT)


class WeightNormConv1d(nn.Module):
    """Grouped 1-D convolution whose weight is ``g * v / ||v||`` per kernel position (as ``weight_norm(dim=2)``).

    Written out, not with ``torch.nn.utils.weight_norm``, whose hook makes a model impossible to deep-copy. Loads the
    parametrised spelling of its weights too.
    """

    def __init__(self, channels: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.groups, self.padding = groups, kernel_size // 2
        weight = torch.empty(channels, channels // groups, kernel_size)
        nn.init.normal_(weight, 0.0, (4.0 / (kernel_size * channels)) ** 0.5)
        self.weight_g = nn.Parameter(torch.linalg.vector_norm(weight, dim=(0, 1), keepdim=True))
        self.weight_v = nn.Parameter(weight)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_load_state_dict_pre_hook(_rename_weight_norm)

    def forward(self, x: Tensor) -> Tensor:
        """[B, D, T] -> [B, D, T + 2 * (K // 2) - K + 1]."""
        norm = torch.linalg.vector_norm(self.weight_v, dim=(0, 1), keepdim=True)
        return F.conv1d(x, self.weight_v * (self.weight_g / norm), self.bias, padding=self.padding, groups=self.groups)


def _rename_weight_norm(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
    for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
        key = f"{prefix}parametrizations.weight.{new}"
        if key in state_dict:
            state_dict[prefix + old] = state_dict.pop(key)


class ConvolutionalPositionalEmbedding(nn.Module):
    """Relative position from a wide convolution over the frames."""

    def __init__(self, embed_dim: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.conv = WeightNormConv1d(embed_dim, kernel_size, groups)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, D] -> [B, T, D]."""
        num_frames = x.shape[1]
        return F.gelu(self.conv(x.transpose(1, 2))[..., :num_frames]).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with GELU; masks over the intermediate units and the block."""

    def __init__(
        self,
        embed_dim: int,
        interm_features: int,
        interm_dropout: float,
        dropout: float,
        prune_intermediate: bool,
        prune_layer: bool,
    ) -> None:
        super().__init__()
        self.intermediate_dense = nn.Linear(embed_dim, interm_features)
        self.intermediate_dropout = nn.Dropout(interm_dropout)
        self.output_dense = nn.Linear(interm_features, embed_dim)
        self.output_dropout = nn.Dropout(dropout)
        self.hard_concrete_for_intermediate = (
            HardConcrete(interm_features, FFN_DROP_RATE) if prune_intermediate else None
        )
        self.hard_concrete_for_layer = HardConcrete(1, LAYER_DROP_RATE) if prune_layer else None

    def is_alive(self, gates: Gates) -> bool:
        """Whether anything of the block exists under these gates."""
        units, layer = gates.get(self.hard_concrete_for_intermediate), gates.get(self.hard_concrete_for_layer)
        return (units is None or units.num_live > 0) and (layer is None or layer.num_live > 0)

    def forward(self, x: Tensor, gates: Gates) -> Tensor:
        """[B, T, D] -> [B, T, D], through the live units, of which there is at least one."""
        units, layer = gates.get(self.hard_concrete_for_intermediate), gates.get(self.hard_concrete_for_layer)
        first, second = self.intermediate_dense, self.output_dense
        x = F.gelu(F.linear(x, select(first.weight, units, 0), select(first.bias, units, 0)))
        x = self.intermediate_dropout(x)
        weight = scale(scale(select(second.weight, units, 1), units, 1), layer, 0)
        return self.output_dropout(F.linear(x, weight, scale(second.bias, layer, 0)))

    def num_params(self, alive: Alive) -> Tensor | int:
        """Expected parameters: the output bias exists while any unit does."""
        width = self.intermediate_dense.in_features
        if self.hard_concrete_for_intermediate is None:
            total: Tensor | int = self.intermediate_dense.out_features * (2 * width + 1) + width
        else:
            units = alive(self.hard_concrete_for_intermediate)
            total = units.sum() * (2 * width + 1) + probability_any(units) * width
        if self.hard_concrete_for_layer is not None:
            total = total * alive(self.hard_concrete_for_layer).sum()
        return total


class EncoderLayer(nn.Module):
    """Attention and feed-forward blocks with residuals; post-norm (Base) or pre-norm (Large). A block may be None."""

    def __init__(
        self,
        attention: SelfAttention | None,
        dropout: float,
        layer_norm_first: bool,
        feed_forward: FeedForward | None,
        embed_dim: int,
    ) -> None:
        super().__init__()
        self.attention = attention
        self.dropout = nn.Dropout(dropout)
        self.layer_norm = nn.LayerNorm(embed_dim)
        self.layer_norm_first = layer_norm_first
        self.feed_forward = feed_forward
        self.final_layer_norm = nn.LayerNorm(embed_dim)

    def forward(self, x: Tensor, valid: Tensor | None, position_bias: Tensor | None, gates: Gates) -> Tensor:
        """[B, T, D] -> [B, T, D]; the other arguments as for SelfAttention."""
        norm_first = self.layer_norm_first
        if self.attention is None or not self.attention.is_alive(gates):
            x = touch(x, self.attention, self.layer_norm)
        else:
            x = x + self.dropout(self.attention(self.layer_norm(x) if norm_first else x, valid, position_bias, gates))
        if not norm_first:
            x = self.layer_norm(x)
        if self.feed_forward is None or not self.feed_forward.is_alive(gates):
            x = touch(x, self.feed_forward, self.final_layer_norm)
        else:
            x = x + self.feed_forward(self.final_layer_norm(x) if norm_first else x, gates)
        return x if norm_first else self.final_layer_norm(x)

    def num_params(self, alive: Alive) -> Tensor | int:
        """Expected parameters, the layer's own norms included."""
        total: Tensor | int = sum(p.numel() for m in (self.layer_norm, self.final_layer_norm) for p in m.parameters())
        for block in (self.attention, self.feed_forward):
            if block is not None:
                total = total + block.num_params(alive)
        return total


class Transformer(nn.Module):
    """Positional convolution, layers, and one layer norm: before the layers (post-norm) or after them (pre-norm)."""

    def __init__(
        self,
        pos_conv_embed: nn.Module,
        dropout: float,
        layers: Sequence[EncoderLayer],
        layer_norm_first: bool,
        layer_drop: float,
        embed_dim: int,
    ) -> None:
        super().__init__()
        self.pos_conv_embed = pos_conv_embed
        self.layer_norm = nn.LayerNorm(embed_dim)
        self.layer_norm_first = layer_norm_first  # of the layers, as in the flat config
        self.layer_drop = layer_drop
        self.dropout = nn.Dropout(dropout)
        self.layers = cast(Sequence[EncoderLayer], nn.ModuleList(layers))

    def position_bias(self, num_frames: int) -> Tensor | None:
        """WavLM's bias [H, T, T] from layer 0, which outlives that layer's heads; None for other models."""
        first = self.layers[0].attention if len(self.layers) else None
        if not isinstance(first, WavLMSelfAttention) or first.rel_attn_embed is None:
            return None
        return first.position_bias(num_frames)

    def hidden_states(
        self, x: Tensor, valid: Tensor | None, gates: Gates, num_layers: int | None = None, layer_drop: float = 0.0
    ) -> list[Tensor]:
        """Outputs [B, T, D] of the first ``num_layers`` layers (all by default), without the final layer norm."""
        x = x + self.pos_conv_embed(x)
        if not self.layer_norm_first:
            x = self.layer_norm(x)
        x = self.dropout(x)
        layers = self.layers[:num_layers]
        position_bias = self.position_bias(x.shape[1]) if len(layers) else None
        states = []
        for layer in layers:
            if layer_drop == 0.0 or torch.rand(()).item() > layer_drop:
                x = layer(x, valid, position_bias, gates)
            else:
                x = touch(x, layer)
            states.append(x)
        return states

    def num_params(self, alive: Alive) -> Tensor | int:
        """Expected parameters of the positional convolution, norms and layers."""
        fixed = (self.pos_conv_embed, self.layer_norm)
        total: Tensor | int = sum(p.numel() for module in fixed for p in module.parameters())
        none_alive: Tensor | int = 1
        for layer in self.layers:
            total = total + layer.num_params(alive)
            if layer.attention is not None:
                none_alive = none_alive * (1 - layer.attention.probability_alive(alive))
        first = self.layers[0].attention if len(self.layers) else None
        if isinstance(first, WavLMSelfAttention) and first.rel_attn_embed is not None:
            total = total + first.rel_attn_embed.weight.numel() * (1 - none_alive)
        return total


class Encoder(nn.Module):
    """Feature projection and Transformer."""

    def __init__(self, feature_projection: FeatureProjection, transformer: Transformer) -> None:
        super().__init__()
        self.feature_projection = feature_projection
        self.transformer = transformer

    def hidden_states(
        self,
        features: Tensor,
        lengths: Tensor | None,
        gates: Gates,
        gate_in: HardConcrete | None,
        num_layers: int | None = None,
        layer_drop: float = 0.0,
    ) -> list[Tensor]:
        """Index 0: the Transformer's input after the feature projection; then the layers. Each [B, T, D].

        Args:
            features: [B, T, c] from the extractor.
            lengths: [B] valid frames; None when nothing is padded.
            gates: as drawn for this pass.
            gate_in: mask of the extractor's last layer.
            num_layers: stop after that many layers.
            layer_drop: probability of skipping a layer.
        """
        x = self.feature_projection(features, gates.get(gate_in))
        valid = None
        if lengths is not None:
            frames = valid_frames(lengths, x.shape[1])
            x = x * frames[..., None].to(x.dtype)
            # a row without a valid frame attends to its zeros: softmax over nothing would be NaN
            valid = (frames | (lengths == 0)[:, None])[:, None, None, :]
        return [x, *self.transformer.hidden_states(x, valid, gates, num_layers, layer_drop)]
