"""The output layer of a model fine-tuned with CTC, and what its rows stand for, in other toolkits.

Shapes: V rows of the layer, D width of the model.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from wav2vec2.checkpoint import CheckpointError
from wav2vec2.vocabulary import BLANK, SPACE

from .folder import TOKENIZER_FILES, VOCAB, read_json
from .mapping import ImportedModel, naming, require_shapes

SPECIAL = re.compile(r"<.+>|\[.+\]")  # names of symbols that stand for nothing that is written
TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}  # as transformers has it
DELIMITER = "word_delimiter_token"
FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")  # come first in its dictionaries
FAIRSEQ_HEAD = "w2v_encoder.proj"
FAIRSEQ_BLANK = "<ctc_blank>"  # the first of these where a dictionary has none
MAX_ROWS = 200_000  # Unicode has fewer characters
MAX_DICTIONARY_BYTES = 10_000_000


@dataclass(frozen=True)
class Vocabulary:
    """What the rows of an output layer stand for.

    Attributes:
        order: row in the source of each row here, the blank's first.
        symbols: name of each row here, all different, by the convention of :mod:`wav2vec2.vocabulary`.
    """

    order: list[int]
    symbols: list[str]


def make_vocabulary(
    tokens: Mapping[int, str], num_rows: int, blank: int, space: str = SPACE, special: Collection[str] = ()
) -> Vocabulary:
    """Put the blank first, and give every row a name by the convention here.

    A special symbol keeps its name where it is one of several characters that no other row has; a row called "<pad>"
    that is not the blank takes the name that the blank had; and what has no name is called after its row.

    Args:
        tokens: what the rows of the source stand for; rows may have none.
        num_rows: V.
        blank: row of the CTC blank.
        space: name that the source has for what stands between words.
        special: further names in the source of what is not written.

    Raises:
        CheckpointError: a token of several letters, one beyond the rows, a blank that is no row, or too many rows.
    """
    if num_rows > MAX_ROWS:
        raise CheckpointError(f"{num_rows} rows are too many for an output layer of characters; at most {MAX_ROWS}")
    if not 0 <= blank < num_rows:
        raise CheckpointError(f"the blank is row {blank}, but the output layer has rows 0 to {num_rows - 1}")
    unwritten = {*special, tokens.get(blank)} - {space}
    for row, token in tokens.items():
        if token == space or token in unwritten or SPECIAL.fullmatch(token):
            continue
        if len(token) > 1:
            raise CheckpointError(
                f"{token!r} (row {row}) is a token of several letters: an output layer can be kept only where each "
                "row stands for one character"
            )
        if not 0 <= row < num_rows:
            raise CheckpointError(f"{token!r} is row {row}, but the output layer has rows 0 to {num_rows - 1}")
    order = [blank, *(row for row in range(num_rows) if row != blank)]
    symbols = {BLANK: blank}
    for row in order[1:]:
        token = tokens.get(row, "")
        symbol = SPACE if token == space else tokens.get(blank, "") if token == BLANK else token
        writes = len(symbol) == 1 and token != space and (symbol in unwritten or symbol == SPACE)
        if not symbol or symbol in symbols or symbol.startswith("<unused") or writes:
            symbol = f"<unused{row}>"
        symbols[symbol] = row
    return Vocabulary(order, list(symbols))


def keep_head(imported: ImportedModel, tensors: Mapping[str, Any], name: str, vocabulary: Vocabulary) -> ImportedModel:
    """The model with the output layer that its importer drops, as ``aux``.

    Args:
        imported: the model without.
        tensors: of the source.
        name: of the layer there: ``{name}.weight`` [V, D] and ``{name}.bias`` [V].
        vocabulary: of the layer.

    Raises:
        CheckpointError: there is no such layer, or it has another number of rows.
    """
    found = {kind: tensors[f"{name}.{kind}"] for kind in ("weight", "bias") if f"{name}.{kind}" in tensors}
    if len(found) < 2:
        raise CheckpointError(f"it has no output layer of a model fine-tuned with CTC ({name}.weight and {name}.bias)")
    num_rows = len(vocabulary.symbols)
    shapes = {"weight": (num_rows, imported.config["encoder_embed_dim"]), "bias": (num_rows,)}
    with naming(f"its output layer does not fit a vocabulary of {num_rows} symbols: {name}"):
        require_shapes(found, shapes)
    return replace(
        imported,
        config={**imported.config, "aux_num_out": num_rows},
        state_dict={
            **imported.state_dict,
            **{f"aux.{kind}": tensor.detach()[vocabulary.order].float() for kind, tensor in found.items()},
        },
        dropped=[dropped for dropped in imported.dropped if dropped not in (f"{name}.weight", f"{name}.bias")],
        vocabulary=vocabulary.symbols,
    )


def read_vocabulary(folder: Path, config: Mapping[str, Any]) -> Vocabulary:
    """The vocabulary of a folder of transformers; its weights need not be there.

    The blank is that of transformers' loss, ``pad_token_id``.

    Args:
        folder: with ``vocab.json``, and the other files of the tokenizer where it has them.
        config: content of config.json with the defaults of transformers.

    Raises:
        CheckpointError: no vocabulary, one nested by language, tokens of several letters, or a blank that is another
            one for the tokenizer.
    """
    path = folder / VOCAB
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no such file, which says what an output layer writes: is it fine-tuned with CTC?"
        )
    content = read_json(path)
    if nested := next((key for key, row in content.items() if isinstance(row, dict)), None):
        raise CheckpointError(
            f"{path}: a vocabulary for each of several languages ({nested!r}, ...), which go with adapters; give a "
            "model of one language"
        )
    if wrong := next((token for token, row in content.items() if type(row) is not int), None):
        raise CheckpointError(f"{path}: {wrong!r} is {content[wrong]!r}, no number of a row")
    settings, specials, added = (
        read_json(folder / name) if (folder / name).is_file() else {} for name in TOKENIZER_FILES if name != VOCAB
    )
    given = {key: value for key, value in {**settings, **specials}.items() if value is not None}
    stated = {key: _text(given.get(key, default)) for key, default in {**TOKENS, DELIMITER: SPACE}.items()}
    later = settings.get("added_tokens_decoder")
    rows = {_text(token): row for row, token in later.items()} if isinstance(later, dict) else {}
    rows = {token: int(row) for token, row in {**rows, **added}.items() if re.fullmatch(r"\d{1,9}", str(row))} | content
    tokens = {row: token for token, row in rows.items()}  # of two with the same row, transformers decodes the last
    blank, num_rows = config.get("pad_token_id"), config.get("vocab_size")
    if type(blank) is not int or type(num_rows) is not int:
        raise CheckpointError(
            f"{folder}: pad_token_id, the blank, is {blank!r} and vocab_size {num_rows!r} in its config: set them"
        )
    pad = stated["pad_token"]
    if blank != rows.get(pad, blank) < num_rows:
        raise CheckpointError(
            f"{folder}: the blank is row {blank} ({tokens.get(blank)!r}) by pad_token_id of config.json, but {pad!r} "
            f"(row {rows[pad]}) for the tokenizer; correct the one that is wrong"
        )
    spaces = [token for token in (stated[DELIMITER], " ") if token in tokens.values()]
    with naming(path):
        return make_vocabulary(tokens, num_rows, blank, next(iter(spaces), SPACE), [stated[key] for key in TOKENS])


def _text(token: Any) -> str:
    """A token of a tokenizer's settings, which may be written with its properties."""
    return str(token.get("content") if isinstance(token, dict) else token)


