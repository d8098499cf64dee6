"""The grammar of the synthetic corpus: some 320 words in ten sentence patterns, and the keywords."""

import json
from pathlib import Path

import numpy as np

_GRAMMAR = json.loads(Path(__file__).with_name("grammar.json").read_text(encoding="utf-8"))
_LEXICON: dict[str, list[str]] = {group: words.split() for group, words in _GRAMMAR["words"].items()}
_PATTERNS: list[list[str]] = [pattern.split() for pattern in _GRAMMAR["patterns"]]
KEYWORDS: list[str] = _GRAMMAR["keywords"].split()


def draw_sentences(num: int, rng: np.random.Generator) -> list[str]:
    """Draw ``num`` sentences in lower case, no two the same."""
    sentences: dict[str, None] = {}  # a set in the order of drawing
    while len(sentences) < num:
        pattern = _PATTERNS[rng.integers(len(_PATTERNS))]
        sentences[" ".join(str(rng.choice(_LEXICON[group])) for group in pattern)] = None
    return list(sentences)
