"""What the inputs of extract_features.py name, and what their features are called."""

from __future__ import annotations

from pathlib import Path

import pytest

from distillation.errors import UserError
from exporting.recordings import Recording, find_recordings


@pytest.fixture
def corpus(tmp_path, noise) -> Path:
    """Equal stems in several folders, and in one."""
    for name in ("a/1/x.flac", "a/2/x.flac", "b/x.flac", "b/x.wav", "b/y.z.wav"):
        noise(tmp_path / "corpus" / name, 0.1, 0)
    (tmp_path / "corpus" / "b" / "notes.txt").write_text("no audio")
    return tmp_path / "corpus"


def names(*arguments: Path) -> dict[str, str]:
    """Name -> file, below the corpus."""
    recordings, failures = find_recordings(arguments)
    assert not failures and all(recording[2:] == (0.0, None) for recording in recordings)
    return {recording.name: "/".join(recording.path.parts[-3:]).partition("corpus/")[2] or "/".join(
        recording.path.parts[-3:]) for recording in recordings}  # fmt: skip


def test_a_folder_keeps_its_structure(corpus):
    assert list(names(corpus)) == ["a/1/x", "a/2/x", "b/x.flac", "b/x.wav", "b/y.z"]
    assert list(names(corpus / "a")) == ["1/x", "2/x"]


def test_files_lie_below_the_folder_that_holds_all(corpus):
    assert list(names(corpus / "b" / "y.z.wav")) == ["y.z"]
    assert list(names(corpus / "a/1/x.flac", corpus / "a/2/x.flac")) == ["1/x", "2/x"]
    assert list(names(corpus / "b/x.wav", corpus / "a", corpus / "b/x.wav")) == ["b/x", "a/1/x", "a/2/x"]


def test_lists_of_all_kinds(corpus, tmp_path, monkeypatch):
    tsv, plain, scp = tmp_path / "train.tsv", corpus / "files.txt", tmp_path / "kaldi" / "wav.scp"
    tsv.write_text(f"{corpus}\na/1/x.flac\t1600\na/2/x.flac\t1600\n")
    assert list(names(tsv)) == ["a/1/x", "a/2/x"]
    plain.write_text("\ufeffa/1/x.flac\r\n\nb/y.z.wav\n", encoding="utf-8")
    assert list(names(plain)) == ["a/1/x", "b/y.z"]
    elsewhere = tmp_path / "lists" / "files"
    elsewhere.parent.mkdir()
    elsewhere.write_text("corpus/b/x.wav\n")
    monkeypatch.chdir(tmp_path)  # as `find corpus -name '*.wav' > lists/files` writes it
    assert find_recordings([elsewhere])[0] == [Recording(corpus / "b" / "x.wav", "x")]
    scp.parent.mkdir()
    scp.write_text(
        f"utt-1 {corpus}/a/1/x.flac\nspk/utt-2 corpus/b/x.wav\nutt-3 sox x.sph - |\n../utt-4 corpus/b/x.wav\n"
    )
    recordings, failures = find_recordings([scp])
    assert recordings == [Recording(corpus / "a/1/x.flac", "utt-1"), Recording(corpus / "b/x.wav", "spk/utt-2")]
    assert [failure.what for failure in failures] == [f"{scp}: utt-3", f"{scp}: ../utt-4"]
    assert "made by a command" in failures[0].reason
    (scp.parent / "segments").write_text("s1 utt-1 0.01 0.05\ns2 utt-1 0.05 -1\ns3 utt-9 0 1\n")
    recordings, failures = find_recordings([scp.parent])
    assert [recording[1:] for recording in recordings] == [("s1", 0.01, 0.05), ("s2", 0.05, None)]
    assert failures[0].reason == "missing audio: no utt-9 in wav.scp"
    assert len(find_recordings([scp])[0]) == 2  # named itself, it is recordings


def test_two_ways_to_one_name_are_refused(corpus, tmp_path):
    scp = tmp_path / "wav.scp"
    scp.write_text(f"a/1/x {corpus}/b/x.wav\n")
    with pytest.raises(UserError, match=r"a/1/x\.flac and .*b/x\.wav would both become a/1/x; extract them to two"):
        find_recordings([scp, corpus])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file or directory"),
        (b"\n \n", "names no file"),
        (b"a.wav\nb\0.wav\n", "line 2 holds a NUL"),
        ("\u0561".encode() * 5000 + b"\xff", "not UTF-8"),
    ],
)
def test_what_is_no_list(tmp_path, content, words):
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=words):
        find_recordings([path])


def test_one_bad_line_is_no_matter_of_the_others(corpus):
    listing = corpus / "files.txt"
    listing.write_text(f"{'x' * 300}.wav\nb/x.wav\n")
    assert [recording.path.name for recording in find_recordings([listing])[0]] == [f"{'x' * 300}.wav", "x.wav"]


def test_names_keep_suffixes_until_they_differ(corpus):
    (corpus / "b" / "x.wav.wav").write_bytes(b"x")
    assert {"b/x.flac", "b/x.wav", "b/x.wav.wav"} <= names(corpus).keys()


def test_a_folder_that_is_a_link_keeps_its_name(corpus, tmp_path):
    (tmp_path / "link").symlink_to(corpus)
    assert list(names(tmp_path / "link" / "b" / "y.z.wav", tmp_path / "link")) == [
        "b/y.z", "a/1/x", "a/2/x", "b/x.flac", "b/x.wav",
    ]  # fmt: skip


def test_audio_without_a_suffix_that_is_known(corpus, tmp_path):
    path = (corpus / "b" / "x.wav").rename(tmp_path / "x.speech")
    assert find_recordings([path])[0] == [Recording(path, "x")]
