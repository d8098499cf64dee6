"""The grammar of the synthetic corpus: some 320 words in ten sentence patterns, and the keywords."""

from __future__ import annotations

import numpy as np

_LEXICON: dict[str, list[str]] = {
    group: words.split()
    for group, words in {
        "det": "the a this that every my your our his her their another some each one",
        "adj": """
            quick lazy brown tall quiet gentle bright heavy narrow silver broken ancient clever foolish hungry honest
            purple yellow orange shallow frozen polished hollow thick tiny massive curious nervous joyful bitter sour
            sweet rough smooth sharp empty golden royal wooden dusty foggy local famous common rare fresh loud early
            modern double
        """,
        "noun": """
            fox dog river mountain teacher sailor window garden kitchen village engine pocket letter island shadow
            winter summer candle bottle hammer ladder basket castle forest desert ocean bridge farmer doctor judge
            soldier captain stranger neighbour cousin brother daughter mother uncle child horse sheep chicken tiger lion
            eagle whale mouse spider butterfly orchard market station hospital museum library journey picture treasure
            question machine feather thunder weather pebble cottage chimney boat ship wheel thief voice choice noise boy
            cow house mouth tooth path cloth shoe foot book bush church bird nurse fire hour choir chair square idea
            beard measure vision garage
        """,
        "verb": """
            watched followed carried painted noticed answered borrowed visited discovered remembered described imagined
            measured collected repaired crossed opened closed covered pushed pulled lifted dropped caught brought bought
            thought taught found lost held chased admired judged avoided enjoyed destroyed shook took gave chose
        """,
        "verb_alone": """
            slept waited laughed vanished arrived shouted whispered wandered listened trembled travelled worked sang
            danced walked jumped rested disappeared returned smiled
        """,
        "prep": """
            under over behind beside near above below beyond across through around inside outside against toward without
            before after
        """,
        "adv": """
            slowly quickly gently carefully nervously quietly loudly rarely often always usually suddenly together
            yesterday tomorrow tonight again finally
        """,
        "name": """
            martha george edward alice thomas julia henry victor sophia oliver zachary ruth joyce hugh paul charles
            yvonne walter chloe philip
        """,
        "num": "two three four five six seven eight nine ten eleven twelve thirteen twenty thirty",
        "conj": "and but while because although until when if",
        "plural": """
            apples oranges churches judges pages voices roses months clothes wheels stones birds trees coins thieves
            boxes bridges keys leaves eggs songs
        """,
    }.items()
}
_PATTERNS = [
    pattern.split()
    for pattern in (
        "det adj noun verb det noun prep det noun",
        "name verb det adj noun prep det noun",
        "det noun verb_alone adv prep det adj noun",
        "prep det noun name verb num adj plural",
        "num plural verb_alone prep det noun conj det noun verb_alone",
        "name conj name verb num plural adv",
        "adv det adj noun verb_alone conj name verb_alone",
        "det noun prep det noun verb det adj adj noun",
        "name verb_alone prep det adj noun conj det noun verb name",
        "det adj plural verb name adv",
    )
]
KEYWORDS: list[str] = """
    yes no up down left right on off stop go zero one two three four five six seven eight nine bed bird cat dog happy
    house tree wow learn visual forward backward follow sheila marvin
""".split()  # noqa: SIM905 (a list of words reads better so)


def draw_sentences(num: int, rng: np.random.Generator) -> list[str]:
    """Draw ``num`` sentences in lower case, no two the same."""
    sentences: dict[str, None] = {}  # a set in the order of drawing
    while len(sentences) < num:
        pattern = _PATTERNS[rng.integers(len(_PATTERNS))]
        sentences[" ".join(str(rng.choice(_LEXICON[group])) for group in pattern)] = None
    return list(sentences)
