"""Audio files: lengths from headers, samples in order or from any place, and what is wrong with a file.

`AudioReader` is the only reader: every command sees the same samples of a file. Every failure is an `AudioError`.
"""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from distillation.data.containers import ContainerError, cut_off, inspect
from distillation.data.manifest import MAX_FRAMES

AUDIO_SUFFIXES = frozenset((
    ".flac", ".wav", ".wave", ".rf64", ".w64", ".ogg", ".oga", ".opus", ".mp3", ".mpga", ".aiff", ".aif", ".aifc",
    ".au", ".snd", ".sph", ".nist", ".caf", ".voc",
))  # fmt: skip

SILENCE_PEAK = 1e-4  # -80 dB of full scale: below the least bit but three of 16-bit audio
CLIPPED_LEVEL = 0.999  # of full scale
CLIPPED_SHARE = 1e-3  # loud but sound recordings touch full scale in far fewer samples
CHECK_BLOCK = 1 << 20  # samples decoded at once, so that hours of audio in one file fit in memory
# bytes of a sample, where all have the same
SAMPLE_BYTES = {
    "PCM_S8": 1, "PCM_U8": 1, "PCM_16": 2, "PCM_24": 3, "PCM_32": 4, "FLOAT": 4, "DOUBLE": 8, "ULAW": 1, "ALAW": 1,
}  # fmt: skip
UNKNOWN = 2**62  # libsndfile says 2**63 - 1 of a FLAC without length


class AudioError(ValueError):
    """One audio file cannot be used; the message is one line that names it and says why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.reason = reason


class Header(NamedTuple):
    """What an audio file says about itself."""

    num_frames: int
    sample_rate: int
    num_channels: int


class Finding(NamedTuple):
    """A problem found by decoding a whole file. ``usable``: it could still be trained on."""

    kind: str
    detail: str
    usable: bool


class AudioReader:
    """An open file; close it, or use it in a ``with``.

    Raises:
        AudioError: the file is missing, cannot be opened, is no audio, or is shorter than its header promises. What is
            called later raises it too, where the file cannot be decoded.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.position = 0
        """Number of the sample that is read next."""
        with self._naming():
            _require_regular_file(path)
            self._raw = path.open("rb", buffering=0)
        try:
            with self._naming():
                self._container = inspect(self._raw.fileno())
                self._file = self._open()
            self._require_whole()
        except AudioError:
            self._raw.close()
            raise
        self.sample_rate: int = self._file.samplerate
        """In Hz."""
        self.num_channels: int = self._file.channels
        has_length = self._container.has_length and self._file.frames < UNKNOWN
        self.num_frames: int | None = self._file.frames if has_length else None
        """Samples that the header promises; None where it does not, and only decoding tells."""
        self.seekable: bool = has_length and self._file.can_seek and self._container.seekable > 0
        """Whether samples can be read from any place; else all before them is decoded."""

    def __enter__(self) -> "AudioReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        self._raw.close()

    def read(self, num_frames: int) -> np.ndarray:
        """The next samples: float32 ``[num_frames, C]``, full scale is 1; fewer where the file ends."""
        with self._naming():
            block = self._file.read(num_frames, dtype="float32", always_2d=True)
        self.position += len(block)
        return block

    def seek(self, position: int) -> None:
        """Go to a sample; what is read there is what decoding from the start gives.

        Where libsndfile cannot seek, or not to the right place, all before the sample is decoded: in MP3, GSM, G.72x
        and files without length. (Opus differs in the last bit after a seek, by 3e-8.)
        """
        near = min(position, self._container.seekable) if self.seekable else 0
        with self._naming():
            if near and not near <= self.position <= position:
                self.position = self._file.seek(near)
            elif position < self.position:
                self._file.close()
                self._file, self.position = self._open(), 0
        while self.position < position and len(self.read(min(CHECK_BLOCK, position - self.position))):
            pass

    def blocks(self) -> Iterator[np.ndarray]:
        """Decode to the end: ``[n, C]`` with n <= CHECK_BLOCK.

        Raises:
            AudioError: it ends before the length that the header promises.
        """
        while len(block := self.read(CHECK_BLOCK)):
            yield block
        if self.num_frames is not None and self.position != self.num_frames:
            raise AudioError(self.path, cut_off(self.num_frames, self.position, "samples"))

    def _open(self) -> "_Forward":
        source = self._container.source
        os.lseek(self._raw.fileno(), 0, os.SEEK_SET)
        return _Forward(source, closefd=False) if isinstance(source, int) else _Forward(source.rewound())

    def _require_whole(self) -> None:
        # libsndfile reduces the length to what the file holds
        size = SAMPLE_BYTES.get(self._file.subtype, 0) * self._file.channels
        unit, size = ("samples", size) if size else ("bytes", 1)
        promised, held = self._container.promised // size, self._container.held // size
        if promised > held:
            self._file.close()
            raise AudioError(self.path, cut_off(promised, held, unit))

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """What goes wrong is an error of this file, and says how far it was."""
        try:
            yield
        except OSError as error:
            raise AudioError(self.path, error.strerror or type(error).__name__) from None
        except (ContainerError, soundfile.SoundFileError) as error:
            after = f"after {self.position} samples: " if self.position else ""
            raise AudioError(self.path, after + _reason(error)) from None


class _Forward(soundfile.SoundFile):
    """`SoundFile` seeks after each block to where it is, which fails at the end of a FLAC without length."""

    @property
    def can_seek(self) -> bool:
        return super().seekable()

    def seekable(self) -> bool:
        return False


