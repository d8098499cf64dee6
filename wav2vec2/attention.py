"""Self-attention with prunable heads, plain and with WavLM's gated relative position bias.

Shapes: B batch, T frames, D width, H heads (h of them live), E head width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from .counting import count_params
from .hardconcrete import (
    Alive,
    Gate,
    Gates,
    HardConcrete,
    Prunable,
    Pruned,
    live_units,
    num_live,
    probability_none,
    scale,
    select,
)
from .head_channels import HeadChannels, LiveHeads, expected, live_heads, numbers_alive, side_by_side, without_gaps
from .kernels import attend, attention_weights, dropout, linear, traced

HEAD_DROP_RATE = 0.01  # initial probability that a head is dropped (released DPHuBERT)
LAYER_DROP_RATE = 0.01  # the same for a whole attention or feed-forward block


@dataclass
class AttentionMap:
    """What a block computes and later blocks may reuse: its attention weights and the gates of its heads."""

    weights: Tensor  # [B, h, T, T] before dropout; each row sums to 1
    heads: LiveHeads
    applied: Tensor  # [B, h, T, T]: what the block itself mixes its values with, before dropout


class SelfAttention(nn.Module):
    """Multi-head self-attention; q, k, v and output projections as in torchaudio, masks over heads and the block.

    With ``reuse`` the block has no queries and keys: it applies the map of an earlier block to its own values
    (ARMHuBERT, https://arxiv.org/abs/2305.11685, section 2.1), without dropout on it. ``"map"`` uses the map as it is,
    as the paper has it; ``"softmax"`` puts it through a second softmax over the valid frames, as the released code
    does. Its heads are those of the block that computes it: one gate per head serves that block and all that reuse its
    map, and where that block does not exist, neither do they.

    Args:
        embed_dim: D.
        heads: H, may differ per layer; in WavLM which of the unpruned layer's heads these are.
        head_dim: E.
        dropout: on the attention weights.
        prunable: what gets gates.
        reuse: take the attention map of an earlier block, in which form; None to compute one.
        channels: how many each head has, where they are not E of all.

    Raises:
        ValueError: gates over whole heads that have unequal channels, or over channels where a map is reused.
    """

    def __init__(
        self,
        embed_dim: int,
        heads: int | Sequence[int],
        head_dim: int,
        dropout: float,
        prunable: Prunable,
        reuse: Literal["map", "softmax"] | None = None,
        channels: HeadChannels | None = None,
    ) -> None:
        super().__init__()
        self.remaining_heads = list(heads) if isinstance(heads, Sequence) else None
        num_heads = len(heads) if isinstance(heads, Sequence) else heads
        self.embed_dim, self.num_heads, self.head_dim, self.dropout = embed_dim, num_heads, head_dim, dropout
        self.reuse: Literal["map", "softmax"] | None = reuse
        self.keep_map = False  # later blocks reuse the map of this one
        self.channels = channels
        if prunable.channels and (prunable.units or reuse):
            raise ValueError("gates over the channels of heads go neither with gates over heads nor with reused maps")
        if channels is not None and (prunable.units or reuse):
            raise ValueError("heads of unequal channels go neither with gates over whole heads nor with reused maps")
        num_queries, num_values = (sum(counts) for counts in self.all_channels)
        if num_heads > 0:
            if not reuse:
                self.k_proj = nn.Linear(embed_dim, num_queries)
            self.v_proj = nn.Linear(embed_dim, num_values)
            if not reuse:
                self.q_proj = nn.Linear(embed_dim, num_queries)
            self.out_proj = nn.Linear(num_values, embed_dim)
        prune_heads, prune_block = prunable.units and num_heads > 0 and not reuse, prunable.block and num_heads > 0
        prune_channels = prunable.channels and num_heads > 0
        self.hard_concrete_for_heads = HardConcrete(num_heads, HEAD_DROP_RATE) if prune_heads else None
        self.hard_concrete_for_query_channels = HardConcrete(num_queries, HEAD_DROP_RATE) if prune_channels else None
        self.hard_concrete_for_value_channels = HardConcrete(num_values, HEAD_DROP_RATE) if prune_channels else None
        self.hard_concrete_for_layer = HardConcrete(1, LAYER_DROP_RATE) if prune_block else None

    def is_alive(self, gates: Gates) -> bool:
        """Whether anything of the block exists under these gates; a reused map must exist besides."""
        layer, channels = gates.get(self.hard_concrete_for_layer), self._channel_gates(gates)
        if channels is not None:
            num_heads = int((numbers_alive(*channels, self.all_channels)[0] > 0).sum())
        else:
            heads = gates.get(self.hard_concrete_for_heads)
            num_heads = self.num_heads if heads is None else heads.num_live
        return num_heads > 0 and (layer is None or layer.num_live > 0)

    def _channel_gates(self, gates: Gates) -> tuple[Gate, Gate] | None:
        queries, values = (
            gates.get(self.hard_concrete_for_query_channels),
            gates.get(self.hard_concrete_for_value_channels),
        )
        return None if queries is None or values is None else (queries, values)

    @property
    def all_channels(self) -> HeadChannels:
        """How many channels each head has."""
        return self.channels or HeadChannels((self.head_dim,) * self.num_heads, (self.head_dim,) * self.num_heads)

    def live_heads(self, gates: Gates) -> LiveHeads:
        """What exists of the heads under these gates."""
        channels = self._channel_gates(gates)
        if channels is None:
            return LiveHeads(gates.get(self.hard_concrete_for_heads), channels=self.channels)
        return live_heads(*channels, self.all_channels)

    def live_weights(self, live: LiveHeads, layer: Gate | None) -> dict[str, Tensor]:
        """What exists of the weights, by name, under the gates of the heads and of the block."""
        weights: dict[str, Tensor] = {}
        heads = live.heads if live.channels is None else None  # where channels go one by one, they are all that goes
        for name in ("v_proj",) if self.reuse else ("q_proj", "k_proj", "v_proj"):
            channels = live.values if name == "v_proj" else live.queries
            for kind, weight in getattr(self, name).named_parameters():
                weight = select(self._of_live_heads(weight, heads, 0), channels, 0)
                weights[f"{name}.{kind}"] = scale(weight, channels, 0) if name == "q_proj" else weight
        weight = self._of_live_heads(self.out_proj.weight, heads, 1, fold=True)
        weight = scale(select(weight, live.values, 1), live.values, 1)
        weights["out_proj.weight"] = scale(weight, layer, 0)
        weights["out_proj.bias"] = scale(self.out_proj.bias, layer, 0)
        return weights

    def _of_live_heads(self, weight: Tensor, heads: Gate | None, dim: int, fold: bool = False) -> Tensor:
        """Slices of a weight whose ``dim`` is H E; ``fold`` multiplies them by the values of their heads."""
        if heads is None:
            return weight
        weight = select(weight.unflatten(dim, (self.num_heads, self.head_dim)), heads, dim)
        return (scale(weight, heads, dim) if fold else weight).flatten(dim, dim + 1)

    def forward(
        self,
        x: Tensor,
        valid: Tensor | None,
        position_bias: Tensor | None,
        gates: Gates,
        source: AttentionMap | None = None,
        keep_map: bool = False,
    ) -> tuple[Tensor, AttentionMap | None]:
        """Attend over the live heads, of which there is at least one.

        Args:
            x: [B, T, D].
            valid: bool [B, 1, 1, T], False on padding; None when nothing is padded.
            position_bias: [H, T, T] of WavLM, shared by all layers; None otherwise.
            gates: as drawn for this pass.
            source: the map that this block reuses, if it does.
            keep_map: return the map though no later block reuses it.

        Returns:
            [B, T, D], and the map where it is kept or reused.
        """
        if self.reuse:
            assert source is not None
            source, heads = self._reused(source, valid), source.heads
        else:
            source, heads = None, self.live_heads(gates)
        live = self.live_weights(heads, gates.get(self.hard_concrete_for_layer))
        batch, num_frames, _ = x.shape
        p = self.dropout if self.training and not self.reuse else 0.0
        channels = heads.channels
        v = self._project(x, live, "v_proj", channels)
        mixed: Tensor | None = None
        if not self.reuse:
            q, k = (self._project(x, live, name, channels) for name in ("q_proj", "k_proj"))
            if channels is not None:  # what follows divides by the square root of the width it sees
                q = q * math.sqrt(channels.width / self.head_dim)
            mask = self._attention_mask(x, valid, position_bias, heads.heads)
            if keep_map or self.keep_map:
                weights = attention_weights(q, k, mask)
                source = AttentionMap(weights, heads, weights)
            else:  # fused: faster, but it does not return the map
                mixed = attend(q, k, v, mask, p)
        if mixed is None:
            assert source is not None
            mixed = dropout(source.applied, p).to(v.dtype) @ v
        if torch.compiler.is_exporting():  # a graph must not depend on the memory layout that a kernel leaves
            x = torch.cat(mixed.unbind(1), dim=-1)
        else:
            x = mixed.transpose(1, 2).reshape(batch, num_frames, -1)
        if channels is not None:
            x = without_gaps(x, channels.values, channels.width)
        return linear(x, live["out_proj.weight"], live["out_proj.bias"]), source

    def _reused(self, source: AttentionMap, valid: Tensor | None) -> AttentionMap:
        """An earlier block's map as this one applies it; what the blocks above get of it stays as it was."""
        if self.reuse == "map":
            return AttentionMap(source.weights, source.heads, source.weights)
        scores = source.weights if valid is None else source.weights.masked_fill(~valid, -math.inf)
        return AttentionMap(source.weights, source.heads, scores.softmax(-1))

    def _project(self, x: Tensor, live: dict[str, Tensor], name: str, channels: HeadChannels | None) -> Tensor:
        x = linear(x, live[f"{name}.weight"], live[f"{name}.bias"])
        if channels is None:
            return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        return side_by_side(x, channels.values if name == "v_proj" else channels.queries, channels.width)

    def _attention_mask(
        self, x: Tensor, valid: Tensor | None, position_bias: Tensor | None, heads: Gate | None
    ) -> Tensor | None:
        return valid

    def pruned(self, gates: Gates, source: SelfAttention, any_attention: bool) -> Pruned:
        """What is left of the block.

        Args:
            gates: as drawn for the whole model.
            source: the block whose map this one applies: itself, or with ``reuse`` an earlier one.
            any_attention: whether any block of the model is left.
        """
        heads = source.live_heads(gates)
        exists = self.is_alive(gates) and source.is_alive(gates)
        left = Pruned(config={"encoder_use_attention": exists})
        live: list[int] = []
        if exists:
            left.weights = self.live_weights(heads, gates.get(self.hard_concrete_for_layer))
            live = heads.numbers(self.num_heads)
        elif self.reuse:
            left.config["encoder_reuse_attention"] = False
        if self.remaining_heads is None:
            left.config["encoder_num_heads"] = len(live)
        else:
            left.config["encoder_remaining_heads"] = [self.remaining_heads[head] for head in live]
        if heads.channels is not None:
            left.config["encoder_head_channels"] = heads.channels.config if exists else []
        return left

    def num_params(self, alive: Alive, source: SelfAttention) -> Tensor | int:
        """Expected parameters: shared biases exist while any head does; ``source`` as for :meth:`pruned`."""
        if self.num_heads == 0:
            return 0
        queries, values, _, exists = self._expected(alive, source)
        per_query = 0 if self.reuse else 2 * (self.embed_dim + 1)  # and key
        return queries * per_query + values * (2 * self.embed_dim + 1) + exists * self._num_shared_params()

    def _num_shared_params(self) -> int:
        return self.embed_dim

    @property
    def sizes(self) -> tuple[object, ...]:
        """What the expected numbers depend on besides the masks."""
        shared = self._num_shared_params() if self.num_heads else 0
        return self.embed_dim, self.all_channels, shared, self._num_position_macs(), self.reuse

    def num_live(self, alive: Alive, source: SelfAttention) -> tuple[Tensor | int, Tensor | int]:
        """Expected number of heads, and the probability that the block exists; ``source`` as for :meth:`pruned`."""
        return self._expected(alive, source)[2:]

    def _expected(
        self, alive: Alive, source: SelfAttention
    ) -> tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int]:
        """Expected channels of queries, those of values, and what :meth:`num_live` gives."""
        counts: list[Tensor | int]
        if source.hard_concrete_for_query_channels is None or source.hard_concrete_for_value_channels is None:
            heads, exists = live_units(source.hard_concrete_for_heads, self.num_heads, alive)
            if self.channels is None:
                counts = [heads * self.head_dim, heads * self.head_dim, heads, exists]
            else:
                counts = [*map(sum, self.channels), heads, exists]
        else:
            of_queries, of_values = source.hard_concrete_for_query_channels, source.hard_concrete_for_value_channels
            num_queries, num_values, each = expected(alive(of_queries), alive(of_values), source.all_channels)
            counts = [num_queries, num_values, each.sum(-1), 1 - probability_none(each)]
        for block in (self,) if source is self else (self, source):  # a gate of either drops all of them
            gate = num_live(block.hard_concrete_for_layer, 1, alive)
            counts = [count * gate for count in counts]
        queries, values, heads, exists = counts
        return queries, values, heads, exists

    def num_macs(self, frames: Tensor, alive: Alive, source: SelfAttention, position_bias: bool) -> Tensor | int:
        """Expected multiply-accumulates of ``frames`` [B]; ``position_bias`` where the model has WavLM's."""
        num_frames, num_pairs = int(frames.sum()), int(frames.square().sum())
        queries, values, heads, _ = self._expected(alive, source)
        # of a channel of either kind: two projections and one product; a reused map has no queries
        channels = values if self.reuse else queries + values
        total = channels * (num_frames * 2 * self.embed_dim + num_pairs)
        return total + heads * num_frames * self._num_position_macs() if position_bias else total

    def _num_position_macs(self) -> int:
        """Of one head and one frame, for gating the position bias."""
        return 0


