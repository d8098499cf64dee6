"""Spans of frames to mask, as drawn for masking distillation (https://arxiv.org/abs/2305.11685, section 2.2)."""

from dataclasses import dataclass
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
    span_lengths: Literal["fixed", "uniform"] = "fixed"
    """All spans equally long, or drawn uniformly from 0 to twice that (the files released with ARMHuBERT)."""
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

    The number of spans is the wanted share of the utterance, rounded up or down at random. They are placed one by one,
    the longest first: in a gap drawn by its length, at a place drawn uniformly. Where no gap is long enough the
    remaining spans are left out, so that of a share of 0.8 in spans of 10 about two thirds get masked.

    Args:
        lengths: B numbers of valid frames; nothing beyond them is masked.
        num_frames: T.
        config: how many and how long.
        random: source of all draws.
    """
    masked = np.zeros((len(lengths), num_frames), dtype=bool)
    for row, length in zip(masked, lengths):
        count = max(config.min_spans, int(config.probability * length / config.span + random.random()))
        if config.span_lengths == "uniform":
            spans = np.sort(random.integers(0, 2 * config.span, count, endpoint=True))[::-1].tolist()
        else:
            spans = [config.span] * count
        gaps = [(0, length)]
        for span in spans:
            fitting = [i for i, (start, end) in enumerate(gaps) if end - start >= max(1, span)]
            if not fitting:
                continue
            sizes = np.array([gaps[i][1] - gaps[i][0] for i in fitting], dtype=float)
            start, end = gaps.pop(fitting[random.choice(len(fitting), p=sizes / sizes.sum())])
            first = int(random.integers(start, end - span, endpoint=True))
            row[first : first + span] = True
            gaps += [(start, first - config.min_space), (first + span + config.min_space, end)]
    return masked
