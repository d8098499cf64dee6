"""Mono FLAC copies of audio of any kind, at one rate."""

import contextlib
import functools
import logging
import os
import shutil
import struct
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import numpy as np
import soundfile
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from distillation.data.audio import CHECK_BLOCK, AudioError, AudioReader, Finding, Header, decode
from distillation.data.corpus import Files, Problem, in_threads, remembered
from distillation.data.manifest import Manifest
from distillation.data.resampling import resampled
from distillation.errors import UserError
from distillation.journal import Journal
from distillation.stopping import keeping
from wav2vec2.checkpoint import replacing

logger = logging.getLogger(__name__)

# Formats that hold what was recorded and are read from any place at once.
LOSSLESS_SUFFIXES = frozenset((".flac", ".wav", ".aiff", ".aif", ".au", ".sph", ".w64", ".caf"))
# 16-bit FLAC at 16 kHz: 0.066 for LibriSpeech as it is, 0.063 for the same speech out of MP3
GIGABYTES_PER_HOUR = 0.065
# Where the speaker pauses it is less: only with less room than this share of the estimate it is sure not to fit.
LEAST_ROOM = 2 / 3
# A guess for the progress bar: the length of a file that only ffmpeg reads is not known before. 128 kbit/s
FOREIGN_BYTES_PER_HOUR = 57.6e6
# A file whose container does not give its length is decoded from its start for each crop: long ones are copied.
LONG_SECONDS = 60
COPIES = ".copies.jsonl"  # in the folder of the copies: which are finished, and of which originals
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n:.2f}/{total:.2f} h [{elapsed}<{remaining}]"
# Of the AU format: magic, where the samples begin, their bytes, encoding, rate, channels; and the encoding float32.
AU_HEADER, AU_FLOAT = struct.Struct(">4s5I"), 6


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


def fits(path: Path, header: Header, sample_rate: int) -> bool:
    """Whether a file needs no copy."""
    if path.suffix.lower() not in LOSSLESS_SUFFIXES or (header.sample_rate, header.num_channels) != (sample_rate, 1):
        return False
    if header.num_frames < LONG_SECONDS * sample_rate:
        return True
    try:
        with AudioReader(path) as reader:
            return reader.num_frames is not None
    except AudioError:  # what decodes it will say so
        return False


def convert(files: Files, foreign: Sequence[str], copying: Copying, problems: list[Problem]) -> Manifest:
    """Make copies of files in the same folders; those that fit already are linked. Originals are only read.

    A finished copy is made again only when its original has changed.

    Args:
        files: below one root.
        foreign: names below the same root of files that ffmpeg reads.
        copying: what the copies are to be.
        problems: originals that cannot be converted are added.

    Returns:
        The copies and links.

    Raises:
        Stopped: a signal asked for it.
        UserError: a file lacks the channel, the folder holds other copies, or its disk has too little room.
    """
    root, out = files.root, copying.out
    _require_channel(files, copying.channel)
    headers = dict(zip(files.names, files.headers, strict=True))
    linked = [name for name, header in headers.items() if fits(root / name, header, copying.sample_rate)]
    hours = {name: header.num_frames / header.sample_rate / 3600 for name, header in headers.items()}
    for name in linked:
        del hours[name]
    of = {"data": str(root), "channel": copying.channel, "sample_rate": copying.sample_rate}
    known = Journal(out / COPIES, of, "copies", "name another folder with --convert, or remove this one")
    _require_room(out, sum(hours.values()) * GIGABYTES_PER_HOUR, known)
    for name in foreign:
        with contextlib.suppress(OSError):  # ffmpeg will say so
            hours[name] = 0.0
            hours[name] = (root / name).stat().st_size / FOREIGN_BYTES_PER_HOUR
    # The longest first, so that no core is alone with one at the end.
    names = sorted(hours, key=lambda name: (-hours[name], name))
    targets = copy_names(names, linked)

    with keeping(f"the finished copies are in {out}"):
        _link(root, linked, out, copying.num_threads)
        copies: list[dict[str, Any]] = []
        for name, found in _copies(root, names, headers, hours, targets, copying, known):
            if isinstance(found, dict):
                copies.append(found)
            else:
                problems.append(Problem(root / name, Finding(*found)))
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
    """What the copy of each file is called: a.flac for a.mp3, but a.mp3.flac where another file would be a.flac too."""
    first = {name: str(PurePosixPath(name).with_suffix(".flac")) for name in names}
    wanted = Counter([*first.values(), *linked])
    taken = {*linked, *(target for target in first.values() if wanted[target] == 1)}
    targets = {}
    for name in sorted(names):
        target = first[name]
        if wanted[target] > 1:
            target = f"{name}.flac"
            while target in taken:
                target += ".flac"
            taken.add(target)
        targets[name] = target
    return targets


