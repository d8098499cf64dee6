"""Finished pieces on disk: what is kept, dropped, mixed with nothing, and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distillation.errors import UserError
from distillation.journal import Journal

OF = {"model": "a" * 64, "layers": (0, 4), "window": 40.0}


def journal(folder: Path, of: dict | None = None, refuse: str | None = None) -> Journal:
    return Journal(folder / "deep" / "done.jsonl", OF if of is None else of, "features", refuse)


def test_pieces_are_found_again(tmp_path, caplog):
    caplog.set_level("INFO")
    first = journal(tmp_path)
    assert "a.npy" not in first and not caplog.text
    first["a.npy"] = {"size": 3, "shape": (2, 5)}
    first.update({"b\n.npy": 0.1 + 0.2, "c.npy": None})
    first["a.npy"] = {"size": 4, "shape": [2, 5]}
    second = journal(tmp_path)
    assert first.pieces == second.pieces == {"a.npy": {"size": 4, "shape": [2, 5]}, "b\n.npy": 0.1 + 0.2, "c.npy": None}
    assert "going on after 3 features" in caplog.text
    second.remove()
    second.remove()
    assert not journal(tmp_path).pieces


@pytest.mark.parametrize("cut", [1, 5, 25, 60])
def test_a_line_that_a_crash_cut_off_is_dropped(tmp_path, cut):
    first = journal(tmp_path)
    first["a"] = 1
    first["b"] = ["x" * 60]
    first.path.write_bytes(first.path.read_bytes()[:-cut])
    second = journal(tmp_path)
    # where only the end of the line is missing nothing is lost
    assert second.pieces == ({"a": 1, "b": ["x" * 60]} if cut == 1 else {"a": 1})
    second["c"] = 2
    assert journal(tmp_path).pieces == {**second.pieces, "c": 2}
    assert all(json.loads(line) for line in second.path.read_text().splitlines())


def test_lines_of_another_kind_are_dropped(tmp_path):
    first = journal(tmp_path)
    first["a"] = 1
    with first.path.open("ab") as file:
        file.write(b'[1]\n{"key": "x"}\nnull\n\xff\xfe\n' + b"[" * 100_000 + b"\n")
    assert journal(tmp_path).pieces == {"a": 1}


def test_other_settings_are_refused_or_start_afresh(tmp_path, caplog):
    caplog.set_level("INFO")
    first = journal(tmp_path)
    other = {**OF, "model": "b" * 64, "format": "npy"}
    assert not journal(tmp_path, other, "use another --out").pieces  # it held nothing yet
    first = journal(tmp_path)
    first["a"] = 1
    before = first.path.read_bytes()
    with pytest.raises(UserError) as caught:
        journal(tmp_path, other, "use another --out")
    a, b = (f'"{letter * 36}...' for letter in "ab")
    message = f'{first.path}: holds features with other settings (model {a} -> {b}; format null -> "npy"): use another'
    assert str(caught.value).startswith(message) and first.path.read_bytes() == before
    assert not journal(tmp_path, other).pieces and "starting afresh" in caplog.text
    assert not journal(tmp_path, OF).pieces


@pytest.mark.parametrize("head", ["", "[]\n", '{"of": 3}\n', '{"key": "x", "value": 1}\n'])
def test_a_file_of_nobody_knows_what_is_not_gone_on_with(tmp_path, head):
    path = tmp_path / "deep" / "done.jsonl"
    path.parent.mkdir()
    path.write_text(head + '{"key": "a", "value": 1}\n' * 2)
    with pytest.raises(UserError, match="holds features with other settings"):
        journal(tmp_path, refuse="use another --out")
    assert not journal(tmp_path).pieces
