"""Letters of transcripts: what capitals are in several languages, and that no two letters become the same."""

from __future__ import annotations

import sys
import unicodedata
from collections import defaultdict

import pytest

from distillation.recognition.letters import Letters, composed

DOTLESS, DOTTED = "\u0131", "\u0130"
SIGMAS = {"\u03a3", "\u03c3", "\u03c2"}


def test_text_is_composed_with_single_spaces():
    assert composed(" cafe\u0301\u2028\x0b au\x85\u00a0lait\r") == "caf\u00e9 au lait"
    assert Letters("keep").write("Cafe\u0301  AU") == "Caf\u00e9 AU"
    assert Letters("upper").write("cafe\u0301") == Letters("upper").write("CAF\u00c9") == "CAF\u00c9"


@pytest.mark.parametrize(
    "text, capitals",
    [
        ("Straße", "STRAßE"),
        ("გამარჯობა მსოფლიო", "გამარჯობა მსოფლიო"),
        ("ᲒᲐᲛᲐᲠ გამარ", "გამარ გამარ"),
        ("ὁδός ΐ", "ὉΔΌΣ ΐ"),
        ("\ufb01n ŉ և", "\ufb01N ŉ և"),
        ("привет ёж", "ПРИВЕТ ЁЖ"),
        ("ǆ ǅ Ǆ", "Ǆ Ǆ Ǆ"),
        ("\u017f \u00b5 ϑ", "\u017f \u00b5 ϑ"),
        ("مرحبا 你好 हिन्दी", "مرحبا 你好 हिन्दी"),
    ],
)
def test_capitals(text, capitals):
    assert Letters.of("upper", [text]).write(text) == capitals
    assert Letters.of("keep", [text]).write(text) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("sign", [DOTLESS, DOTTED, "I\u0307"])
def test_dotted_and_dotless_i_stay_apart(sign, caplog):
    texts = ["kisir", f"k{sign}s", f"k{DOTLESS}s{DOTLESS}r"]
    with caplog.at_level("INFO"):
        letters = Letters.of("upper", texts)
        assert Letters.of("upper", ["kisir"]).write("kisir") == "KISIR"
        assert Letters.of("keep", texts).write("kisir") == "kisir"
    assert letters.write("kisir") == f"K{DOTTED}S{DOTTED}R" and letters.write(texts[2]) == "KISIR"
    assert caplog.text.count(f"i becomes {DOTTED}, {DOTLESS} becomes I") == 1


def test_capitals_that_lower_took_apart_are_the_same_letter():
    text = f"{DOTLESS}sparta i\u0307stanbul"
    assert Letters.of("upper", [text]).write(text) == "ISPARTA İSTANBUL"
    assert Letters.of("upper", ["in it"]).write("i\u0307t") == "İT" and Letters("keep").write("i\u0307") == "i\u0307"


def test_a_name_alone_changes_no_other_letter():
    letters = Letters.of("upper", ["this is in it", "mini bikini"] * 3 + [f"kad{DOTLESS}köy"])
    assert letters.write("mini") == "MINI" and letters.write(f"kad{DOTLESS}köy") == f"KAD{DOTLESS}KÖY"


@pytest.mark.parametrize("two_dots", [False, True])
def test_no_two_letters_become_the_same(two_dots):
    letters, sources = Letters("upper", two_dots), defaultdict(set)
    for character in map(chr, range(sys.maxunicode + 1)):
        if unicodedata.category(character)[0] in "LMNPS":  # assigned, and more than letters: some others have case
            letter = composed(character)
            sources[letters.write(letter)].add(letter)
    for capital, same in sources.items():
        assert len(capital) <= 3  # of what NFC takes apart
        if len(same) == 1 or (two_dots and capital in ("I", DOTTED)):
            continue
        assert capital in same and len({letter.upper() for letter in same}) == 1  # forms of one letter
        assert len({letter.lower() for letter in same}) == 1 or same == SIGMAS
    if two_dots:
        assert sources["I"] == {"I", DOTLESS} and sources[DOTTED] == {"i", DOTTED}
