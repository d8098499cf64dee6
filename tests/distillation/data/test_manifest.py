import numpy as np
import pytest

from distillation.data import manifest
from distillation.data.manifest import Manifest, read_tsv, write_lists, write_tsv
from distillation.errors import UserError


@pytest.fixture(params=[1, 20, manifest.BLOCK])
def blocks(request, monkeypatch):
    """Lists are checked in blocks of a line or two, or whole."""
    monkeypatch.setattr(manifest, "BLOCK", request.param)


@pytest.mark.usefixtures("blocks")
def test_round_trip_keeps_every_character(tmp_path):
    # U+2028 and U+0085 end a line for str.splitlines, not in this format.
    names = ["b/x.flac", "a/ü 1.wav", "c/\u2028\u0085.flac", " lead.flac"]
    write_tsv(tmp_path / "new" / "t.tsv", Manifest(tmp_path, names, np.array([1, 2, 3, 2**32])))
    assert (tmp_path / "new" / "t.tsv").read_bytes().startswith(f"{tmp_path}\nb/x.flac\t1\n".encode())
    back = read_tsv(tmp_path / "new" / "t.tsv")
    assert (back.root, back.paths, back.num_frames.tolist()) == (tmp_path, names, [1, 2, 3, 2**32])
    assert back.num_frames.dtype == np.int64
    assert back.file(0) == tmp_path / "b" / "x.flac"
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["t.tsv"]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("end", ["", "\r", "\n", "\r\n"])
def test_windows_line_ends_and_no_last_line_end(tmp_path, end):
    (tmp_path / "t.tsv").write_bytes(f"{tmp_path}\r\na.flac\t5\r\nb\r.flac\t6\nc.flac\t{'7'.zfill(20)}{end}".encode())
    back = read_tsv(tmp_path / "t.tsv")
    assert back.paths == ["a.flac", "b\r.flac", "c.flac"]
    assert back.num_frames.tolist() == [5, 6, 7]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"{root}\n", "lists no utterance"),
        (b"{root}/gone\na.flac\t5\n", "root on its first line is not a folder"),
        (b"\na.flac\t5\n", "root on its first line is not a folder"),
        (b"x\0y\na.flac\t5\n", "root on its first line is not a folder"),
        (b"/" + b"n" * 5000 + b"\na.flac\t5\n", "root on its first line is not a folder"),
        (b"{root}\na.flac\t5\n\nb.flac\t5\n", "line 3 is blank"),
        (b"{root}\na.flac\t5\n\n", "line 3 is blank"),
        (b"{root}\na.flac 5\n", "line 2 is not 'relative path<TAB>frames'"),
        (b"{root}\na.flac\t5\t6\n", "line 2 is not"),
        (b"{root}\n\t5\n", "line 2 is not"),
        (b"{root}\na\0.flac\t5\n", "line 2 is not"),
        (b"{root}\na.flac\t5.0\n", "line 2: '5.0' frames is not a whole number"),
        (b"{root}\na.flac\t0\n", "'0' frames"),
        (b"{root}\na.flac\t-5\n", "'-5' frames"),
        (b"{root}\na.flac\t1_000\n", "'1_000' frames"),
        (b"{root}\na.flac\t" + "٣".encode() + b"\n", "frames is not a whole number"),
        (b"{root}\na.flac\t4294967297\n", "frames is not a whole number"),
        (b"{root}\na.flac\t" + b"9" * 5000 + b"\n", "frames is not a whole number"),
        (b"{root}\n\xff\xfe\t5\n", "is not UTF-8 text"),
        # Tabs and lines are as many as they should be, but not where they should be.
        (b"{root}\na.flac\t5\nb.flac\n7\t7\t8\n", "line 3 is not"),
        (b"{root}\na.flac\t5\t5\nb.flac\n", "line 2 is not"),
        (b"{root}\na.flac\t5\n\t\t\nb.flac\t5\n", "line 3 is blank"),
        (b"{root}\na.flac\t5\n \xe2\x80\xa8\t5\nb.flac\t5\n", "line 3 is not"),
        (b"{root}\na.flac\t5\r\r\nb.flac\t5\n", r"line 2: '5\r' frames is not"),
        (b"{root}\na.flac\t5\nb.flac\t000000000000000000007\n", "line 3: '000000000000000000007' frames is not"),
        # The first bad line is the one that is told.
        (b"{root}\na.flac\t5\nb.flac\t0\nc.flac\n\nd.flac\t5", "line 3: '0' frames"),
        (b"{root}\na.flac\t5\nb.flac\nc.flac\t0\nd.flac\t5", "line 3 is not"),
    ],
)
@pytest.mark.usefixtures("blocks")
def test_bad_lists_give_one_line_that_names_the_file(tmp_path, content, message):
    path = tmp_path / "bad.tsv"
    path.write_bytes(content.replace(b"{root}", str(tmp_path).encode()))
    with pytest.raises(UserError) as error:
        read_tsv(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_missing_list_and_folder_in_its_place(tmp_path):
    with pytest.raises(UserError, match=r"gone\.tsv does not exist: write it with prepare_data\.py"):
        read_tsv(tmp_path / "gone.tsv")
    with pytest.raises(UserError, match="cannot read"):
        read_tsv(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"), [("a\tb.flac", "a tab or line end"), ("a\nb.flac", "a tab or line end"), ("\udcff", "UTF-8")]
)
def test_failed_write_keeps_the_old_list(tmp_path, name, message):
    path = tmp_path / "t.tsv"
    path.write_text("old")
    with pytest.raises(UserError, match=message):
        write_tsv(path, Manifest(tmp_path, ["ok.flac", name], np.array([1, 2])))
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_write_into_a_file_as_if_it_were_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        write_tsv(tmp_path / "file" / "t.tsv", Manifest(tmp_path, ["a"], np.array([1])))


def test_lists_are_replaced_together(tmp_path):
    one, bad = (Manifest(tmp_path, [name], np.array([1])) for name in ("a", "b\udcff"))
    with pytest.raises(UserError, match="UTF-8"):
        write_lists(tmp_path, {"train.tsv": one, "valid.tsv": bad})
    assert not list(tmp_path.iterdir())
