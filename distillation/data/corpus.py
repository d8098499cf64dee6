"""Find the audio of a corpus, read what the headers say, decode it for a check, and divide it into lists."""

import heapq
import logging
import os
from collections import Counter
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from distillation.data.audio import AUDIO_SUFFIXES, AudioError, Finding, Header, check_audio, probe
from distillation.data.ffmpeg import FFMPEG_SUFFIXES
from distillation.data.looking import remembered
from distillation.data.manifest import NO_NAME, UNLISTABLE, Manifest
from distillation.errors import UserError
from distillation.journal import Journal

logger = logging.getLogger(__name__)

ALL_SUFFIXES = AUDIO_SUFFIXES | FFMPEG_SUFFIXES

TRAIN_PARTS = ("train-clean-100", "train-clean-360", "train-other-500")
VALID_PARTS = ("dev-clean", "dev-other")
# Where no folder is small enough for valid_fraction, the smallest is held out if it has at most this share.
MAX_VALID_SHARE = 0.2
Identity = tuple[int, int]  # device and inode number of a file: the same under all of its names


class Problem(NamedTuple):
    """A file and what is wrong with it."""

    file: Path
    finding: Finding


class Found(NamedTuple):
    """Files below one root, each once, whatever links there are."""

    root: Path
    names: list[str]  # sorted; in formats that are read here
    foreign: list[str]  # sorted; in formats that only ffmpeg reads
    identities: AbstractSet[Identity]
    tops: list[Path]  # resolved: the root, and the folders elsewhere that symbolic links lead to


class Files(NamedTuple):
    """Audio files below one root and what their headers say."""

    root: Path
    names: list[str]
    headers: list[Header]
    seekable: list[bool]
    """Whether samples can be read from any place."""


class Layout(NamedTuple):
    """The lists that a folder gives."""

    root: Path
    lists: dict[str, tuple[str, ...]]
    """The folders below the root that each list holds; none: it is held out from the first list."""
    librispeech: bool

    @property
    def missing(self) -> list[str]:
        """Training parts of LibriSpeech that are not there."""
        return [part for part in TRAIN_PARTS if not (self.root / part).is_dir()]

    @property
    def parts(self) -> list[str]:
        """All folders that the lists hold."""
        return sorted({part for parts in self.lists.values() for part in parts})


def find_librispeech(data: Path) -> Path | None:
    """The folder with training parts of LibriSpeech: ``data`` or its LibriSpeech/; None for another corpus."""
    for root in (data, data / "LibriSpeech"):
        if any((root / part).is_dir() for part in TRAIN_PARTS):
            return root
    return None


def layout_of(data: Path) -> Layout:
    """Which lists a folder gives, by its subfolders alone."""
    root = find_librispeech(data)
    if root is None:
        return Layout(data, {"train.tsv": (".",), "valid.tsv": ()}, False)
    training = tuple(part for part in TRAIN_PARTS if (root / part).is_dir())
    lists: dict[str, tuple[str, ...]] = {}
    if TRAIN_PARTS[0] in training:
        lists["train100.tsv"] = TRAIN_PARTS[:1]
    if training == TRAIN_PARTS:
        lists["train960.tsv"] = TRAIN_PARTS
    lists = lists or {"train.tsv": training}
    return Layout(root, {**lists, "valid.tsv": tuple(part for part in VALID_PARTS if (root / part).is_dir())}, True)


def find(root: Path, parts: Sequence[str], elsewhere: AbstractSet[Identity] = frozenset()) -> Found:
    """Find the audio below some folders of ``root``, but for hidden files and folders.

    A file that is found under several names (symbolic or hard links) counts once, under its own name rather than one
    that leads through a symbolic link.

    Args:
        root: of the names.
        parts: folders below it, or "." for itself; those that are not there are passed over.
        elsewhere: files that are left out: another list holds them.

    Raises:
        UserError: a folder cannot be read, or one of ``parts`` has no audio of its own.
    """
    root = root.resolve()
    parts = [part for part in dict.fromkeys(parts) if (root / part).is_dir()]
    files, tops, num_folders = _walk(root, parts)
    files.sort()
    if not files:
        raise UserError(f"{root} holds no audio files ({', '.join(sorted(AUDIO_SUFFIXES))})")
    once: dict[Identity, str] = {}
    for _, name, identity in files:
        once.setdefault(identity, name)
    for part in parts:
        if part != "." and not any(name.startswith(f"{part}/") for name in once.values()):
            raise UserError(f"{root / part} holds no audio of its own: put it there, or remove the folder")
    names = sorted(name for identity, name in once.items() if identity not in elsewhere)
    if num_links := len(files) - len(once):
        logger.info("%s: %d further names (links) of files that are listed are left out", root, num_links)
    if num_folders:
        logger.info("%s: %d links to folders that are listed are left out", root, num_folders)
    if num_elsewhere := len(once) - len(names):
        logger.info("%d files of --data are in --valid as well: they are not trained on", num_elsewhere)
    own = [name for name in names if _suffix(name) in AUDIO_SUFFIXES]
    foreign = [] if len(own) == len(names) else [name for name in names if _suffix(name) in FFMPEG_SUFFIXES]
    return Found(root, own, foreign, once.keys(), [root, *tops])


