"""Self-attention with prunable heads, plain and with WavLM's gated relative position bias.

Shapes: B batch, T frames, D width, H heads (h of them live), E head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .hardconcrete import Alive, Gate, Gates, HardConcrete, probability_none, scale, select
from .kernels import attend, attention_weights, dropout, linear, traced

HEAD_DROP_RATE = 0.01  # initial probability that a head is dropped (released DPHuBERT)
LAYER_DROP_RATE = 0.01  # the same for a whole attention or feed-forward block


@dataclass
class AttentionMap:
    """What a block computes and later blocks may reuse: its attention weights and the gates of its heads."""

    weights: Tensor  # [B, h, T, T] before dropout; each row sums to 1
    heads: Gate | None


class SelfAttention(nn.Module):
    """Multi-head self-attention; q, k, v and output projections as in torchaudio, masks over heads and the block.

    With ``reuse`` the block has no queries and keys: it applies the map of an earlier block to its own values
    (ARMHuBERT, https://arxiv.org/abs/2305.11685, section 2.1). The map is used as it is, without a second softmax. Its
    heads are those of the block that computes it: one gate per head serves that block and all that reuse its map, and
    where that block does not exist, neither do they.

    Args:
        embed_dim: D.
        num_heads: H, may differ per layer.
        head_dim: E.
        dropout: on the attention weights.
        prune_heads: give each head a gate.
        prune_layer: give the block a gate.
        reuse: take the attention map of an earlier block.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int,
        dropout: float,
        prune_heads: bool,
        prune_layer: bool,
        reuse: bool = False,
    ) -> None:
        super().__init__()
        self.embed_dim, self.num_heads, self.head_dim, self.dropout = embed_dim, num_heads, head_dim, dropout
        self.reuse = reuse
        self.keep_map = False  # later blocks reuse the map of this one
        if num_heads > 0:
            if not reuse:
                self.k_proj = nn.Linear(embed_dim, num_heads * head_dim)
            self.v_proj = nn.Linear(embed_dim, num_heads * head_dim)
            if not reuse:
                self.q_proj = nn.Linear(embed_dim, num_heads * head_dim)
            self.out_proj = nn.Linear(num_heads * head_dim, embed_dim)
        prune_heads, prune_layer = prune_heads and num_heads > 0 and not reuse, prune_layer and num_heads > 0
        self.hard_concrete_for_heads = HardConcrete(num_heads, HEAD_DROP_RATE) if prune_heads else None
        self.hard_concrete_for_layer = HardConcrete(1, LAYER_DROP_RATE) if prune_layer else None

    def is_alive(self, gates: Gates) -> bool:
        """Whether anything of the block exists under these gates; a reused map must exist besides."""
        heads, layer = gates.get(self.hard_concrete_for_heads), gates.get(self.hard_concrete_for_layer)
        num_heads = self.num_heads if heads is None else heads.num_live
        return num_heads > 0 and (layer is None or layer.num_live > 0)

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
            heads = source.heads
        else:
            source, heads = None, gates.get(self.hard_concrete_for_heads)
        layer = gates.get(self.hard_concrete_for_layer)
        batch, num_frames, _ = x.shape
        p = self.dropout if self.training else 0.0
        v = self._project(x, self.v_proj, heads)
        mixed: Tensor | None = None
        if not self.reuse:
            q, k = self._project(x, self.q_proj, heads), self._project(x, self.k_proj, heads)
            mask = self._attention_mask(x, valid, position_bias, heads)
            if keep_map or self.keep_map:
                source = AttentionMap(attention_weights(q, k, mask), heads)
            else:  # fused: faster, but it does not return the map
                mixed = attend(q, k, v, mask, p)
        if mixed is None:
            assert source is not None
            mixed = dropout(source.weights, p).to(v.dtype) @ v
        if torch.compiler.is_exporting():  # a graph must not depend on the memory layout that a kernel leaves
            x = torch.cat(mixed.unbind(1), dim=-1)
        else:
            x = mixed.transpose(1, 2).reshape(batch, num_frames, -1)
        weight: Tensor = self.out_proj.weight
        if heads is not None:
            weight = weight.view(self.embed_dim, self.num_heads, self.head_dim)
            weight = scale(select(weight, heads, 1), heads, 1).flatten(1)
        return linear(x, scale(weight, layer, 0), scale(self.out_proj.bias, layer, 0)), source

    def _project(self, x: Tensor, projection: nn.Linear, heads: Gate | None) -> Tensor:
        weight: Tensor = projection.weight
        bias: Tensor = projection.bias
        if heads is not None and heads.index is not None:
            weight = select(weight.view(self.num_heads, self.head_dim, -1), heads, 0).flatten(0, 1)
            bias = select(bias.view(self.num_heads, self.head_dim), heads, 0).flatten()
        return linear(x, weight, bias).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _attention_mask(
        self, x: Tensor, valid: Tensor | None, position_bias: Tensor | None, heads: Gate | None
    ) -> Tensor | None:
        return valid

    def num_params(self, alive: Alive, source: SelfAttention | None = None) -> Tensor | int:
        """Expected parameters: biases shared by the heads exist while any head does.

        Args:
            alive: probability of each unit of a mask.
            source: the block whose map this one reuses, if it does.
        """
        if self.num_heads == 0:
            return 0
        source = source if self.reuse and source is not None else self
        num_inputs = 1 if self.reuse else 3  # values; queries and keys
        per_head = (num_inputs + 1) * self.embed_dim * self.head_dim + num_inputs * self.head_dim
        shared = self._num_shared_params()
        if source.hard_concrete_for_heads is None:
            total: Tensor | int = self.num_heads * per_head + shared
        else:
            heads = alive(source.hard_concrete_for_heads)
            total = heads.sum() * per_head + (1 - probability_none(heads)) * shared
        for block in {self, source}:
            if block.hard_concrete_for_layer is not None:
                total = total * alive(block.hard_concrete_for_layer).sum()
        return total

    def _num_shared_params(self) -> int:
        return self.embed_dim

    def probability_alive(self, alive: Alive) -> Tensor | int:
        """P(the block exists)."""
        result: Tensor | int = int(self.num_heads > 0)
        if self.hard_concrete_for_heads is not None:
            result = 1 - probability_none(alive(self.hard_concrete_for_heads))
        if self.hard_concrete_for_layer is not None:
            result = result * alive(self.hard_concrete_for_layer).sum()
        return result


