"""The symbols of a recogniser's output layer: the blank first, one character each, SPACE between words.

Symbols of several characters (``<s>``, ``</s>``, ``<unk>``) come from models of others; they stand for nothing that is
written.
"""

BLANK, SPACE = "<pad>", "|"  # as transformers writes them
VOCABULARY = "vocabulary"  # entry of a model file


def written(symbol: str) -> str:
    """What a symbol adds to a text: a character, or nothing for the blank and other special symbols."""
    return " " if symbol == SPACE else symbol if len(symbol) == 1 else ""
