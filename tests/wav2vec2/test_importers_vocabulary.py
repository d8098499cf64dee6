"""What the rows of an output layer stand for: every toolkit's way to say so, and what cannot be kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torchaudio

from wav2vec2.checkpoint import CheckpointError
from wav2vec2.importers import ImportedModel, keep_head
from wav2vec2.importers.vocabulary import Vocabulary, make_vocabulary, read_dictionary, read_labels, read_vocabulary
from wav2vec2.vocabulary import written

FACEBOOK = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "E": 5, "'": 6}
COMMUNITY = {"'": 0, "a": 1, "b": 2, "|": 3, "[UNK]": 4, "[PAD]": 5}
LATER = {"<s>": 6, "</s>": 7}
PLAIN = ["<pad>", "'", "a", "b", "|", "[UNK]"]


def read(folder: Path, vocab: object, num_rows: int, blank: object, **files: Any) -> Vocabulary:
    for name, content in {"vocab.json": vocab, **{f"{name}.json": content for name, content in files.items()}}.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return read_vocabulary(folder, {"pad_token_id": blank, "vocab_size": num_rows})


def named(**stated: object) -> dict[str, object]:
    return {"unk_token": "[UNK]", "pad_token": "[PAD]", "word_delimiter_token": "|"} | stated


@pytest.mark.parametrize(
    ("vocab", "num_rows", "blank", "files", "symbols"),
    [
        (FACEBOOK, 7, 0, {}, [*FACEBOOK]),
        (COMMUNITY, 6, 5, {"tokenizer_config": named()}, PLAIN),
        (COMMUNITY, 6, 5, {"special_tokens_map": {"pad_token": {"content": "[PAD]"}, "unk_token": "[UNK]"}}, PLAIN),
        # special tokens that were added later: beyond the rows, or with rows of their own
        (COMMUNITY, 6, 5, {"tokenizer_config": named(), "added_tokens": LATER}, PLAIN),
        (COMMUNITY, 8, 5, {"tokenizer_config": named(), "added_tokens": LATER}, [*PLAIN, "<s>", "</s>"]),
        (
            COMMUNITY, 8, 5,
            {"tokenizer_config": named(added_tokens_decoder={"5": {"content": "[PAD]"}, "6": {"content": "<s>"}})},
            [*PLAIN, "<s>", "<unused7>"],
        ),
        # a pad token that was added although the blank is another
        (FACEBOOK, 7, 0, {"tokenizer_config": {"pad_token": "[PAD]"}, "added_tokens": {"[PAD]": 7}}, [*FACEBOOK]),
        # "<pad>" is not the blank, which trades names with it
        ({"<pad>": 0, "|": 1, "a": 2, "[PAD]": 3}, 4, 3, {"tokenizer_config": named()}, ["<pad>", "[PAD]", "|", "a"]),
        # another delimiter; a bar, and special symbols of one character, must not be written
        ({"_": 0, " ": 1, "a": 2}, 3, 0, {"tokenizer_config": {"pad_token": "_"}}, ["<pad>", "|", "a"]),
        (
            {"_": 0, "#": 1, "|": 2, "?": 3, "a": 4}, 5, 0,
            {"tokenizer_config": {"pad_token": "_", "word_delimiter_token": "#", "unk_token": "?"}},
            ["<pad>", "|", "<unused2>", "<unused3>", "a"],
        ),
        # no delimiter; two tokens of one row, of which transformers decodes the last; names that placeholders have
        ({"<pad>": 0, "\u4f60": 1, "\u597d": 2}, 3, 0, {}, ["<pad>", "\u4f60", "\u597d"]),
        ({"<pad>": 0, " ": 1, "a": 2, "|": 1}, 3, 0, {}, ["<pad>", "|", "a"]),
        ({"<pad>": 0, "<unused1>": 2, "": 3}, 4, 0, {}, ["<pad>", "<unused1>", "<unused2>", "<unused3>"]),
    ],
)  # fmt: skip
def test_folders_of_transformers(tmp_path, vocab, num_rows, blank, files, symbols):
    found = read(tmp_path, vocab, num_rows, blank, **files)
    assert found.symbols == symbols
    assert found.order == [blank, *(row for row in range(num_rows) if row != blank)]
    # one character each, but for what is not written
    assert [symbol for symbol in symbols if len(written(symbol)) != 1] == [s for s in symbols if s[0] in "<["]


@pytest.mark.parametrize(
    ("vocab", "num_rows", "blank", "files", "message"),
    [
        ({"eng": {"a": 0}}, 2, 0, {}, "/vocab.json: a vocabulary for each of several languages ('eng', ...)"),
        ({"<pad>": 0, "the": 1}, 2, 0, {}, "/vocab.json: 'the' (row 1) is a token of several letters"),
        ({"<pad>": 0, "a": "1"}, 2, 0, {}, "/vocab.json: 'a' is '1', no number of a row"),
        ({"<pad>": 0, "a": 1}, 1, 0, {}, "/vocab.json: 'a' is row 1, but the output layer has rows 0 to 0"),
        ({"a": 0}, 1, 1, {}, "/vocab.json: the blank is row 1, but the output layer has rows 0 to 0"),
        ({"a": 0}, 1, None, {}, ": pad_token_id, the blank, is None and vocab_size 1 in its config: set them"),
        (FACEBOOK, 10**12, 0, {}, "/vocab.json: 1000000000000 rows are too many"),
        (
            COMMUNITY, 6, 0, {"tokenizer_config": named()},
            ": the blank is row 0 (\"'\") by pad_token_id of config.json, but '[PAD]' (row 5) for the tokenizer",
        ),
        ([1], 2, 0, {}, "/vocab.json: holds no JSON object"),
        (FACEBOOK, 7, 0, {"tokenizer_config": 1}, "/tokenizer_config.json: holds no JSON object"),
    ],
)  # fmt: skip
def test_folders_whose_vocabulary_cannot_be_kept(tmp_path, vocab, num_rows, blank, files, message):
    with pytest.raises(CheckpointError) as error:
        read(tmp_path, vocab, num_rows, blank, **files)
    assert str(error.value).startswith(f"{tmp_path}{message}") and "\n" not in str(error.value)


def test_no_vocabulary(tmp_path):
    with pytest.raises(CheckpointError, match=r"vocab.json: no such file, which says what an output layer writes"):
        read_vocabulary(tmp_path, {})


@pytest.mark.parametrize(
    ("text", "blank", "symbols"),
    [
        ("| 94802\nE 51860\n' 7\n", 0, ["<pad>", "<s>", "</s>", "<unk>", "|", "E", "'"]),
        ("| 9\ne 5\n<ctc_blank> 0", 6, ["<pad>", "<s>", "<ctc_blank>", "</s>", "<unk>", "|", "e"]),
        ("| 9\ne 5\n<s> 1 #fairseq:overwrite\n", 0, ["<pad>", "<s>", "</s>", "<unk>", "|", "e", "<unused6>"]),
        ("\x85 1\n| 1\n", 0, ["<pad>", "<s>", "</s>", "<unk>", "\x85", "|"]),
    ],
)
def test_dictionaries_of_fairseq(tmp_path, text, blank, symbols):
    path = tmp_path / "dict.ltr.txt"
    path.write_text(text, encoding="utf-8")
    found = read_dictionary(path)
    assert found.symbols == symbols and found.order[0] == blank


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"| 1\nE\n", "line 2 is 'E', but must have a symbol and its count"),
        (b"", "line 1 is '', but must have a symbol and its count"),
        (b"| 1\nE 2\n| 3\n", "line 3 has '|', which came before"),
        (b"<s> 1\n", "line 1 has '<s>', which came before"),
        (b"| 1\nTHE 2\n", "'THE' (row 5) is a token of several letters"),
        (b"\xff\n", "not a dictionary of fairseq ("),
    ],
)
def test_what_is_no_dictionary_of_letters(tmp_path, content, message):
    path = tmp_path / "dict.txt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        read_dictionary(path)
    assert str(error.value).startswith(f"{path}: {message}") and "\n" not in str(error.value)


def test_other_files_are_no_dictionaries(tmp_path, monkeypatch):
    with pytest.raises(CheckpointError, match=r"none.txt: no such file$"):
        read_dictionary(tmp_path / "none.txt")
    monkeypatch.setattr("wav2vec2.importers.vocabulary.MAX_DICTIONARY_BYTES", 2)
    (tmp_path / "dict.txt").write_text("| 1\n")
    with pytest.raises(CheckpointError, match=r"dict.txt: too large for a dictionary of fairseq$"):
        read_dictionary(tmp_path / "dict.txt")


def test_labels_of_every_bundle():
    """Of the one that aligns too, whose wrapper adds an output to the model's."""
    for bundle in vars(torchaudio.pipelines).values():
        if hasattr(bundle, "get_labels") and hasattr(bundle, "_normalize_waveform"):
            found = read_labels(bundle.get_labels(), bundle._params["aux_num_out"])
            assert found.symbols == ["<pad>", *bundle.get_labels()[1 : bundle._params["aux_num_out"]]]
            assert found.order == [*range(len(found.symbols))]