def without_bad_names(found: Found, problems: list[Problem]) -> Found:
    """Without the files whose names no list can hold: they become ``problems``."""
    bad = set(filter(UNLISTABLE.search, (*found.names, *found.foreign)))
    problems += [Problem(found.root / name, Finding("name", NO_NAME, False)) for name in sorted(bad)]
    names, foreign = ([name for name in names if name not in bad] for names in (found.names, found.foreign))
    return found._replace(names=names, foreign=foreign)


def _walk(root: Path, parts: Sequence[str]) -> tuple[list[tuple[bool, str, Identity]], list[Path], int]:
    """All audio files: whether a symbolic link leads there, name and identity.

    Then the folders that links lead to; and how many links lead to folders that are listed under other names.
    """
    files: list[tuple[bool, str, Identity]] = []
    tops: list[Path] = []
    visited: set[Identity] = set()
    # Folders under their own names first. Then one link after the other, in order of names: parts of a corpus are often
    # links to other disks. `visited` ends a loop of links.
    own: list[tuple[bool, str]] = []
    links: list[str] = []
    num_again = 0
    for part in parts:
        prefix = "" if part == "." else f"{part}/"
        if (root / part).is_symlink():
            heapq.heappush(links, prefix)
        else:
            own.append((False, prefix))
    while own or links:
        is_top = not own
        linked, prefix = own.pop() if own else (True, heapq.heappop(links))
        try:
            status = os.stat(f"{root}/{prefix}")  # noqa: PTH116 (there may be a million; so below)
            device, here = status.st_dev, (status.st_dev, status.st_ino)
            if here in visited:
                num_again += 1
                continue
            visited.add(here)
            if is_top:
                tops.append((root / prefix).resolve())
            with os.scandir(f"{root}/{prefix}") as entries:
                numbered: bool | None = None
                for entry in entries:
                    name = entry.name
                    if name[0] == ".":
                        continue
                    if _is_folder(entry):
                        if entry.is_symlink():
                            heapq.heappush(links, f"{prefix}{name}/")
                        else:
                            own.append((linked, f"{prefix}{name}/"))
                    elif _suffix(name) in ALL_SUFFIXES:
                        if is_link := entry.is_symlink():
                            identity = _identity(entry, device)
                        else:
                            # The folder knows the number of a file without a look at the file, but on some network
                            # and overlay file systems it is another number.
                            if numbered is None:
                                numbered = _identity(entry, device) == (device, entry.inode())
                            identity = (device, entry.inode()) if numbered else _identity(entry, device)
                        files.append((linked or is_link, f"{prefix}{name}", identity))
        except OSError as error:
            raise UserError(f"cannot read the folder {root}/{prefix}: {error.strerror}") from None
    return files, tops, num_again


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or into a folder that may not be looked into
        return False


def _identity(entry: os.DirEntry[str], device: int) -> Identity:
    try:
        status = entry.stat()
    except OSError:  # a link to nowhere: what reads it will say so
        return device, entry.inode()
    return status.st_dev, status.st_ino


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


def describe_foreign(root: Path, foreign: Sequence[str]) -> str:
    """How many files only ffmpeg reads, of which formats, and the first."""
    counts = Counter(map(_suffix, foreign)).most_common()
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in counts)
    return f"{len(foreign)} files are in formats that only ffmpeg reads ({kinds}; first {root / foreign[0]})"


def read_headers(
    root: Path, names: list[str], num_threads: int | None, known: Journal | None, problems: list[Problem]
) -> Files:
    """Read every header that is not ``known``; files whose header cannot be read become ``problems``."""

    def look(index: int) -> tuple[Header, bool]:
        return probe(root / names[index])

    paths = [f"{root}/{name}" for name in names]
    files = Files(root, [], [], [])
    results = remembered(look, paths, paths, known, "headers", num_threads, chunk=256, slow=False)
    for index, found in sorted(results, key=itemgetter(0)):
        if isinstance(found, AudioError):
            problems.append(unreadable(root / names[index], found))
        else:
            header, seekable = found
            files.names.append(names[index])
            files.headers.append(Header(*header))
            files.seekable.append(seekable)
    return files


