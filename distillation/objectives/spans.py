"""Spans of frames to mask, as drawn for masking distillation (https://arxiv.org/abs/2305.11685, section 2.2)."""

from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np

from distillation.errors import UserError


@dataclass
class SpanConfig:
    """Spans of masked frames, which never touch. The defaults are those of the 960 h recipes."""

    probability: float = 0.8
    """Share of the frames that the drawn spans would cover; fewer are where no more spans fit."""
    span: int = 10
    """Frames per span, 50 per second."""
    spans: Literal["released", "paper"] = "released"
    """All spans equally long (paper); or drawn uniformly from 0 to twice that, and every row of a batch then cut at
    random to as many masked frames as the row with fewest has (the released files)."""
    min_space: int = 1
    """Unmasked frames between two spans, at least."""
    min_spans: int = 2
    """Spans per utterance, at least."""

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise UserError(f"masking.probability is {self.probability}: it must lie in [0, 1]")
        for name, least in (("span", 1), ("min_space", 1), ("min_spans", 0)):
            if getattr(self, name) < least:
                raise UserError(f"masking.{name} is {getattr(self, name)}: it must be at least {least}")


def draw_spans(lengths: list[int], num_frames: int, config: SpanConfig, random: np.random.Generator) -> np.ndarray:
    """Masked frames of a batch, bool [B, T].

    Args:
        lengths: B numbers of valid frames; nothing beyond them is masked.
        num_frames: T.
        config: how many and how long.
        random: source of all draws.
    """
    masked = np.zeros((len(lengths), num_frames), dtype=bool)
    for row, length in zip(masked, lengths):
        for start, span in _place(length, config, random):
            row[start : start + span] = True
    if config.spans == "released":
        counts = masked.sum(1)
        common = min(counts[counts > 0], default=0)  # a row too short for a span leaves the others theirs
        for row, count in zip(masked, counts):
            if count > common:
                row[random.choice(np.flatnonzero(row), count - common, replace=False)] = False
    return masked


def _place(length: int, config: SpanConfig, random: np.random.Generator) -> list[tuple[int, int]]:
    """(start, frames) of each span of one row.

    The number of spans is the wanted share of the row, rounded up or down at random. They are placed one by one, the
    longest first: in a gap drawn by its length among those with room, at a place drawn uniformly. The first that finds
    no room ends it, so that of a share of 0.8 in spans of 10 about two thirds get masked.
    """
    count = max(config.min_spans, int(config.probability * length / config.span + random.random()))
    if config.spans == "released":
        wanted = sorted(random.integers(0, 2 * config.span, count, endpoint=True).tolist(), reverse=True)
    else:
        wanted = [config.span] * count
    if not any(wanted):
        wanted = [min(config.span, length - 1)] if count and length > 1 else []
    draws = random.random((len(wanted), 2)).tolist()
    shortest = wanted[-1] if wanted else 0
    placed: list[tuple[int, int]] = []
    gaps = [(0, length)]  # first frame, and the one after the last; a span leaves min_space of its gap free at its end
    for span, (which, where) in zip(wanted, draws):
        room = list(accumulate(end - start if end - start >= span + config.min_space else 0 for start, end in gaps))
        if room[-1] == 0:
            break
        start, end = gaps.pop(bisect_right(room, int(which * room[-1])))
        first = start + int(where * (end - span - start))
        placed.append((first, span))
        before, after = (start, first - config.min_space + 1), (first + span + config.min_space, end)
        gaps += [gap for gap in (before, after) if gap[1] - gap[0] >= shortest + config.min_space]
        if not gaps:
            break
    return placed
