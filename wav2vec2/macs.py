"""Multiply-accumulates of a model in closed form, for reports and for compute budgets.

Counted: convolutions, linear layers, and both products of the attention (queries with keys, weights with values).
Not counted, as in the usual counters: norms, activations, softmax, lookups and other work per element.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .attention import SelfAttention, WavLMSelfAttention
from .feature_extractor import FeatureExtractor
from .hardconcrete import Alive, HardConcrete, alive_probabilities, expected_live
from .model import Wav2Vec2Model
from .transformer import FeedForward, Transformer


def num_macs(model: Wav2Vec2Model, num_samples: int | Sequence[int]) -> int:
    """Multiply-accumulates of ``extract_features``, rounded from :func:`expected_macs` where there are masks.

    Args:
        model: dense or masked.
        num_samples: length of an utterance in samples at 16 kHz; for several, each runs alone and the sum is returned.
    """
    return round(expected_macs(model, num_samples).item())


def expected_macs(model: Wav2Vec2Model, num_samples: int | Sequence[int], alive: Alive | None = None) -> Tensor:
    """Expected multiply-accumulates as a float64 scalar, differentiable in every ``log_alpha``.

    Args:
        model: dense or masked.
        num_samples: as for :func:`num_macs`.
        alive: probability of each unit of a mask; by default what the masks say.
    """
    if alive is None:
        alive = alive_probabilities(model.masks().values())
    lengths = torch.tensor([num_samples] if isinstance(num_samples, int) else list(num_samples))
    extractor, projection = model.feature_extractor, model.encoder.feature_projection.projection
    frames = extractor.output_length(lengths)
    total = _extractor(extractor, lengths, alive)
    if projection is not None:
        total = total + int(frames.sum()) * extractor.num_live(alive)[-1] * projection.out_features
    total = total + _transformer(model.encoder.transformer, frames, alive)
    return total if isinstance(total, Tensor) else torch.tensor(total, dtype=torch.float64)


def _live(mask: HardConcrete | None, num_units: int, alive: Alive) -> Tensor | int:
    return num_units if mask is None else expected_live(mask, alive(mask))


def _extractor(extractor: FeatureExtractor, lengths: Tensor, alive: Alive) -> Tensor | int:
    channels = extractor.num_live(alive)
    total: Tensor | int = 0
    for layer, num_in, num_out in zip(extractor.conv_layers, [1, *channels], channels):
        lengths = layer.output_length(lengths)
        total = total + int(lengths.sum()) * layer.conv.kernel_size[0] * num_in * num_out
    return total


def _transformer(transformer: Transformer, frames: Tensor, alive: Alive) -> Tensor | int:
    conv = transformer.pos_conv_embed.conv
    # published counts include the frame too many that an even kernel with equal padding makes
    positions = (frames + (conv.kernel_size + 1) % 2)[frames > 0]
    total: Tensor | int = int(positions.sum()) * conv.weight_v.numel()
    if transformer.time_reduction is not None:
        frames = (frames + transformer.reduction - 1) // transformer.reduction
        total = total + int(frames.sum()) * transformer.time_reduction.weight.numel()
    has_position_bias = transformer.position_block() is not None
    for layer, source in zip(transformer.layers, transformer.attention_sources()):
        if layer.attention is not None and source is not None:
            total = total + _attention(layer.attention, source, frames, has_position_bias, alive)
        if layer.feed_forward is not None:
            total = total + _feed_forward(layer.feed_forward, frames, alive)
    return total


def _attention(
    block: SelfAttention, source: SelfAttention, frames: Tensor, has_position_bias: bool, alive: Alive
) -> Tensor | int:
    # of one head: q, k, v and output projections and two products; v, output and one product where a map is reused
    per_frame = (2 if block.reuse else 4) * block.embed_dim * block.head_dim
    per_pair = (1 if block.reuse else 2) * block.head_dim
    if isinstance(block, WavLMSelfAttention) and has_position_bias and block.num_heads > 0:
        per_frame += block.gru_rel_pos_linear.weight.numel()
    per_head = int(frames.sum()) * per_frame + int(frames.square().sum()) * per_pair
    total = per_head * _live(source.hard_concrete_for_heads, block.num_heads, alive)
    for gated in {block, source}:
        total = total * _live(gated.hard_concrete_for_layer, 1, alive)
    return total


def _feed_forward(block: FeedForward, frames: Tensor, alive: Alive) -> Tensor | int:
    first = block.intermediate_dense
    num_units = _live(block.hard_concrete_for_intermediate, first.out_features, alive)
    per_unit = int(frames.sum()) * 2 * first.in_features
    return per_unit * num_units * _live(block.hard_concrete_for_layer, 1, alive)