def imported() -> ImportedModel:
    return ImportedModel({"encoder_embed_dim": 2, "aux_num_out": None}, {}, None, ["head.bias", "head.weight", "other"])


def test_rows_move_with_their_symbols():
    tensors = {"head.weight": torch.arange(6.0).view(3, 2).half(), "head.bias": torch.arange(3.0)}
    found = keep_head(imported(), tensors, "head", make_vocabulary({0: "a", 1: "b", 2: "-"}, 3, blank=2))
    assert found.vocabulary == ["<pad>", "a", "b"] and found.config["aux_num_out"] == 3 and found.dropped == ["other"]
    assert found.state_dict["aux.bias"].tolist() == [2, 0, 1]
    assert found.state_dict["aux.weight"].tolist() == [[4, 5], [0, 1], [2, 3]]
    assert all(tensor.dtype == torch.float32 for tensor in found.state_dict.values())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "it has no output layer of a model fine-tuned with CTC (head.weight and head.bias)"),
        ({"head.weight": torch.ones(2, 2)}, "it has no output layer of a model"),
        (
            {"head.weight": torch.ones(3, 2), "head.bias": torch.ones(2)},
            "its output layer does not fit a vocabulary of 2 symbols: head: weight is no tensor of shape [2, 2]",
        ),
        ({"head.weight": torch.ones(2, 2), "head.bias": torch.ones(1)}, "its output layer does not fit"),
        ({"head.weight": torch.ones(1).expand(2, 2), "head.bias": torch.ones(2)}, "its output layer does not fit"),
        ({"head.weight": "text", "head.bias": torch.ones(2)}, "its output layer does not fit"),
    ],
)
def test_a_layer_that_is_not_that_of_the_vocabulary(tensors, message):
    with pytest.raises(CheckpointError) as error:
        keep_head(imported(), tensors, "head", make_vocabulary({1: "a"}, 2, blank=0))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
