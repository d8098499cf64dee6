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
    if set(counts) != {width}:
        slots, start = [], 0
        for count in counts:
            slots += [*range(start, start + count), *[sum(counts)] * (width - count)]
            start += count
        x = F.pad(x, (0, 1)).index_select(-1, _on(slots, x))
    return x.unflatten(-1, (len(counts), width)).transpose(1, 2)


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

    @property
    def num(self) -> int | None:
        """How many, if not all."""
        return None if self.heads is None else self.heads.num_live

    def numbers(self, total: int) -> list[int]:
        """Which of ``total``."""
        return list(range(total)) if self.heads is None or self.heads.index is None else self.heads.index.tolist()


def live_heads(queries: Gate, values: Gate, of: HeadChannels) -> LiveHeads:
    """The heads that have channels of both kinds, and these channels.

    Args:
        queries: gate of the channels of queries and keys.
        values: gate of those of values.
        of: how many channels each head has without gates.
    """
    gates = queries, values
    on = [
        torch.ones(sum(counts), dtype=torch.bool) if gate.alive is None else gate.alive
        for gate, counts in zip(gates, of)
    ]
    parts = [list(one.split(list(counts))) for one, counts in zip(on, of)]
    exists = [bool(q.any() and v.any()) for q, v in zip(*parts)]
    kept = [head for head, there in enumerate(exists) if there]
    if len(kept) < len(exists):
        parts = [[part & there for part, there in zip(kind, exists)] for kind in parts]
        queries, values = (_narrowed(gate, one, torch.cat(kind)) for gate, one, kind in zip(gates, on, parts))
    counts = (tuple(int(kind[head].sum()) for head in kept) for kind in parts)
    index = None if len(kept) == len(exists) else torch.tensor(kept, dtype=torch.int64)
    device = None if queries.value is None else queries.value.device
    heads = Gate(None if index is None else index.to(device, non_blocking=True), None, len(kept))
    return LiveHeads(heads, queries, values, HeadChannels(*counts))


def _narrowed(gate: Gate, on: Tensor, kept: Tensor) -> Gate:
    """The gate with only those [n] (bool, on the host) of its live units."""
    device = None if gate.value is None else gate.value.device
    index = kept.nonzero()[:, 0].to(device, non_blocking=True)
    which = kept[on].nonzero()[:, 0].to(device, non_blocking=True)
    value = None if gate.value is None else gate.value.index_select(0, which)
    return Gate(index, value, len(index), kept)


def expected(queries: Tensor, values: Tensor, of: HeadChannels) -> tuple[Tensor, Tensor, Tensor]:
    """Expected channels of queries and of values that exist, and the probability [h] that each head does.

    Args:
        queries: probability [n] of each channel of queries and keys.
        values: the same of values.
        of: as for :func:`live_heads`.
    """
    parts = [one.split(list(counts)) for one, counts in zip((queries, values), of)]
    sums, some = (
        [torch.stack([what(part) for part in kind]) for kind in parts]
        for what in (torch.sum, lambda part: 1 - probability_none(part))
    )
    return (sums[0] * some[1]).sum(), (sums[1] * some[0]).sum(), some[0] * some[1]
