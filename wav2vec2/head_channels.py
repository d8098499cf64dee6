"""Heads of unequal width: of its queries and keys, and of its values, each has only some channels.

A head exists while it has channels of both. Whatever its width, its scores are divided by the square root of that of
the whole head, E.

Shapes: B batch, T frames, h live heads, n channels of all of them, w of the widest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .hardconcrete import Gate, probability_none


class HeadChannels(NamedTuple):
    """How many channels each head has."""

    queries: tuple[int, ...]  # and as many keys
    values: tuple[int, ...]

    @property
    def width(self) -> int:
        """Of the widest."""
        return max(*self.queries, *self.values)

    @property
    def config(self) -> list[list[int]]:
        """What the flat config says of the layer: [queries, values] of every head."""
        return [list(pair) for pair in zip(*self)]

    @classmethod
    def read(cls, config: Sequence[Sequence[int]]) -> HeadChannels:
        """The way back from :attr:`config`."""
        return cls(tuple(pair[0] for pair in config), tuple(pair[1] for pair in config))


def side_by_side(x: Tensor, counts: Sequence[int], width: int) -> Tensor:
    """Channels of all heads [B, T, n] -> [B, h, T, w], with zeros beside those of narrow heads."""
    return by_head(x, counts, width).transpose(1, 2)


def by_head(x: Tensor, counts: Sequence[int], width: int) -> Tensor:
    """Channels of all heads [..., n] -> [..., h, w], with zeros beside those of narrow heads."""
    if set(counts) != {width}:
        slots, start = [], 0
        for count in counts:
            slots += [*range(start, start + count), *[sum(counts)] * (width - count)]
            start += count
        x = F.pad(x, (0, 1)).index_select(-1, _on(slots, x))
    return x.unflatten(-1, (len(counts), width))


def without_gaps(x: Tensor, counts: Sequence[int], width: int) -> Tensor:
    """Heads of equal width [B, T, h w] -> the channels that they have [B, T, n]."""
    if set(counts) == {width}:
        return x
    return x.index_select(-1, _on([i * width + e for i, count in enumerate(counts) for e in range(count)], x))


def _on(numbers: list[int], x: Tensor) -> Tensor:
    return torch.tensor(numbers).to(x.device, non_blocking=True)


class LiveHeads(NamedTuple):
    """What exists of the heads of a block in one pass."""

    heads: Gate | None = None  # None for all
    queries: Gate | None = None  # their channels, one after another
    values: Gate | None = None
    channels: HeadChannels | None = None  # of each; None where all have E of both

    def numbers(self, total: int) -> list[int]:
        """Which of ``total``."""
        return list(range(total)) if self.heads is None or self.heads.index is None else self.heads.index.tolist()


def head_of(counts: Sequence[int]) -> Tensor:
    """The head [n] (int64, on the host) of each channel."""
    return torch.arange(len(counts)).repeat_interleave(torch.tensor(counts, dtype=torch.int64))


def numbers_alive(queries: Gate, values: Gate, of: HeadChannels) -> tuple[Tensor, Tensor]:
    """How many channels of queries and of values each head has [h] (int64, on the host): none of either without both.

    Args:
        queries: gate of the channels of queries and keys.
        values: gate of those of values.
        of: how many channels each head has without gates.
    """
    q, v = (
        torch.tensor(counts)
        if gate.alive is None
        else torch.zeros(len(counts), dtype=torch.int64).index_add_(0, head_of(counts), gate.alive.long())
        for gate, counts in zip((queries, values), of)
    )
    return q * (v > 0), v * (q > 0)


def live_heads(queries: Gate, values: Gate, of: HeadChannels) -> LiveHeads:
    """The heads that exist and their channels; arguments as of :func:`numbers_alive`."""
    numbers = numbers_alive(queries, values, of)
    exists = numbers[0] > 0
    channels = HeadChannels(*(tuple(number[exists].tolist()) for number in numbers))
    if exists.all():
        return LiveHeads(Gate(None, None, len(exists)), queries, values, channels)
    queries, values = (_of_heads(gate, exists[head_of(counts)]) for gate, counts in zip((queries, values), of))
    index = exists.nonzero()[:, 0].to(_device(queries), non_blocking=True)
    return LiveHeads(Gate(index, None, len(index), exists), queries, values, channels)


def _of_heads(gate: Gate, exists: Tensor) -> Gate:
    """The gate without the channels whose heads do not exist ([n] bool, on the host)."""
    on = torch.ones_like(exists) if gate.alive is None else gate.alive
    kept = on & exists
    index, which = (one.nonzero()[:, 0].to(_device(gate), non_blocking=True) for one in (kept, kept[on]))
    return Gate(index, None if gate.value is None else gate.value.index_select(0, which), len(index), kept)


def _device(gate: Gate) -> torch.device | None:
    return None if gate.value is None else gate.value.device


def expected(queries: Tensor, values: Tensor, of: HeadChannels) -> tuple[Tensor, Tensor, Tensor]:
    """Expected channels of queries and of values that exist, and the probability [..., h] that each head does.

    Args:
        queries: probability [..., n] of each channel of queries and keys.
        values: the same of values.
        of: as for :func:`live_heads`.
    """
    # a channel that no head has is certain not to live
    q, v = (by_head(one, counts, max(counts)) for one, counts in zip((queries, values), of))
    any_q, any_v = (1 - probability_none(one) for one in (q, v))
    return (q.sum(-1) * any_v).sum(-1), (v.sum(-1) * any_q).sum(-1), any_q * any_v
