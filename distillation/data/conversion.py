"""Mono FLAC copies of audio of any kind, at one rate."""

import contextlib
import functools
import json
import logging
import os
import secrets
import shutil
import threading
import unicodedata
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import soundfile
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from distillation.data.audio import AudioError, Header, decode
from distillation.data.corpus import Files, Problem, unreadable
from distillation.data.ffmpeg import ffmpeg_decode
from distillation.data.looking import in_threads, remembered
from distillation.data.manifest import Manifest
from distillation.data.resampling import resampled
from distillation.errors import UserError
from distillation.journal import Journal
from distillation.stopping import keeping
from distillation.training.lock import run_lock
from wav2vec2.checkpoint import replacing

logger = logging.getLogger(__name__)

# Formats that are read as they are: they hold what was recorded, with few exceptions (GSM or ADPCM in WAV, ...).
LOSSLESS_SUFFIXES = frozenset((
    ".flac", ".wav", ".wave", ".rf64", ".w64", ".aiff", ".aif", ".aifc", ".au", ".snd", ".sph", ".nist", ".caf", ".voc",
))  # fmt: skip
# 16-bit FLAC at 16 kHz: 0.066 for LibriSpeech as it is, 0.063 for the same speech out of MP3
GIGABYTES_PER_HOUR = 0.065
# Where the speaker pauses it is less: only with less room than this share of the estimate it is sure not to fit.
LEAST_ROOM = 2 / 3
# A guess for the progress bar: the length of a file that only ffmpeg reads is not known before. 128 kbit/s
FOREIGN_BYTES_PER_HOUR = 57.6e6
# What cannot be read from any place (no length in the header, GSM, ...) is decoded from its start for each crop: long
# files are copied.
LONG_SECONDS = 60
MAX_NAME = 255  # bytes, on nearly all file systems
COPIES = ".copies.jsonl"  # in the folder of the copies: which are finished, and of which originals
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total:.2f} h [{elapsed}<{remaining}]"


@dataclass(frozen=True)
class Copying:
    """What the copies are to be."""

    out: Path
    """Their folder."""
    channel: str
    """Number of the channel to take, or "mix": all are averaged."""
    sample_rate: int
    """In Hz."""
    num_threads: int | None = None
    """Files converted at once; by default one per core."""


def fitting(files: Files, sample_rate: int) -> list[bool]:
    """Which files need no copy."""
    return [
        (header.sample_rate, header.num_channels) == (sample_rate, 1)
        and PurePosixPath(name).suffix.lower() in LOSSLESS_SUFFIXES
        and (seekable or header.num_frames < LONG_SECONDS * sample_rate)
        for name, header, seekable in zip(files.names, files.headers, files.seekable, strict=True)
    ]


def copies_of(folder: Path) -> tuple[Path, dict[str, str]] | None:
    """What a folder of copies was made of: root of the originals; and the name of each copy by that of its original.

    Names are relative to root and folder. Originals that needed no copy are links, under their own names; they are not
    among these. None where the folder is none of copies; nothing is written.
    """
    entries = []
    try:
        for line in (folder / COPIES).read_text("utf-8", "replace").split("\n"):
            with contextlib.suppress(ValueError):  # a crash cut it off
                entries.append(json.loads(line))
        root = Path(entries[0]["of"]["data"])
        copies = _copies_in({entry["key"]: entry["value"] for entry in entries[1:]})
        return root, {name: copy["copy"] for name, copy in copies.items() if copy["bytes"]}
    except (OSError, LookupError, TypeError):
        return None


