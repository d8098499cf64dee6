"""How transcripts are written: composed letters (NFC), single spaces, capitals that keep different letters apart."""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter
from collections.abc import Iterable
from typing import Literal

logger = logging.getLogger(__name__)

Case = Literal["upper", "lower", "keep"]

DOTLESS, DOTTED = "\u0131", "\u0130"  # small ı and capital İ: in Turkish, Azeri and others, i and ı are two letters
SIGNS = "i", "I", DOTLESS, DOTTED, "I\u0307"  # the last is İ before it is composed
LOWERED = "i\u0307"  # what lower() makes of İ in languages that do not have it
USUAL = 0.05  # of all letters i; in Turkish about a third are ı or İ, elsewhere names alone have them
MTAVRULI = range(0x1C90, 0x1CC0)  # Georgian capitals of Unicode 11, for headings: text is written in the small ones
SIGMAS = {"ς": "Σ"}  # one letter with two small forms, of which the end of a word has the second


def composed(text: str) -> str:
    """NFC, with single spaces for what Unicode counts as space or line end."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def capital(letter: str) -> str:
    """The capital of one letter where that is one letter too, and of this one alone; otherwise the letter itself.

    So ß, ŉ and ligatures stay, and so do letters whose capital Unicode lends from another (ı, ſ, µ, ϑ): no two letters
    become the same, except the small, title and capital forms of one.
    """
    if ord(letter) in MTAVRULI:
        return letter.lower()
    upper = letter.upper()
    own = len(upper) == 1 and upper.lower() == letter.lower() and ord(upper) not in MTAVRULI
    return upper if own else SIGMAS.get(letter, letter)


class _Capitals(dict[int, str]):
    """Table for ``str.translate`` that fills itself."""

    def __missing__(self, code: int) -> str:
        self[code] = capital(chr(code))
        return self[code]


class Letters:
    """Writes all transcripts of a run in one way.

    Args:
        case: "upper" writes :func:`capital` letters, "lower" small ones, "keep" leaves them as they are.
        two_dots: i and ı are two letters, whose capitals are İ and I.
    """

    def __init__(self, case: Case, two_dots: bool = False) -> None:
        self.table = _Capitals({ord("i"): DOTTED, ord(DOTLESS): "I"} if two_dots else {}) if case == "upper" else None
        self.case, self.two_dots = case, two_dots

    @classmethod
    def of(cls, case: Case, texts: Iterable[str]) -> Letters:
        """For these transcripts: where ı and İ are usual in them, i and ı are two letters in all of them."""
        if case != "upper":
            return cls(case)
        found: Counter[str] = Counter()
        for text in texts:
            for sign in SIGNS:
                found[sign] += text.count(sign)
        marked, two_dots = sum(found[sign] for sign in SIGNS[2:]), False
        if marked:
            two_dots = marked >= USUAL * found.total()
            become = (
                f"i becomes {DOTTED}, {DOTLESS} becomes I" if two_dots else f"{DOTLESS} and {DOTTED} stay as they are"
            )
            logger.info("of the letters i in the transcripts %.1f %% are %s or %s: %s",
                        100 * marked / found.total(), DOTLESS, DOTTED, become)  # fmt: skip
        return cls(case, two_dots)

    def write(self, text: str) -> str:
        """A transcript in these letters."""
        text = composed(text)
        if self.table is None:
            return unicodedata.normalize("NFC", text.lower()) if self.case == "lower" else text
        if self.two_dots:
            text = text.replace(LOWERED, "i")
        # once more: a capital may compose with a mark that its small letter does not compose with
        return unicodedata.normalize("NFC", text.translate(self.table))