@dataclass(frozen=True)
class Buckets:
    """How WavLM's position embedding divides the distances of two frames (T5's way)."""

    num_buckets: int
    max_distance: int  # frames beyond which all distances share a bucket

    def of(self, distance: Tensor) -> Tensor:
        """Half of the buckets per sign, exact up to a quarter of all, logarithmic up to ``max_distance``."""
        half = self.num_buckets // 2
        exact = half // 2
        magnitude = distance.abs()
        # divide, then multiply: the other order rounds some distances into the neighbouring bucket
        log_ratio = torch.log(magnitude.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = exact + (log_ratio * (half - exact)).long()
        bucket = torch.where(magnitude < exact, magnitude, far.clamp(max=half - 1))
        return bucket + (distance > 0) * half


class WavLMSelfAttention(SelfAttention):
    """Self-attention whose position bias is gated by the input (WavLM, https://arxiv.org/abs/2110.13900, section III).

    Args:
        embed_dim: D.
        total_num_heads: heads of the unpruned layer; the position bias and the gate constant keep that many.
        remaining_heads: which of them this layer has.
        dropout: on the attention weights.
        buckets: of the position embedding, which layer 0 has for all layers; None for the others.
        prunable: what gets gates.
        channels: how many each head has, where they are not E of all.
    """

    remaining_heads: list[int]

    def __init__(
        self,
        embed_dim: int,
        total_num_heads: int,
        remaining_heads: Sequence[int],
        dropout: float,
        buckets: Buckets | None,
        prunable: Prunable,
        channels: HeadChannels | None = None,
    ) -> None:
        super().__init__(embed_dim, remaining_heads, embed_dim // total_num_heads, dropout, prunable, channels=channels)
        self.total_num_heads, self.buckets = total_num_heads, buckets
        self._heads_on: Tensor | None = None
        self.rel_attn_embed = None if buckets is None else nn.Embedding(buckets.num_buckets, total_num_heads)
        if self.num_heads > 0:
            self.gru_rel_pos_linear = nn.Linear(self.head_dim, 8)
            self.gru_rel_pos_const = nn.Parameter(torch.ones(1, total_num_heads, 1, 1))

    def _remaining_heads_on(self, device: torch.device) -> Tensor:
        """Their numbers [H], copied once: a copy from the host in every pass would make it wait for a GPU."""
        if traced():
            return torch.tensor(self.remaining_heads, device=device)
        if self._heads_on is None or self._heads_on.device != device:
            with torch.inference_mode(False):  # training may use what a validation made
                self._heads_on = torch.tensor(self.remaining_heads, device=device)
        return self._heads_on

    def position_bias(self, num_frames: int) -> Tensor:
        """Bias [H, T, T] of every pair of frames, computed once per forward pass for all layers and rows.

        It depends on the distance alone, so 2 T - 1 embeddings are looked up and laid out as a Toeplitz matrix.
        """
        by_distance = self.bias_by_distance(num_frames)
        frames = torch.arange(num_frames, device=by_distance.device)
        return by_distance[:, frames[None, :] - frames[:, None] + num_frames - 1]

    def bias_by_distance(self, num_frames: int) -> Tensor:
        """Bias [H, 2 T - 1] by the distance from 1 - T to T - 1 of key and query."""
        assert self.rel_attn_embed is not None and self.buckets is not None
        distance = torch.arange(1 - num_frames, num_frames, device=self.rel_attn_embed.weight.device)
        return self.rel_attn_embed(self.buckets.of(distance)).t()

    def _attention_mask(
        self, x: Tensor, valid: Tensor | None, position_bias: Tensor | None, heads: Gate | None
    ) -> Tensor | None:
        if position_bias is None:  # a released model that lost it along with all heads of layer 0
            return valid
        live = None
        if self.num_heads < self.total_num_heads or (heads is not None and heads.index is not None):
            live = self._remaining_heads_on(x.device)
            live = live if heads is None or heads.index is None else live.index_select(0, heads.index)
        by_head = x.unflatten(-1, (self.total_num_heads, self.head_dim)).transpose(1, 2)  # [B, H, T, E]
        const: Tensor = self.gru_rel_pos_const
        if live is not None:
            by_head, const, position_bias = (
                by_head.index_select(1, live),
                const.index_select(1, live),
                position_bias.index_select(0, live),
            )
        bias = self.gated(by_head, const, position_bias)  # [B, h, T, T]
        return bias if valid is None else bias.masked_fill(~valid, -math.inf)

    def gated(self, by_head: Tensor, const: Tensor, position_bias: Tensor) -> Tensor:
        """The bias [..., T, T] that a query [..., T, E] has of each key, from that of their positions."""
        gate = self.gru_rel_pos_linear(by_head).unflatten(-1, (2, 4)).sum(-1).sigmoid()
        update, reset = gate.chunk(2, dim=-1)
        return (update * (reset * const - 1) + 2) * position_bias

    def pruned(self, gates: Gates, source: SelfAttention, any_attention: bool) -> Pruned:
        """What is left of the block: its position embedding serves the layers above, and outlives the heads beside."""
        left = super().pruned(gates, source, any_attention)
        if self.rel_attn_embed is not None:
            left.config["encoder_use_attention"] = any_attention
        return left

    def _num_shared_params(self) -> int:
        return self.embed_dim + count_params(self.gru_rel_pos_linear) + self.gru_rel_pos_const.numel()

    def _num_position_macs(self) -> int:
        return self.gru_rel_pos_linear.weight.numel() if self.num_heads > 0 else 0
