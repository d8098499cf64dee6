"""Audio of a corpus: what is found, what headers and samples say, and how it is divided."""

from __future__ import annotations

import math
import signal
import threading
import time

import numpy as np
import pytest

from distillation.data import corpus, looking
from distillation.data.audio import AudioError
from distillation.data.corpus import (
    MAX_VALID_SHARE,
    TRAIN_PARTS,
    VALID_PARTS,
    Files,
    as_they_are,
    choose_held_out,
    decodable,
    divide,
    find,
    find_librispeech,
    layout_of,
    read_headers,
    subset,
)
from distillation.data.looking import WAITING, in_threads
from distillation.data.manifest import Manifest
from distillation.errors import UserError
from distillation.journal import Journal
from distillation.stopping import Signalled


def manifest(frames: dict[str, int]) -> Manifest:
    return Manifest("/corpus", list(frames), np.array(list(frames.values()), dtype=np.int64))


@pytest.fixture
def known(tmp_path) -> Journal:
    return Journal(tmp_path / "known.jsonl", {}, "findings")


def headers_of(root, known, problems: list | None = None) -> Files:
    return read_headers(root, find(root, ["."]).names, 1, known, [] if problems is None else problems)


@pytest.mark.parametrize("inside", ["", "LibriSpeech"])
def test_librispeech_is_found_by_its_training_parts(tmp_path, inside):
    (tmp_path / inside / "dev-other").mkdir(parents=True)
    (tmp_path / inside / "test-clean").mkdir()
    (tmp_path / inside / "train-clean-100").write_text("a file of that name")
    assert find_librispeech(tmp_path) is None and list(layout_of(tmp_path).lists) == ["train.tsv", "valid.tsv"]
    (tmp_path / inside / "train-other-500").mkdir()
    assert find_librispeech(tmp_path) == tmp_path / inside


@pytest.mark.parametrize(
    ("parts", "lists"),
    [
        ([], {"train.tsv": (".",), "valid.tsv": ()}),
        (["train-clean-100", "test-other"], {"train100.tsv": TRAIN_PARTS[:1], "valid.tsv": ()}),
        ([*TRAIN_PARTS[:2], "dev-other"], {"train100.tsv": TRAIN_PARTS[:1], "valid.tsv": ("dev-other",)}),
        (
            [*TRAIN_PARTS, *VALID_PARTS],
            {"train100.tsv": TRAIN_PARTS[:1], "train960.tsv": TRAIN_PARTS, "valid.tsv": VALID_PARTS},
        ),
        ([*TRAIN_PARTS[1:], "dev-clean"], {"train.tsv": TRAIN_PARTS[1:], "valid.tsv": ("dev-clean",)}),
    ],
)
def test_which_lists_a_folder_gives(tmp_path, parts, lists):
    for part in parts:
        (tmp_path / part).mkdir()
    assert layout_of(tmp_path).lists == lists


