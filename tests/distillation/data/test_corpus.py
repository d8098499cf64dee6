"""Audio of a corpus: what is found, what headers and samples say, and how it is divided."""

from __future__ import annotations

import math
import signal
import threading
import time

import numpy as np
import pytest

from distillation.data import corpus
from distillation.data.corpus import (
    MAX_VALID_SHARE,
    TRAIN_PARTS,
    VALID_PARTS,
    choose_held_out,
    decodable,
    find_librispeech,
    in_threads,
    librispeech_lists,
    scan,
    subset,
    usable_headers,
)
from distillation.data.manifest import Manifest
from distillation.errors import UserError
from distillation.journal import Journal
from distillation.stopping import Signalled


def manifest(frames: dict[str, int]) -> Manifest:
    return Manifest("/corpus", list(frames), np.array(list(frames.values()), dtype=np.int64))


@pytest.fixture
def known(tmp_path) -> Journal:
    return Journal(tmp_path / "known.jsonl", {}, "findings")


@pytest.mark.parametrize("inside", ["", "LibriSpeech"])
def test_librispeech_is_found_by_its_parts(tmp_path, inside):
    (tmp_path / inside / "other").mkdir(parents=True)
    assert find_librispeech(tmp_path) is None
    (tmp_path / inside / "dev-other").write_text("a file of that name")
    assert find_librispeech(tmp_path) is None
    (tmp_path / inside / "train-other-500").mkdir()
    assert find_librispeech(tmp_path) == tmp_path / inside


def test_scan_follows_links_once_and_skips_what_is_hidden(tmp_path, noise, known):
    root, disk = tmp_path / "root", tmp_path / "disk"
    for name in ("b/2.flac", "b/1.FLAC", "a.wav", "b/._1.flac", "b/text.txt", "elsewhere/3.flac"):
        if name.endswith("txt"):
            (root / name).write_text("")
        else:
            noise(root / name, 0.1, 0)
    noise(disk / "4.ogg", 0.2, 0)
    (root / "link").symlink_to(disk)
    (root / "again").symlink_to(disk)
    (disk / "loop").symlink_to(disk)
    (root / "broken.flac").symlink_to(tmp_path / "gone.flac")
    found = scan(root, [".", "none"], 2, known)
    assert found.root == root
    assert found.names == ["a.wav", "again/4.ogg", "b/1.FLAC", "b/2.flac", "broken.flac", "elsewhere/3.flac"]
    by_name = dict(zip(found.names, found.headers, strict=True))
    assert by_name["b/2.flac"].num_frames == 1600 and by_name["a.wav"].sample_rate == 16000
    assert "No such file" in str(by_name["broken.flac"])
    assert scan(root, ["elsewhere", "b"], None, known).names == ["b/1.FLAC", "b/2.flac", "elsewhere/3.flac"]
    with pytest.raises(UserError, match=r"none holds no audio files \(.*\.flac"):
        scan(tmp_path / "none", ["."], 1, known)


def test_headers_that_can_be_used(tmp_path, noise, known):
    for i in range(3):
        noise(tmp_path / f"{i}.flac", 0.1 * (i + 1), i)
    (tmp_path / "1.flac").write_bytes(b"not audio")
    problems: list = []
    usable = usable_headers(scan(tmp_path, ["."], 1, known), 16000, problems)
    assert (usable.paths, usable.num_frames.tolist()) == (["0.flac", "2.flac"], [1600, 4800])
    ((file, finding),) = problems
    assert (file, finding.kind, finding.usable) == (tmp_path / "1.flac", "unreadable", False)
    noise(tmp_path / "8k.flac", 0.1, 0, rate=8000)
    noise(tmp_path / "stereo.flac", 0.1, 0, channels=2)
    with pytest.raises(UserError, match=r"8k\.flac has 8000 Hz and 1 channel\(s\), wanted 16000 Hz .*; 2 of 5 files"):
        usable_headers(scan(tmp_path, ["."], 1, known), 16000, [])


