"""Word ABX across speakers: is X, a word by another speaker, closer to A, the same word, than to B, another word?

A and B are said by one speaker; B is the word of that speaker whose phones are closest to A's, since any other word
would be told apart by every layer. Distances are those of dynamic time warping over angles between frames, per step of
the path, as in the ZeroSpeech challenges (Schatz et al., 2013). Nothing is trained.
Shapes: P pairs, I and J frames, D channels.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
import torch
import torchaudio
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from demo.labels import HOP, WINDOW, Utterance
from wav2vec2.feature_extractor import SAMPLE_RATE

SHORTEST, LONGEST = 5, 40  # frames of a word


@dataclass(frozen=True)
class Token:
    """A word in a row of utterances: frames [first, last)."""

    utterance: int
    first: int
    last: int


T = TypeVar("T")
Triple = tuple[Token, Token, Token]


def draw_triples(utterances: list[Utterance], num: int, seed: int = 0) -> tuple[list[Triple], list[int]]:
    """``num`` triples A, B, X, and the speakers of X. Every word is as likely as every other."""
    said: dict[str, dict[int, list[Token]]] = defaultdict(lambda: defaultdict(list))
    phones: dict[str, list[str]] = {}
    for i, utterance in enumerate(utterances):
        for start, end, word in utterance.words:
            first, last = (max(0, round((t * SAMPLE_RATE - WINDOW / 2) / HOP)) for t in (start, end))
            last = min(last, utterance.num_frames)
            if SHORTEST <= last - first <= LONGEST:
                said[word][utterance.speaker].append(Token(i, first, last))
                phones.setdefault(word, [p for begin, _, p in utterance.phones if start <= begin < end])
    words = sorted(word for word, speakers in said.items() if len(speakers) > 1)
    by_speaker: dict[int, list[str]] = defaultdict(list)
    for word in sorted(said):
        for speaker in said[word]:
            by_speaker[speaker].append(word)
    rng = np.random.default_rng(seed)

    def pick(options: Sequence[T]) -> T:
        return options[rng.integers(len(options))]

    @cache
    def closest(word: str, speaker: int) -> list[str]:
        away = {o: torchaudio.functional.edit_distance(phones[word], phones[o]) for o in by_speaker[speaker]}
        away = {other: distance for other, distance in away.items() if distance}  # "two" and "too" sound the same
        return [other for other, distance in away.items() if distance == min(away.values())]

    triples: list[Triple] = []
    speakers: list[int] = []
    while words and len(triples) < num:
        word = pick(words)
        a_speaker, x_speaker = rng.choice(sorted(said[word]), 2, replace=False).tolist()
        others = closest(word, a_speaker)
        if not others:
            words.remove(word)
            continue
        other = pick(others)
        triples.append((pick(said[word][a_speaker]), pick(said[other][a_speaker]), pick(said[word][x_speaker])))
        speakers.append(x_speaker)
    return triples, speakers


def warped_distance(x: list[Tensor], y: list[Tensor]) -> Tensor:
    """Mean angle, in half turns, along the best path of each pair of x [I, D] and y [J, D]: [P]."""
    rows, columns = (torch.tensor([len(item) for item in side]) for side in (x, y))
    ours, theirs = (F.normalize(pad_sequence([s.float() for s in side], batch_first=True), dim=-1) for side in (x, y))
    angle = (ours @ theirs.transpose(1, 2)).clamp(-1, 1).arccos() / torch.pi  # [P, I, J]
    infinite = torch.full((len(x),), torch.inf)
    total = [infinite] * angle.shape[2]
    steps = [torch.ones(len(x))] * angle.shape[2]
    result = torch.zeros(len(x))
    for i in range(angle.shape[1]):
        new_total, new_steps = [], []
        for j in range(angle.shape[2]):
            here = angle[:, i, j]
            if i == j == 0:
                best, path = here, torch.ones(len(x))
            else:
                options = [(total[j], steps[j])]
                if j:
                    options += [(total[j - 1], steps[j - 1]), (new_total[j - 1], new_steps[j - 1])]
                sums = torch.stack([option[0] for option in options])
                best, which = sums.min(0)
                path = torch.stack([option[1] for option in options]).gather(0, which[None])[0] + 1
                best = best + here
            new_total.append(best)
            new_steps.append(path)
        total, steps = new_total, new_steps
        ends = rows == i + 1
        if ends.any():
            at = (columns - 1)[None]
            result = torch.where(
                ends, torch.stack(total).gather(0, at)[0] / torch.stack(steps).gather(0, at)[0], result
            )
    return result


def abx_right(features: list[Tensor], triples: list[Triple]) -> Tensor:
    """Whether X is closer to A than to B, half for a tie: float [triples]. ``features`` are [T, D] per utterance."""

    def frames(tokens: list[Token]) -> list[Tensor]:
        return [features[token.utterance][token.first : token.last] for token in tokens]

    a, b, x = (frames([triple[i] for triple in triples]) for i in range(3))
    to_a, to_b = warped_distance(x, a), warped_distance(x, b)
    return (to_a < to_b).float() + 0.5 * (to_a == to_b)