def read_header(path: Path) -> Header:
    """Length in samples, sample rate in Hz and channels, without decoding where the header gives the length.

    For FLAC only the 42 bytes that end the STREAMINFO block are read (RFC 9639, section 8.2), which is about ten times
    faster than opening the file with libsndfile.

    Raises:
        AudioError: the file is missing, no audio, empty or shorter than its header promises.
    """
    return probe(path)[0]


def probe(path: Path) -> tuple[Header, bool]:
    """What `read_header` gives, and whether samples can be read from any place without decoding all before them."""
    seekable = True
    try:
        _require_regular_file(path)
        with path.open("rb", buffering=0) as file:
            head = file.read(42)
    except OSError as error:
        raise AudioError(path, error.strerror or type(error).__name__) from None
    header = _flac_header(head)
    if header is None:
        with AudioReader(path) as reader:
            num_frames = sum(map(len, reader.blocks())) if reader.num_frames is None else reader.num_frames
            header, seekable = Header(num_frames, reader.sample_rate, reader.num_channels), reader.seekable
    if not header.sample_rate:
        raise AudioError(path, "its header says 0 Hz")
    if not header.num_frames:
        raise AudioError(path, "holds no audio")
    if header.num_frames > MAX_FRAMES:
        raise AudioError(path, f"{header.num_frames} samples, more than {MAX_FRAMES}: cut it into several files")
    return header, seekable


def read_crop(path: Path, start: int, num_frames: int, sample_rate: int) -> np.ndarray:
    """Decode only these samples where the format allows it: float32 ``[num_frames]``, full scale is 1.

    Raises:
        AudioError: the file is missing or corrupt, has another sample rate, several channels, fewer samples than asked
            for, or NaN or infinite samples.
    """
    with AudioReader(path) as reader:
        if reader.sample_rate != sample_rate:
            raise AudioError(path, f"sample rate {reader.sample_rate} Hz, wanted {sample_rate} Hz")
        if reader.num_channels != 1:
            raise AudioError(path, f"{reader.num_channels} channels, wanted 1")
        if reader.num_frames is not None and reader.num_frames < start + num_frames:
            raise AudioError(path, f"{reader.num_frames} samples, but the list of utterances says more")
        reader.seek(start)
        waveform = reader.read(num_frames)[:, 0]
    if len(waveform) != num_frames:
        promise = "the list of utterances says" if reader.num_frames is None else "the header promises"
        raise AudioError(path, f"decoding stops at sample {reader.position}, {promise} more")
    if not np.isfinite(waveform).all():
        raise AudioError(path, "NaN or infinite samples")
    return waveform


def decode(path: Path) -> Iterator[np.ndarray]:
    """Decode a whole file, block by block: float32 ``[n, C]`` with n <= CHECK_BLOCK, full scale is 1.

    Raises:
        AudioError: the file is missing or no audio, cannot be decoded, or ends before the length that its header
            promises. Samples that are not finite are the caller's matter.
    """
    with AudioReader(path) as reader:
        yield from reader.blocks()


def level_of(waveform: np.ndarray) -> str | None:
    """``silent`` or ``clipped`` where a stretch of audio ``[N]`` is suspicious, though it can be used."""
    level = np.abs(waveform)
    peak = float(level.max())
    return _judge(peak, int(np.count_nonzero(level >= CLIPPED_LEVEL)) if peak >= CLIPPED_LEVEL else 0, len(level))


def _judge(peak: float, num_clipped: int, count: int) -> str | None:
    if peak < SILENCE_PEAK:
        return "silent"
    return "clipped" if num_clipped > CLIPPED_SHARE * count else None


def check_audio(path: Path, num_frames: int) -> Finding | None:
    """Decode a whole file whose header promises ``num_frames`` and name the worst thing found, if any.

    Raises:
        AudioError: it cannot be decoded.
    """
    count, clipped, peak = 0, 0, 0.0
    for block in decode(path):
        # One pass over the samples finds NaN too: a maximum with NaN in it is NaN.
        level = np.abs(block)
        highest = float(level.max())
        if not np.isfinite(highest):
            return Finding("NaN or infinite", f"between samples {count} and {count + len(block)}", False)
        peak = max(peak, highest)
        if highest >= CLIPPED_LEVEL:
            clipped += int(np.count_nonzero(level >= CLIPPED_LEVEL))
        count += len(block)
    if count != num_frames:
        return Finding("length", f"the header says {num_frames} samples, decoding gives {count}", False)
    kind = _judge(peak, clipped, count)
    if kind is None:
        return None
    silent, loud = f"peak {peak:.1e} of full scale", f"{clipped / count:.1%} of the samples at full scale"
    return Finding(kind, silent if kind == "silent" else loud, True)


def _flac_header(head: bytes) -> Header | None:
    """Read STREAMINFO; None when this is no plain FLAC file or its length is not stored."""
    if len(head) < 42 or head[:4] != b"fLaC" or head[4] & 0x7F != 0:
        return None
    packed = int.from_bytes(head[18:26], "big")  # 20 bits rate, 3 bits channels - 1, 5 bits depth - 1, 36 bits length
    num_frames = packed & (1 << 36) - 1
    return Header(num_frames, packed >> 44, (packed >> 41 & 7) + 1) if num_frames else None


def _require_regular_file(path: Path) -> None:
    # Opening a pipe would wait forever.
    if not stat.S_ISREG(path.stat().st_mode):
        raise AudioError(path, "not a regular file")


def _reason(error: Exception) -> str:
    if getattr(error, "code", None) == 0:  # libsndfile keeps the reason in one place for all threads
        return "cannot be opened as audio"
    return getattr(error, "error_string", str(error)).removeprefix("Error : ").strip().rstrip(".")