def test_decoding_finds_what_headers_do_not_show(tmp_path, noise, known):
    for name in ("cut", "good", "silent"):
        noise(tmp_path / f"{name}.wav", 1.0, 0)
    whole = (tmp_path / "cut.wav").read_bytes()
    (tmp_path / "silent.wav").write_bytes(whole[:44] + bytes(len(whole) - 44))
    problems: list = []
    files = usable_headers(scan(tmp_path, ["."], 1, known), 16000, problems)
    (tmp_path / "cut.wav").write_bytes(whole[:5000])
    assert not problems
    kept = decodable(files, 2, problems, known)
    assert kept.paths == ["good.wav", "silent.wav"]
    assert [(p.file.name, p.finding.kind, p.finding.usable) for p in problems] == [
        ("cut.wav", "length", False),
        ("silent.wav", "silent", True),
    ]


def test_lists_of_librispeech(caplog):
    """By the first folder alone, whatever the rest of the path says."""
    frames = {f"{part}/1/dev-clean/train-clean-100.flac": i for i, part in enumerate(TRAIN_PARTS + VALID_PARTS, 1)}
    lists = librispeech_lists(manifest({**frames, "test-clean/x.flac": 9}), None)
    assert {name: found.num_frames.tolist() for name, found in lists.items()} == {
        "train100.tsv": [1],
        "train960.tsv": [1, 2, 3],
        "valid.tsv": [4, 5],
    }
    own = manifest({"mine.flac": 7})
    some = manifest({name: n for name, n in frames.items() if n != 2})
    assert librispeech_lists(some, own)["valid.tsv"] is own
    assert "train960.tsv is not written: /corpus holds no train-clean-360" in caplog.text
    caplog.clear()
    assert set(librispeech_lists(manifest({"train-clean-100/a.flac": 1}), None)) == {"train100.tsv"}
    assert "valid.tsv is not written: /corpus holds no dev-clean or dev-other" in caplog.text
    with pytest.raises(UserError, match="allows no list"):
        librispeech_lists(manifest({"train-other-500/a.flac": 1}), None)


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


def test_threads_keep_the_order_and_raise():
    def slow_first(item: int) -> int:
        time.sleep(0.02 if item < 3 else 0)
        if item == 99:
            raise KeyError(item)
        return item**2

    assert list(in_threads(slow_first, range(20), "x", 4, chunk=3)) == [i**2 for i in range(20)]
    assert list(in_threads(slow_first, [], "x", None, chunk=3)) == []
    with pytest.raises(KeyError):
        list(in_threads(slow_first, range(90, 100), "x", 2, chunk=3))


def test_a_stop_waits_for_no_more_than_what_is_being_done():
    begun = []

    def slow(item: int) -> int:
        begun.append(item)
        time.sleep(0 if item < 5 else 0.1)
        return item

    with pytest.raises(Signalled):
        for item in in_threads(slow, range(1000), "x", 4, chunk=5):
            assert item == 0
            before = len(begun)
            raise Signalled(signal.SIGTERM)
    assert len(begun) <= before + 2 * 4  # each thread ends what it does, and may just have begun another
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]


@pytest.mark.parametrize("rate", [0, math.inf])
def test_headers_are_kept_where_they_come_slowly(tmp_path, noise, known, monkeypatch, rate):
    """What comes fast is as fast to find as to keep."""
    monkeypatch.setattr(corpus, "KEEP_RATE", rate)
    monkeypatch.setattr(corpus, "KEEP_SECONDS", 0.0)
    # one after another: threads take many at once and run ahead
    monkeypatch.setattr(corpus, "in_threads", lambda function, items, *args, **options: map(function, items))
    for i in range(4):
        noise(tmp_path / f"{i}.wav", 0.1 * (i + 1), i)
    (tmp_path / "4.wav").write_text("not audio")
    found = scan(tmp_path, ["."], 1, known)
    (tmp_path / "5.wav").symlink_to(tmp_path / "gone.wav")
    again = scan(tmp_path, ["."], 1, known)
    assert bool(known.pieces) == (rate == math.inf)
    assert [str(header) for header in again.headers[:5]] == [str(header) for header in found.headers]
    assert "No such file" in str(again.headers[5]) and f"{tmp_path / '5.wav'}" not in known
    if rate:
        known.pieces = {key: [*stamp, [7, 16000, 1]] for key, (*stamp, _) in known.pieces.items()}
        noise(tmp_path / "0.wav", 0.3, 0)
        frames = [header.num_frames for header in scan(tmp_path, ["."], 1, known).headers[:5]]
        assert frames == [4800, 7, 7, 7, 7]