def _require_channel(files: Files, channel: str) -> None:
    if channel == "mix":
        return
    without = [i for i, header in enumerate(files.headers) if header.num_channels <= int(channel)]
    if without:
        raise _no_channel(files.root / files.names[without[0]], files.headers[without[0]].num_channels, channel)


def _no_channel(path: Path, num_channels: int, channel: str) -> UserError:
    return UserError(f"--channel {channel}: {path} has {num_channels} channel(s), counted from 0")


def _require_room(out: Path, gigabytes: float, known: Journal) -> None:
    gigabytes -= sum(found["bytes"] for *_, found in known.pieces.values() if isinstance(found, dict)) / 1e9
    free = shutil.disk_usage(out).free / 1e9
    if free < LEAST_ROOM * gigabytes:
        raise UserError(
            f"{out}: the copies take about {gigabytes:.2f} GB, and the disk has {free:.2f} GB left: make room, or "
            "name a folder on another disk with --convert"
        )


def _link(root: Path, names: Sequence[str], out: Path, num_threads: int | None) -> None:
    """Symbolic links to originals; copies where the file system has no links."""
    for folder in sorted({os.path.dirname(name) for name in names}):  # noqa: PTH120 (there may be a million names)
        (out / folder).mkdir(parents=True, exist_ok=True)

    def link(name: str) -> None:
        original, target = f"{root}/{name}", out / name
        if target.is_symlink() and os.readlink(target) == original:  # noqa: PTH115
            return
        # Not the name that `replacing` writes to: nothing is ever written through a link to an original.
        temporary = target.with_name(f".{target.name}.{os.getpid()}.link")
        try:
            temporary.unlink(missing_ok=True)
            temporary.symlink_to(original)
        except OSError:
            with replacing(target) as temporary:
                shutil.copyfile(original, temporary)
        else:
            temporary.replace(target)

    for _ in in_threads(link, names, "linking", num_threads, chunk=64):
        pass


def _copies(
    root: Path,
    names: Sequence[str],
    headers: dict[str, Header],
    hours: dict[str, float],
    targets: dict[str, str],
    copying: Copying,
    known: Journal,
) -> Iterator[tuple[str, Any]]:
    """Name of an original and what became of it, as they are finished: the copy, or a `Finding`."""
    ended, lock = threading.Event(), threading.Lock()
    shown = dict.fromkeys(names, 0.0)
    with (
        tqdm(total=max(sum(hours.values()), 1e-6), desc="converting", delay=1, bar_format=BAR) as bar,
        logging_redirect_tqdm(),
    ):

        def show(name: str, more: float) -> None:
            with lock:
                shown[name] += more
                bar.total = max(bar.total, bar.n + more)  # it is a guess for what ffmpeg reads
                bar.update(more)

        def watched(name: str, blocks: Iterator[np.ndarray], rate: int) -> Iterator[np.ndarray]:
            for block in blocks:
                if ended.is_set():
                    raise CancelledError
                yield _one_channel(root / name, block, copying.channel)
                show(name, len(block) / rate / 3600)

        def copy(index: int) -> dict[str, Any] | Finding:
            name = names[index]
            source = ffmpeg_decode(root / name) if name not in headers else _decode(root / name, headers[name])
            try:
                with source as (rate, blocks), replacing(copying.out / targets[name]) as temporary:
                    mono = resampled(watched(name, blocks, rate), rate, copying.sample_rate)
                    num_frames, clipped = _write_flac(temporary, mono, copying.sample_rate)
                    if not num_frames:
                        raise AudioError(root / name, "holds no audio")
                    size = temporary.stat().st_size
            except AudioError as error:
                return Finding("unreadable", error.reason, False)
            return {"copy": targets[name], "frames": num_frames, "bytes": size, "clipped": clipped}

        def holds(index: int, found: Any) -> bool:
            if not isinstance(found, dict):
                return True
            try:
                size = (copying.out / found["copy"]).stat().st_size
            except OSError:
                return False
            return found["copy"] == targets[names[index]] and found["bytes"] == size

        paths = [f"{root}/{name}" for name in names]
        num_threads = copying.num_threads or len(os.sched_getaffinity(0))
        for index, found in remembered(copy, paths, paths, known, None, num_threads, chunk=1, holds=holds, ended=ended):
            show(names[index], max(0.0, hours[names[index]] - shown[names[index]]))
            yield names[index], found