def _copies_in(pieces: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a journal says of the copies by the names of their originals; of 0 bytes those that may be half-made."""
    return {name: piece[2] for name, piece in pieces.items() if piece is not None}


def convert(files: Files, foreign: Sequence[str], copying: Copying, problems: list[Problem]) -> Manifest:
    """Make copies of files in the same folders; those that fit already are linked. Originals are only read.

    A finished copy stays while its original has the same size and time and the copy has the same name and size. Copies
    that nothing is the original of any more are removed.

    Args:
        files: below one root.
        foreign: names below the same root of files that ffmpeg reads.
        copying: what the copies are to be.
        problems: originals that cannot be converted are added.

    Returns:
        The copies and links.

    Raises:
        Stopped: a signal asked for it.
        UserError: a file lacks the channel, the folder is in use or holds other copies or files that would be
            overwritten, its disk has too little room, or the name of a copy would be too long.
    """
    with run_lock(copying.out, owner=True):
        return _convert(files, foreign, copying, problems)


def _convert(files: Files, foreign: Sequence[str], copying: Copying, problems: list[Problem]) -> Manifest:
    root, out = files.root, copying.out
    require_channel(files, copying.channel)
    headers = dict(zip(files.names, files.headers, strict=True))
    linked = [name for name, fit in zip(files.names, fitting(files, copying.sample_rate), strict=True) if fit]
    if linked and not _has_links(out):
        logger.info("%s: the file system has no symbolic links, all files are copied", out)
        linked = []
    hours = {name: header.num_frames / header.sample_rate / 3600 for name, header in headers.items()}
    for name in linked:
        del hours[name]
    of = {"version": 2, "data": str(root), "channel": copying.channel, "sample_rate": copying.sample_rate}
    moved = 'for the same audio in a new place, write the place as "data" in the first line of that file'
    refuse = f"name another folder with --convert, or remove this one; {moved}"
    known = Journal(out / COPIES, of, "copies", refuse)
    before = _copies_in(known.pieces)
    made = sum(copy["bytes"] for copy in before.values()) / 1e9
    _require_room(out, sum(hours.values()) * GIGABYTES_PER_HOUR - made)
    for name in foreign:
        with contextlib.suppress(OSError):  # ffmpeg will say so
            hours[name] = 0.0
            hours[name] = (root / name).stat().st_size / FOREIGN_BYTES_PER_HOUR
    # The longest first, so that no core is alone with one at the end.
    names = sorted(hours, key=lambda name: (-hours[name], name))
    targets = copy_names(names, linked)
    _require_names(out, [*linked, *targets.values()], {copy["copy"] for copy in before.values()})

    with keeping(f"the finished copies are in {out}"):
        old = {name: copy["copy"] for name, copy in before.items() if targets.get(name) != copy["copy"]}
        _retire(out, old, known)
        # Their names before they are made: what a kill leaves is known to be a copy, and made again.
        new = targets.keys() - _copies_in(known.pieces).keys()
        known.update({name: [0, 0, {"copy": targets[name], "frames": 0, "bytes": 0}] for name in sorted(new)})
        _link(root, linked, out, copying.num_threads)
        copies: list[dict[str, Any]] = []
        failed = {}
        for name, found in _copies(root, names, headers, hours, targets, copying, known):
            if isinstance(found, AudioError):
                problems.append(unreadable(root / name, found))
                failed[name] = targets[name]
            else:
                copies.append(found)
        _retire(out, failed, known)
    problems.sort(key=lambda problem: problem.file)
    gigabytes = sum(copy["bytes"] for copy in copies) / 1e9
    total = sum(copy["frames"] for copy in copies) / copying.sample_rate / 3600
    logger.info("%s: %d copies of %.2f h in %.2f GB, %d links", out, len(copies), total, gigabytes, len(linked))
    if clipped := sorted(copy["copy"] for copy in copies if copy["clipped"]):
        text = "clipped where the original is louder than full scale: %d copies, first %s"
        logger.warning(text, len(clipped), out / clipped[0])
    frames = {name: headers[name].num_frames for name in linked} | {copy["copy"]: copy["frames"] for copy in copies}
    paths = sorted(frames)
    return Manifest(out.resolve(), paths, np.array([frames[path] for path in paths], dtype=np.int64))


def copy_names(names: Sequence[str], linked: Sequence[str]) -> dict[str, str]:
    """What the copy of each file is called: a.flac for a.mp3, but a.mp3.flac where something else would be a.flac too.

    Names that some file systems take for one count as one.
    """
    first = {name: str(PurePosixPath(name).with_suffix(".flac")) for name in names}
    folders = {os.path.dirname(name) for name in (*names, *linked)}  # noqa: PTH120 (there may be a million names)
    folders |= {str(parent) for folder in folders for parent in PurePosixPath(folder).parents}
    fixed = [_folded(name) for name in (*linked, *folders)]
    wanted = Counter([*map(_folded, first.values()), *fixed])
    taken = {*fixed, *(target for target in map(_folded, first.values()) if wanted[target] == 1)}
    targets = {}
    for name in sorted(names):
        target = first[name]
        if wanted[_folded(target)] > 1:
            target = f"{name}.flac"
            while _folded(target) in taken:
                target += ".flac"
            taken.add(_folded(target))
        targets[name] = target
    return targets


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def require_apart(out: Path, names: Iterable[str], tops: Sequence[Path]) -> None:
    """Refuse to make copies among originals, whatever links join the two.

    Args:
        out: folder of the copies.
        names: of the originals, and so of the folders in ``out`` that are written to.
        tops: folders that hold originals, resolved.

    Raises:
        UserError: a folder that would be written to is in one that holds originals, or the other way round.
    """
    folders = {os.path.dirname(name) for name in names}  # noqa: PTH120 (there may be a million names)
    written = {Path(os.path.realpath(out / folder)) for folder in ("", *folders)}
    above_written = {above for folder in written for above in (folder, *folder.parents)}
    for top in tops:
        if top in above_written or not written.isdisjoint((top, *top.parents)):
            text = "copies and originals are to be apart, name a folder beside the lists"
            raise UserError(f"--convert {out} and {top}, where the audio is, are inside one another: {text}")


def _require_names(out: Path, names: list[str], known: set[str]) -> None:
    """Refuse to overwrite what is neither a known copy nor a link that was made here; remove what a kill left."""
    present = set()
    for folder, folders, files in os.walk(out):
        prefix = "" if folder == str(out) else f"{os.path.relpath(folder, out)}/"
        for name in files:
            if known and name.startswith(".") and name.endswith(".tmp"):  # a folder of copies, not any
                Path(folder, name).unlink(missing_ok=True)
        present |= {prefix + name for name in (*folders, *files)}
    for name in names:
        path = out / name
        if name in present and name not in known and not (path.is_symlink() and _is_link_to(path, name)):
            raise UserError(
                f"{path} was not made by --convert and would be overwritten: move it away, or name another folder"
            )
        if len(os.fsencode(path.name)) > MAX_NAME:
            raise UserError(f"{path}: a copy's name is longer than {MAX_NAME} bytes: rename the original")


def _is_link_to(path: Path, name: str) -> bool:
    return os.readlink(path).endswith(f"/{name}")  # noqa: PTH115 (a Path of each of a million would take longer)


def _retire(out: Path, copies: dict[str, str], known: Journal) -> None:
    """Remove copies, which are given by the names of their originals."""
    num_removed = 0
    for copy in copies.values():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            (out / copy).unlink()
            num_removed += 1
    known.update(dict.fromkeys(copies))
    if num_removed:
        text = "%s: %d copies removed: their originals are gone, broken or fit by now, or they have other names"
        logger.info(text, out, num_removed)


def require_channel(files: Files, channel: str) -> None:
    """Refuse files that lack the channel that copies are to hold.

    Raises:
        UserError: naming the first.
    """
    if channel == "mix":
        return
    without = [i for i, header in enumerate(files.headers) if header.num_channels <= int(channel)]
    if without:
        path, num_channels = files.root / files.names[without[0]], files.headers[without[0]].num_channels
        raise UserError(f"--channel {channel}: {path} has {num_channels} channel(s), counted from 0")


def _require_room(out: Path, gigabytes: float) -> None:
    free = shutil.disk_usage(out).free / 1e9
    if free < LEAST_ROOM * gigabytes:
        raise UserError(
            f"{out}: the copies take about {gigabytes:.2f} GB, and the disk has {free:.2f} GB left: make room, or "
            "name a folder on another disk with --convert"
        )


def _link(root: Path, names: Sequence[str], out: Path, num_threads: int | None) -> None:
    """Symbolic links to originals."""
    for folder in sorted({os.path.dirname(name) for name in names}):  # noqa: PTH120 (there may be a million names)
        (out / folder).mkdir(parents=True, exist_ok=True)

    def link(name: str) -> None:
        original, target = f"{root}/{name}", out / name
        if target.is_symlink() and os.readlink(target) == original:  # noqa: PTH115
            return
        temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            temporary.symlink_to(original)
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)

    for _ in in_threads(link, names, "linking", num_threads, chunk=64):
        pass


def _has_links(folder: Path) -> bool:
    link = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        link.symlink_to("anything")
    except OSError:
        return False
    link.unlink()
    return True


def _copies(
    root: Path,
    names: Sequence[str],
    headers: dict[str, Header],
    hours: dict[str, float],
    targets: dict[str, str],
    copying: Copying,
    known: Journal,
) -> Iterator[tuple[str, Any]]:
    """Name of an original and what became of it, as they are finished: the copy, or an `AudioError`."""
    ended = threading.Event()
    shown = dict.fromkeys(names, 0.0)
    read: deque[tuple[str, float]] = deque()  # hours of an original, by the threads; the bar is for this one alone
    with (
        tqdm(total=max(sum(hours.values()), 1e-6), desc="converting", delay=1, bar_format=BAR) as bar,
        logging_redirect_tqdm(),
    ):

        def show() -> None:
            """A signal that stops this thread while it holds the bar's lock must find no other that waits for it."""
            more = 0.0
            for name, hours_read in [read.popleft() for _ in range(len(read))]:
                shown[name] += hours_read
                more += hours_read
            bar.total = max(bar.total, bar.n + more)  # it is a guess for what ffmpeg reads
            bar.update(more)

        def watched(name: str, blocks: Iterator[np.ndarray], rate: int) -> Iterator[np.ndarray]:
            for block in blocks:
                if ended.is_set():
                    raise CancelledError
                yield _one_channel(root / name, block, copying.channel)
                read.append((name, len(block) / rate / 3600))

        def copy(index: int) -> dict[str, Any]:
            name = names[index]
            source = ffmpeg_decode(root / name) if name not in headers else _decode(root / name, headers[name])
            with source as (rate, blocks), replacing(copying.out / targets[name]) as temporary:
                mono = resampled(watched(name, blocks, rate), rate, copying.sample_rate)
                num_frames, clipped = _write_flac(temporary, mono, copying.sample_rate)
                if not num_frames:
                    raise AudioError(root / name, "holds no audio")
                size = temporary.stat().st_size
            return {"copy": targets[name], "frames": num_frames, "bytes": size, "clipped": clipped}

        def holds(index: int, found: Any) -> bool:
            try:
                size = (copying.out / found["copy"]).stat().st_size
            except OSError:
                return False
            return found["copy"] == targets[names[index]] and found["bytes"] == size

        paths = [f"{root}/{name}" for name in names]
        num_threads = copying.num_threads or len(os.sched_getaffinity(0))
        for index, found in remembered(
            copy, paths, names, known, None, num_threads, chunk=1, holds=holds, ended=ended, meanwhile=show
        ):
            read.append((names[index], max(0.0, hours[names[index]] - shown[names[index]])))
            show()
            yield names[index], found


def _one_channel(path: Path, block: np.ndarray, channel: str) -> np.ndarray:
    """``[n]`` of ``[n, C]``.

    Raises:
        AudioError: samples that are not finite, or no such channel.
    """
    num_channels = block.shape[1]
    if channel == "mix":
        mono = functools.reduce(np.add, block.T) / num_channels  # twenty times as fast as block.mean(1)
    elif int(channel) < num_channels:
        mono = block[:, int(channel)]
    else:
        raise AudioError(path, f"{num_channels} channel(s), no --channel {channel}, counted from 0")
    if not np.isfinite(mono).all():
        raise AudioError(path, "NaN or infinite samples")
    return np.ascontiguousarray(mono)


class _Sink:
    """A file as libsndfile writes it; it keeps the reason why the system could not, which libsndfile does not."""

    def __init__(self, file: BinaryIO) -> None:
        self.tell, self.seek = file.tell, file.seek
        self.file = file
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        rest = memoryview(data)
        try:
            while rest:  # the last piece that has room may be a part of it
                rest = rest[self.file.write(rest) :]
        except OSError as error:
            self.error = error
            return 0
        return len(data)


def _write_flac(path: Path, blocks: Iterator[np.ndarray], sample_rate: int) -> tuple[int, bool]:
    """Write one channel ``[n]``, full scale is 1, with 16 bits; samples written, and whether some were above.

    Raises:
        OSError: the disk is full, ...
    """
    num_frames, clipped = 0, False
    with path.open("wb", buffering=0) as raw:
        sink = _Sink(raw)  # type: ignore[arg-type]
        try:
            with soundfile.SoundFile(sink, "w", sample_rate, 1, "PCM_16", format="FLAC") as file:
                for block in blocks:
                    # 16-bit audio stays as it is, which libsndfile's scale by 32767 would not leave it
                    samples = np.rint(block * 32768)
                    clipped = clipped or bool((np.abs(samples) > 32768).any())
                    file.write(np.clip(samples, -32768, 32767).astype(np.int16))
                    num_frames += len(block)
        except (soundfile.SoundFileError, AssertionError):  # soundfile asserts that all samples were written
            if sink.error is None:
                raise
        if sink.error is not None:
            raise sink.error
    return num_frames, clipped


@contextlib.contextmanager
def _decode(path: Path, header: Header) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
    yield header.sample_rate, decode(path)