def test_links_are_followed_and_what_is_hidden_is_skipped(tmp_path, noise):
    root, disk = tmp_path / ".root", tmp_path / "disk"
    for name in (
        ".git/0.flac",
        "b/.snapshot/1.flac",
        "b/._1.flac",
        "b/2.flac",
        "b/1.FLAC",
        "a.wav",
        "elsewhere/3.flac",
    ):
        noise(root / name, 0.1, 0)
    (root / "b" / "text.txt").write_text("")
    noise(disk / "4.ogg", 0.2, 0)
    (root / "link").symlink_to(disk)
    (root / "again").symlink_to(disk)
    (disk / "loop").symlink_to(disk)
    (root / "broken.flac").symlink_to(tmp_path / "gone.flac")
    (root / "itself").symlink_to("itself")
    found = find(root, [".", "none"])
    assert found.root == root
    assert found.names == ["a.wav", "again/4.ogg", "b/1.FLAC", "b/2.flac", "broken.flac", "elsewhere/3.flac"]
    assert find(root, ["elsewhere", "b"]).names == ["b/1.FLAC", "b/2.flac", "elsewhere/3.flac"]
    problems: list = []
    files = read_headers(root, found.names, 2, None, problems)
    by_name = dict(zip(files.names, files.headers, strict=True))
    assert by_name["b/2.flac"].num_frames == 1600 and by_name["a.wav"].sample_rate == 16000
    ((file, finding),) = problems
    assert file == root / "broken.flac" and "No such file" in finding.detail
    with pytest.raises(UserError, match=r"none holds no audio files \(.*\.flac"):
        find(tmp_path / "none", ["."])
    (root / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no audio of its own"):
        find(root, ["b", "empty"])


@pytest.mark.parametrize("numbered", [True, False])
def test_each_file_is_listed_once_under_its_own_name(tmp_path, noise, caplog, monkeypatch, numbered):
    """Also where a folder has other inode numbers than its files, as on FUSE."""
    caplog.set_level("INFO")
    root, disk = tmp_path / "root", tmp_path / "disk"
    for name in ("all/1.wav", "all/2.wav", "all/3.wav", "z/4.wav"):
        noise(root / name, 0.1, 0)
    noise(disk / "5.wav", 0.1, 0)
    (root / "a").symlink_to("z")
    (root / "selected").mkdir()
    (root / "selected" / "1.wav").symlink_to("../all/1.wav")
    (root / "0.wav").symlink_to("selected/1.wav")
    (root / "selected" / "hard.wav").hardlink_to(root / "all" / "2.wav")
    (root / "selected" / "9.wav").symlink_to(disk / "5.wav")
    (root / "disk").symlink_to(disk)
    if not numbered:
        monkeypatch.setattr(corpus, "_identity", lambda entry, device: (-device, entry.stat().st_ino))
    found = find(root, ["."])
    assert found.names == ["all/1.wav", "all/2.wav", "all/3.wav", "disk/5.wav", "z/4.wav"]
    assert "4 further names (links) of files" in caplog.text and "1 links to folders" in caplog.text
    assert find(root, ["."], find(root / "selected", ["."]).identities).names == ["all/3.wav", "z/4.wav"]
    assert "3 files of --data are in --valid" in caplog.text


def test_formats_of_ffmpeg_are_told_apart(tmp_path, noise):
    noise(tmp_path / "a.wav", 0.1, 0)
    for name in ("b.M4A", "c.wma", "sub/d.m4a", ".e.m4a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("not looked at")
    (tmp_path / "link.m4a").symlink_to("b.M4A")
    found = find(tmp_path, ["."])
    assert (found.names, found.foreign) == (["a.wav"], ["b.M4A", "c.wma", "sub/d.m4a"])
    text = corpus.describe_foreign(found.root, found.foreign)
    assert text.startswith("3 files") and f"(2 .m4a, 1 .wma; first {tmp_path / 'b.M4A'})" in text


def test_headers_that_can_be_used(tmp_path, noise, known):
    for i in range(3):
        noise(tmp_path / f"{i}.flac", 0.1 * (i + 1), i)
    (tmp_path / "1.flac").write_bytes(b"not audio")
    problems: list = []
    usable = as_they_are(headers_of(tmp_path, known, problems), 16000)
    assert (usable.paths, usable.num_frames.tolist()) == (["0.flac", "2.flac"], [1600, 4800])
    ((file, finding),) = problems
    assert (file, finding.kind, finding.usable) == (tmp_path / "1.flac", "unreadable", False)
    noise(tmp_path / "8k.flac", 0.1, 0, rate=8000)
    noise(tmp_path / "stereo.flac", 0.1, 0, channels=2)
    message = r"8k\.flac has 8000 Hz and 1 channel\(s\), wanted 16000 Hz .*; 2 of 4 files differ: .*--convert FOLDER"
    with pytest.raises(UserError, match=message):
        as_they_are(headers_of(tmp_path, known), 16000)


def test_decoding_finds_what_headers_do_not_show(tmp_path, noise, known):
    for name in ("cut", "good", "silent"):
        noise(tmp_path / f"{name}.wav", 1.0, 0)
    whole = (tmp_path / "cut.wav").read_bytes()
    (tmp_path / "silent.wav").write_bytes(whole[:44] + bytes(len(whole) - 44))
    problems: list = []
    files = as_they_are(headers_of(tmp_path, known, problems), 16000)
    (tmp_path / "cut.wav").write_bytes(whole[:5000])
    assert not problems
    kept = decodable(files, 2, problems, known)
    assert kept.paths == ["good.wav", "silent.wav"]
    assert [(p.file.name, p.finding.kind, p.finding.usable) for p in problems] == [
        ("cut.wav", "unreadable", False),
        ("silent.wav", "silent", True),
    ]


def test_what_failed_is_looked_at_again(tmp_path, noise, known, monkeypatch):
    """The file may have been out of reach: neither size nor time tell."""
    noise(tmp_path / "x.wav", 0.1, 0)
    monkeypatch.setattr(looking, "KEEP_SECONDS", 0.0)

    def unreachable(path, *_):
        raise AudioError(path, "Stale file handle")

    for name in ("probe", "check_audio"):
        problems: list = []
        with monkeypatch.context() as patch:
            patch.setattr(corpus, name, unreachable)
            files = headers_of(tmp_path, known, problems)
            decodable(as_they_are(files, 16000), 1, problems, known)
        assert problems == [(tmp_path / "x.wav", ("unreadable", "Stale file handle", False))]
        found = decodable(as_they_are(headers_of(tmp_path, known), 16000), 1, problems, known)
        assert found.paths == ["x.wav"] and len(problems) == 1
        known.pieces.clear()


def librispeech(tmp_path, *parts: str):
    for part in parts:
        (tmp_path / part).mkdir()
    return layout_of(tmp_path)


def test_lists_of_librispeech(tmp_path):
    """By the first folder alone, whatever the rest of the path says."""
    frames = {f"{part}/1/dev-clean/train-clean-100.flac": i for i, part in enumerate(TRAIN_PARTS + VALID_PARTS, 1)}
    layout = librispeech(tmp_path, *TRAIN_PARTS, *VALID_PARTS)
    lists = divide(manifest(frames), layout, None, 0.05, 0)
    assert {name: found.num_frames.tolist() for name, found in lists.items()} == {
        "train100.tsv": [1],
        "train960.tsv": [1, 2, 3],
        "valid.tsv": [4, 5],
    }
    own = manifest({"mine.flac": 7})
    assert divide(manifest(frames), layout, own, 0.05, 0)["valid.tsv"] is own


@pytest.mark.parametrize("parts", [TRAIN_PARTS, TRAIN_PARTS[:1], TRAIN_PARTS[1:]])
def test_speakers_are_held_out_of_librispeech_without_dev_parts(tmp_path, caplog, parts):
    """Of train-clean-100, or of all that train.tsv holds; they are in no training list."""
    caplog.set_level("INFO")
    frames = {f"{part}/{k}{s:02}/1/{i}.flac": 100 for k, part in enumerate(parts) for s in range(40) for i in range(2)}
    layout = librispeech(tmp_path, *parts, "test-clean")
    lists = divide(manifest(frames), layout, None, 0.1, 0)
    assert list(lists) == list(layout_of(tmp_path).lists)
    *training, valid = [set(found.paths) for found in lists.values()]
    speakers = {name.rsplit("/", 2)[0] for name in valid}
    expected = parts[:1] if parts[0] == TRAIN_PARTS[0] else parts
    assert len(valid) == 2 * len(speakers) == 8 * len(expected)
    assert {name.split("/")[0] for name in speakers} == set(expected)
    assert set.union(*training) == frames.keys() - valid
    whose = f"{len(speakers)} of {40 * len(expected)} speakers of {' and '.join(expected)}, as there is no dev-clean"
    assert caplog.text.count("held out for validation") == 1 and whose in caplog.text


# What is held out


def speakers(counts: list[int], prefix: str = "wavs/") -> Manifest:
    """``counts``: files of each speaker, 100 to 130 frames long."""
    return manifest({f"{prefix}s{s}/{i}.flac": 100 + 10 * (i % 4) for s, n in enumerate(counts) for i in range(n)})


def share(files: Manifest, mask: np.ndarray) -> float:
    return files.num_frames[mask].sum() / files.num_frames.sum()


@pytest.mark.parametrize("prefix", ["", "wavs/deep/"])
@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_whole_speakers_are_held_out_within_the_share(prefix, fraction):
    files = speakers([5, 3, 8, 1, 4, 9, 2, 6, 3, 3, 4, 5], prefix)
    chosen = set()
    for seed in range(5):
        mask = choose_held_out(files, fraction, seed)
        assert mask.shape == (len(files),) and mask.dtype == bool
        assert np.array_equal(mask, choose_held_out(files, fraction, seed))
        assert 0 < share(files, mask) <= fraction
        of = np.array([name.removeprefix(prefix).split("/")[0] for name in files.paths])
        assert not set(of[mask]) & set(of[~mask])
        chosen.add(mask.tobytes())
    assert len(chosen) > 1, "the seed decides"


def test_files_are_held_out_where_no_folder_is_small_enough(caplog):
    caplog.set_level("INFO")
    files = speakers([40, 40])
    mask = choose_held_out(files, 0.1, 0)
    assert 0 < share(files, mask) <= 0.1 and "of 80 files" in caplog.text
    # the smallest folder, if it is nearly small enough
    files = speakers([10, 10, 10, 10, 8])
    mask = choose_held_out(files, 0.05, 0)
    assert {name.split("/")[1] for name in np.array(files.paths)[mask]} == {"s4"}
    assert 0.05 < share(files, mask) <= MAX_VALID_SHARE
    # a flat folder, all files longer than the share: the shortest
    assert choose_held_out(manifest({"a": 5, "b": 4, "c": 6}), 0.01, 0).tolist() == [False, True, False]
    with pytest.raises(UserError, match="1 usable file"):
        choose_held_out(manifest({"a": 5}), 0.5, 0)


def test_subset():
    files = manifest({"a": 1, "b": 2, "c": 3})
    kept = subset(files, np.array([True, False, True]))
    assert (kept.root, kept.paths, kept.num_frames.tolist()) == (files.root, ["a", "c"], [1, 3])


def test_threads_number_their_results_and_raise():
    def slow_first(item: int) -> int:
        time.sleep(0.02 if item < 3 else 0)
        if item == 99:
            raise KeyError(item)
        return item**2

    assert sorted(in_threads(slow_first, range(20), "x", 4, chunk=3)) == [(i, i**2) for i in range(20)]
    assert list(in_threads(slow_first, [], "x", None, chunk=3)) == []
    with pytest.raises(KeyError):
        list(in_threads(slow_first, range(90, 100), "x", 2, chunk=3))


def test_few_items_wait_for_a_thread(monkeypatch):
    """Whoever takes the results one by one decides how far threads run ahead."""
    begun = []
    results = in_threads(begun.append, range(1000), None, 2, chunk=1)
    for _ in range(3):
        next(results)
    time.sleep(0.05)
    assert len(begun) <= 3 + 2 * WAITING * 2
    assert len(list(results)) == 997


def test_a_stop_waits_for_no_more_than_what_is_being_done():
    begun = []

    def slow(item: int) -> int:
        begun.append(item)
        time.sleep(0 if item < 5 else 0.1)
        return item

    with pytest.raises(Signalled):
        for _ in in_threads(slow, range(1000), "x", 4, chunk=5):
            before = len(begun)
            raise Signalled(signal.SIGTERM)
    assert len(begun) <= before + 2 * 4  # each thread ends what it does, and may just have begun another
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


@pytest.mark.parametrize("rate", [0, math.inf])
def test_headers_are_kept_where_they_come_slowly(tmp_path, noise, known, monkeypatch, rate):
    """What comes fast is as fast to find as to keep."""
    monkeypatch.setattr(looking, "KEEP_RATE", rate)
    monkeypatch.setattr(looking, "KEEP_SECONDS", 0.0)
    # one after another: threads take many at once and run ahead
    in_turn = lambda function, items, *_: (found for found in enumerate(map(function, items)))  # noqa: E731
    monkeypatch.setattr(looking, "in_threads", in_turn)
    for i in range(4):
        noise(tmp_path / f"{i}.wav", 0.1 * (i + 1), i)
    noise(tmp_path / "4.wav", 0.5, 4)
    (tmp_path / "text.wav").write_text("not audio")
    first: list = []
    found = headers_of(tmp_path, known, first)
    (tmp_path / "5.wav").symlink_to(tmp_path / "gone.wav")
    second: list = []
    again = headers_of(tmp_path, known, second)
    assert bool(known.pieces) == (rate == math.inf)
    assert again == found and second[1:] == first
    assert "No such file" in second[0].finding.detail
    assert not {f"{tmp_path / name}" for name in ("5.wav", "text.wav")} & known.pieces.keys()
    if rate:
        known.pieces = {key: [*stamp, [[7, 16000, 1], True]] for key, (*stamp, _) in known.pieces.items()}
        noise(tmp_path / "0.wav", 0.3, 0)
        frames = [header.num_frames for header in headers_of(tmp_path, known).headers]
        assert frames == [4800, 7, 7, 7, 7]
