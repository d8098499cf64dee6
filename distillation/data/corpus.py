"""Find the audio of a corpus, read what the headers say, decode it for a check, and divide it into lists."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from tqdm import tqdm

from distillation.data.audio import AUDIO_SUFFIXES, AudioError, Finding, Header, check_audio, read_header
from distillation.data.manifest import Manifest
from distillation.errors import UserError
from distillation.journal import Journal

logger = logging.getLogger(__name__)

TRAIN_PARTS = ("train-clean-100", "train-clean-360", "train-other-500")
VALID_PARTS = ("dev-clean", "dev-other")
# Where no folder is small enough for valid_fraction, the smallest is held out if it has at most this share.
MAX_VALID_SHARE = 0.2
# Findings are kept once a second. Those that come faster than so many per second are as fast to find as to keep.
KEEP_SECONDS, KEEP_RATE = 1.0, 10_000

Item = TypeVar("Item")
Result = TypeVar("Result")


class Problem(NamedTuple):
    """A file and what is wrong with it."""

    file: Path
    finding: Finding


class Files(NamedTuple):
    """Audio files below one root, sorted, and what their headers say."""

    root: Path
    names: list[str]
    headers: list[Header | AudioError]


def find_librispeech(data: Path) -> Path | None:
    """The folder that holds the parts of LibriSpeech: ``data`` or its LibriSpeech/; None for another corpus."""
    for root in (data, data / "LibriSpeech"):
        if any((root / part).is_dir() for part in TRAIN_PARTS + VALID_PARTS):
            return root
    return None


def scan(root: Path, parts: Sequence[str], num_threads: int | None, known: Journal) -> Files:
    """Find the audio below some folders of ``root`` and read every header that is not ``known``.

    Raises:
        UserError: a folder cannot be read, or there is no audio.
    """
    root = root.resolve()
    names: list[str] = []
    visited: set[tuple[int, int]] = set()
    for part in filter(lambda part: (root / part).is_dir(), parts):
        # Parts of a corpus are often links to other disks; `visited` ends a loop of links and lists nothing twice.
        for folder, subfolders, files in os.walk(root / part, followlinks=True, onerror=_unreadable_folder):
            status = Path(folder).stat()
            if (status.st_dev, status.st_ino) in visited:
                subfolders.clear()
                continue
            visited.add((status.st_dev, status.st_ino))
            subfolders.sort()
            prefix = os.path.relpath(folder, root)
            # Hidden files are not audio: macOS leaves "._x.flac" beside x.flac.
            audio = (name for name in files if Path(name).suffix.lower() in AUDIO_SUFFIXES and name[0] != ".")
            names.extend(name if prefix == "." else f"{prefix}/{name}" for name in audio)
    if not names:
        raise UserError(f"{root} holds no audio files ({', '.join(sorted(AUDIO_SUFFIXES))})")
    names.sort()

    def header(index: int) -> Header | str:
        try:
            return read_header(root / names[index])
        except AudioError as error:
            return error.reason

    paths = [f"{root}/{name}" for name in names]
    found = remembered(header, paths, paths, known, "headers", num_threads, chunk=256, slow=False)
    headers = [AudioError(Path(path), it) if isinstance(it, str) else Header(*it) for path, it in zip(paths, found)]
    return Files(root, names, headers)


def usable_headers(files: Files, sample_rate: int, problems: list[Problem]) -> Manifest:
    """The files with a readable header; the others become problems.

    Raises:
        UserError: a file has another sample rate or several channels, which nothing but conversion cures.
    """
    names, frames, wrong = [], [], []
    for name, header in zip(files.names, files.headers, strict=True):
        if isinstance(header, AudioError):
            problems.append(Problem(files.root / name, Finding("unreadable", header.reason, False)))
        elif header.sample_rate != sample_rate or header.num_channels != 1:
            wrong.append(f"{files.root / name} has {header.sample_rate} Hz and {header.num_channels} channel(s)")
        else:
            names.append(name)
            frames.append(header.num_frames)
    if wrong:
        raise UserError(
            f"{wrong[0]}, wanted {sample_rate} Hz and 1; {len(wrong)} of {len(files.names)} files differ: "
            f"convert them first (sox IN -r {sample_rate} -c 1 OUT)"
        )
    return Manifest(files.root, names, np.array(frames, dtype=np.int64))


def decodable(manifest: Manifest, num_threads: int | None, problems: list[Problem], known: Journal) -> Manifest:
    """Decode every file that is not ``known``; the files that can be trained on.

    Whatever is wrong with them is added to ``problems``.
    """

    def decode(index: int) -> Finding | None:
        return check_audio(manifest.file(index), int(manifest.num_frames[index]))

    paths = [f"{manifest.root}/{name}" for name in manifest.paths]
    keys = [f"{path}, decoded to {num} samples" for path, num in zip(paths, manifest.num_frames.tolist())]
    keep = np.ones(len(manifest), dtype=bool)
    for index, found in enumerate(remembered(decode, paths, keys, known, "decoding", num_threads, chunk=8)):
        if found is not None:
            finding = Finding(*found)
            problems.append(Problem(manifest.file(index), finding))
            keep[index] = finding.usable
    return subset(manifest, keep)


def librispeech_lists(manifest: Manifest, held_out: Manifest | None) -> dict[str, Manifest]:
    """The lists that the parts at hand allow, by the first folder below the root and nothing else in the path.

    Raises:
        UserError: the parts allow none.
    """
    part_of = np.array([name.split("/", 1)[0] for name in manifest.paths])
    present = set(part_of.tolist())
    lists: dict[str, Manifest] = {}
    if TRAIN_PARTS[0] in present:
        lists["train100.tsv"] = subset(manifest, part_of == TRAIN_PARTS[0])
    missing = [part for part in TRAIN_PARTS if part not in present]
    if not missing:
        lists["train960.tsv"] = subset(manifest, np.isin(part_of, TRAIN_PARTS))
    else:
        logger.warning("train960.tsv is not written: %s holds no %s", manifest.root, ", ".join(missing))
    if held_out is not None:
        lists["valid.tsv"] = held_out
    elif present & set(VALID_PARTS):
        lists["valid.tsv"] = subset(manifest, np.isin(part_of, VALID_PARTS))
    else:
        logger.warning("valid.tsv is not written: %s holds no %s, use --valid", manifest.root, " or ".join(VALID_PARTS))
    if not lists:
        raise UserError(f"{manifest.root} allows no list: it holds neither {TRAIN_PARTS[0]} nor all training parts")
    return lists


def choose_held_out(manifest: Manifest, fraction: float, seed: int) -> np.ndarray:
    """Mask ``[len(manifest)]`` of what to validate on: whole top folders if possible, so that speakers differ.

    Raises:
        UserError: there are fewer than two files.
    """
    if len(manifest) < 2:
        raise UserError(f"{manifest.root} holds {len(manifest)} usable file(s): too few to hold some out, use --valid")
    split = [name.split("/") for name in manifest.paths]
    depth = 0  # of the first folder level at which the files part
    while all(len(parts) > depth + 1 and parts[depth] == split[0][depth] for parts in split):
        depth += 1
    tops = np.array([parts[depth] for parts in split])
    folders = any(len(parts) > depth + 1 for parts in split)
    for groups, what in ((tops, "top folders" if folders else "files"), (np.array(manifest.paths), "files")):
        _, group_of = np.unique(groups, return_inverse=True)
        frames = np.bincount(group_of, weights=manifest.num_frames)
        chosen, total = [], 0.0
        for group in np.random.default_rng(seed).permutation(len(frames)).tolist():
            if total + frames[group] <= fraction * frames.sum():
                chosen.append(group)
                total += frames[group]
        if not chosen and (what == "files" or frames.min() <= MAX_VALID_SHARE * frames.sum()):
            chosen = [int(frames.argmin())]
        if chosen:
            logger.info("held out for validation: %d of %d %s", len(chosen), len(frames), what)
            return np.isin(group_of, chosen)
    raise AssertionError("files can always be held out")


def subset(manifest: Manifest, keep: np.ndarray) -> Manifest:
    """The utterances where ``keep`` is true."""
    paths = [name for name, kept in zip(manifest.paths, keep.tolist(), strict=True) if kept]
    return Manifest(manifest.root, paths, manifest.num_frames[keep])


def remembered(
    function: Callable[[int], Any],
    paths: Sequence[str],
    keys: Sequence[str],
    known: Journal,
    label: str,
    num_threads: int | None,
    chunk: int,
    slow: bool = True,
) -> Iterator[Any]:
    """What a function finds in each file, in order and in plain JSON types; it is kept, and looked for only once.

    Args:
        function: is given the index of a file.
        paths: of the files; one that has another size or time than when it was looked at is looked at again.
        keys: under which the findings are kept.
        known: keeps them.
        label: of the progress bar.
        num_threads: files looked at once.
        chunk: files that a thread takes at once.
        slow: whether what is found in the first second is kept; then that is measured.
    """

    def look(index: int) -> tuple[Any, list[Any] | None]:
        before = known.pieces.get(keys[index])
        if before is None and not slow:
            return function(index), None
        try:
            status = os.stat(paths[index])  # noqa: PTH116 (a Path of each of a million files would take longer)
        except OSError:
            return function(index), None
        size, time_ns = status.st_size, status.st_mtime_ns
        if before is not None and before[:2] == [size, time_ns]:
            return before[2], None
        return (found := function(index)), [size, time_ns, found]

    new: dict[str, list[Any]] = {}
    since, count = time.monotonic(), 0
    try:
        for key, (found, piece) in zip(keys, in_threads(look, range(len(paths)), label, num_threads, chunk)):
            count += 1
            if piece is not None:
                new[key] = piece
            if (elapsed := time.monotonic() - since) > KEEP_SECONDS:
                slow = count < KEEP_RATE * elapsed
                known.update(new)
                new, since, count = {}, time.monotonic(), 0
            yield found
    finally:
        known.update(new)


def in_threads(
    function: Callable[[Item], Result], items: Sequence[Item], label: str, num_threads: int | None, chunk: int
) -> Iterator[Result]:
    """Results in order, from several threads, with a progress bar when it takes longer than a second.

    Whoever stops waiting for them, as on a signal, waits for no more than one item of each thread.
    """
    ended = threading.Event()

    def work(start: int) -> list[Result]:
        return [function(item) for item in items[start : start + chunk] if not ended.is_set()]

    pool = ThreadPoolExecutor(num_threads or 2 * (os.cpu_count() or 1))
    try:
        with tqdm(total=len(items), desc=label, unit="file", delay=1) as bar:
            for results in pool.map(work, range(0, len(items), chunk)):
                bar.update(len(results))
                yield from results
    finally:
        ended.set()
        pool.shutdown(cancel_futures=True)


def _unreadable_folder(error: OSError) -> None:
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}")