def _one_channel(path: Path, block: np.ndarray, channel: str) -> np.ndarray:
    """``[n]`` of ``[n, C]``.

    Raises:
        AudioError: samples that are not finite.
        UserError: there is no such channel.
    """
    num_channels = block.shape[1]
    if channel == "mix":
        mono = functools.reduce(np.add, block.T) / num_channels  # twenty times as fast as block.mean(1)
    elif int(channel) < num_channels:
        mono = block[:, int(channel)]
    else:
        raise _no_channel(path, num_channels, channel)
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


@contextlib.contextmanager
def ffmpeg_decode(path: Path) -> Iterator[tuple[int, Iterator[np.ndarray]]]:
    """The first sound track of a file, decoded by the program ffmpeg: rate, and float32 blocks ``[n, C]`` to its end.

    Raises:
        AudioError: ffmpeg cannot decode all of it. Raised by the blocks too.
        UserError: a signal ended ffmpeg.
    """
    words = ["ffmpeg", "-nostdin", "-v", "error", "-i", f"file:{path}", "-map", "0:a:0"]
    words += ["-c:a", "pcm_f32be", "-f", "au", "pipe:1"]
    with (
        tempfile.TemporaryFile() as complaints,
        # A session of its own: Ctrl-C is for this process, which then ends ffmpeg.
        subprocess.Popen(words, stdout=subprocess.PIPE, stderr=complaints, start_new_session=True) as process,
    ):
        pipe = process.stdout
        assert pipe is not None

        def finish() -> None:
            """Ffmpeg goes on after an error and ends with code 0: what it says tells."""
            code = process.wait()
            if code < 0 or code == 255:
                raise UserError(f"{path}: a signal ended ffmpeg (exit code {code}): run again")
            complaints.seek(0)
            said = complaints.read().decode("utf-8", "replace").strip()
            if code or said:
                first = said.split("\n")[0].rpartition("] ")[2]
                raise AudioError(path, f"ffmpeg: {first or f'exit code {code}'}")

        def blocks(num_channels: int) -> Iterator[np.ndarray]:
            size = 4 * num_channels
            while data := pipe.read(size * (CHECK_BLOCK // num_channels)):
                whole = len(data) // size * size
                yield np.frombuffer(data[:whole], ">f4").reshape(-1, num_channels).astype(np.float32)
            finish()

        try:
            head = pipe.read(AU_HEADER.size)
            if len(head) < AU_HEADER.size:
                finish()
                raise AudioError(path, "ffmpeg gives no audio")
            magic, begin, _, encoding, rate, num_channels = AU_HEADER.unpack(head)
            assert (magic, encoding) == (b".snd", AU_FLOAT), head
            pipe.read(begin - AU_HEADER.size)
            yield rate, blocks(num_channels)
        finally:
            process.kill()