def read_dictionary(path: Path) -> Vocabulary:
    """The vocabulary of a dictionary of fairseq, such as dict.ltr.txt: a symbol and its count on each line.

    As in fairseq's ``Dictionary``, four symbols of its own come first. The blank is "<s>", as in its task
    ``audio_finetuning``, or "<ctc_blank>" where that is in the dictionary, as in its decoders.

    Raises:
        CheckpointError: no such file, another kind of file, a symbol that comes twice, or tokens of several letters.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    if path.stat().st_size > MAX_DICTIONARY_BYTES:
        raise CheckpointError(f"{path}: too large for a dictionary of fairseq")
    try:
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except ValueError as error:
        raise CheckpointError(f"{path}: not a dictionary of fairseq ({error})") from error
    tokens = list(FAIRSEQ)
    for number, line in enumerate(lines, 1):
        symbol, _, count = line.removesuffix(" #fairseq:overwrite").rstrip().rpartition(" ")
        if not symbol or not count.isdecimal():
            raise CheckpointError(f"{path}: line {number} is {line[:40]!r}, but must have a symbol and its count")
        if symbol in tokens and not line.endswith("#fairseq:overwrite"):
            raise CheckpointError(f"{path}: line {number} has {symbol!r}, which came before")
        tokens.append(symbol)
    blank = tokens.index(FAIRSEQ_BLANK) if FAIRSEQ_BLANK in tokens else 0
    with naming(path):
        return make_vocabulary(dict(enumerate(tokens)), len(tokens), blank)


def read_labels(labels: Sequence[str], num_rows: int) -> Vocabulary:
    """The vocabulary of a bundle of torchaudio, which has the blank first.

    Args:
        labels: that the bundle gives; more than rows where a wrapper of the model adds outputs.
        num_rows: V.
    """
    return make_vocabulary(dict(enumerate(labels[:num_rows])), num_rows, 0)