def unreadable(file: Path, error: AudioError) -> Problem:
    """A file that cannot be used."""
    return Problem(file, Finding("unreadable", error.reason, False))


def as_they_are(files: Files, sample_rate: int) -> Manifest:
    """The files without conversion.

    Raises:
        UserError: a file has another sample rate or several channels, which nothing but conversion cures.
    """
    wrong = [i for i, it in enumerate(files.headers) if (it.sample_rate, it.num_channels) != (sample_rate, 1)]
    if wrong:
        name, header = files.names[wrong[0]], files.headers[wrong[0]]
        raise UserError(
            f"{files.root / name} has {header.sample_rate} Hz and {header.num_channels} channel(s), wanted "
            f"{sample_rate} Hz and 1; {len(wrong)} of {len(files.names)} files differ: prepare_data.py --convert "
            f"FOLDER makes {sample_rate / 1000:g} kHz mono copies"
        )
    return Manifest(files.root, files.names, np.array([it.num_frames for it in files.headers], dtype=np.int64))


def decodable(manifest: Manifest, num_threads: int | None, problems: list[Problem], known: Journal) -> Manifest:
    """Decode every file that is not ``known``; the files that can be trained on.

    Whatever is wrong with them is added to ``problems``.
    """

    def decode(index: int) -> Finding | None:
        return check_audio(manifest.file(index), int(manifest.num_frames[index]))

    paths = [f"{manifest.root}/{name}" for name in manifest.paths]
    keys = [f"{path}, decoded to {num} samples" for path, num in zip(paths, manifest.num_frames.tolist())]
    keep = np.ones(len(manifest), dtype=bool)
    results = remembered(decode, paths, keys, known, "decoding", num_threads, chunk=8)
    for index, found in sorted(results, key=itemgetter(0)):
        if found is not None:
            file = manifest.file(index)
            problem = unreadable(file, found) if isinstance(found, AudioError) else Problem(file, Finding(*found))
            problems.append(problem)
            keep[index] = problem.finding.usable
    return subset(manifest, keep)


def divide(
    manifest: Manifest, layout: Layout, validation: Manifest | None, fraction: float, seed: int
) -> dict[str, Manifest]:
    """The lists of a folder, by the first folder of each path and nothing else in it.

    Args:
        manifest: all usable files.
        layout: of the folder.
        validation: the list to validate on, if it is of another folder.
        fraction: share of the audio to hold out where the folder has nothing to validate on.
        seed: of the choice of what is held out.

    Raises:
        UserError: there are fewer than two files to hold some out of.
    """
    part_of = np.array([name.split("/", 1)[0] for name in manifest.paths])
    masks = {
        name: np.ones(len(manifest), dtype=bool) if parts == (".",) else np.isin(part_of, parts)
        for name, parts in layout.lists.items()
    }
    if validation is not None:
        del masks["valid.tsv"]
    elif not layout.lists["valid.tsv"]:
        source = next(iter(masks))
        files, what = subset(manifest, masks[source]), "top folders"
        if layout.librispeech:  # speakers are folders of a part
            files = Manifest(files.root, [name.split("/", 1)[1] for name in files.paths], files.num_frames)
            what = f"speakers of {' and '.join(layout.lists[source])}, as there is no {' or '.join(VALID_PARTS)},"
        held_out = np.zeros(len(manifest), dtype=bool)
        held_out[masks[source]] = choose_held_out(files, fraction, seed, what)
        masks = {name: mask & ~held_out for name, mask in masks.items()} | {"valid.tsv": held_out}
    lists = {name: subset(manifest, mask) for name, mask in masks.items()}
    return lists if validation is None else {**lists, "valid.tsv": validation}


def choose_held_out(manifest: Manifest, fraction: float, seed: int, top_folders: str = "top folders") -> np.ndarray:
    """Mask ``[len(manifest)]`` of what to validate on: whole top folders if possible, so that speakers differ.

    Args:
        manifest: the files to choose from.
        fraction: share of the audio.
        seed: of the choice.
        top_folders: what they are, for the log.

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
    for groups, what in ((tops, top_folders if folders else "files"), (np.array(manifest.paths), "files")):
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
            text = "held out for validation: %d of %d %s"
            logger.info(text, len(chosen), len(frames), what.removesuffix(","))
            return np.isin(group_of, chosen)
    raise AssertionError("files can always be held out")


def subset(manifest: Manifest, keep: np.ndarray) -> Manifest:
    """The utterances where ``keep`` is true."""
    paths = [name for name, kept in zip(manifest.paths, keep.tolist(), strict=True) if kept]
    return Manifest(manifest.root, paths, manifest.num_frames[keep])