class WavLMSelfAttention(SelfAttention):
    """Self-attention whose position bias is gated by the input (WavLM, https://arxiv.org/abs/2110.13900, section III).

    Args:
        embed_dim: D.
        total_num_heads: heads of the unpruned layer; the position bias and the gate constant keep that many.
        remaining_heads: which of them this layer has.
        dropout: on the attention weights.
        num_buckets: buckets of the position embedding; only layer 0 has one, shared by all layers.
        max_distance: frames beyond which all distances share a bucket.
        has_position_embedding: True for layer 0.
        prune_heads: give each head a gate.
        prune_layer: give the block a gate.
    """

    def __init__(
        self,
        embed_dim: int,
        total_num_heads: int,
        remaining_heads: list[int],
        dropout: float,
        num_buckets: int,
        max_distance: int,
        has_position_embedding: bool,
        prune_heads: bool,
        prune_layer: bool,
    ) -> None:
        super().__init__(
            embed_dim, len(remaining_heads), embed_dim // total_num_heads, dropout, prune_heads, prune_layer
        )
        self.total_num_heads, self.remaining_heads = total_num_heads, list(remaining_heads)
        self._heads_on: Tensor | None = None
        self.num_buckets, self.max_distance = num_buckets, max_distance
        self.rel_attn_embed = nn.Embedding(num_buckets, total_num_heads) if has_position_embedding else None
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
        assert self.rel_attn_embed is not None
        distance = torch.arange(1 - num_frames, num_frames, device=self.rel_attn_embed.weight.device)
        by_distance = self.rel_attn_embed(self._bucket(distance)).t()  # [H, 2T - 1], key minus query
        frames = torch.arange(num_frames, device=distance.device)
        return by_distance[:, frames[None, :] - frames[:, None] + num_frames - 1]

    def _bucket(self, distance: Tensor) -> Tensor:
        """T5's buckets: half of them per sign, exact up to a quarter of all, logarithmic up to ``max_distance``."""
        half = self.num_buckets // 2
        exact = half // 2
        magnitude = distance.abs()
        # divide, then multiply: the other order rounds some distances into the neighbouring bucket
        log_ratio = torch.log(magnitude.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = exact + (log_ratio * (half - exact)).long()
        bucket = torch.where(magnitude < exact, magnitude, far.clamp(max=half - 1))
        return bucket + (distance > 0) * half

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
        gate = self.gru_rel_pos_linear(by_head).unflatten(-1, (2, 4)).sum(-1).sigmoid()
        update, reset = gate.chunk(2, dim=-1)
        bias = (update * (reset * const - 1) + 2) * position_bias  # [B, h, T, T]
        return bias if valid is None else bias.masked_fill(~valid, -math.inf)

    def _num_shared_params(self) -> int:
        return (
            self.embed_dim
            + sum(p.numel() for p in self.gru_rel_pos_linear.parameters())
            + self.gru_rel_pos_const.numel()
        )
