"""Audio files: lengths from headers, crops, and what is wrong with a file. Every failure is an `AudioError`."""

import stat
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from distillation.data.manifest import MAX_FRAMES

AUDIO_SUFFIXES = frozenset((".flac", ".wav", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".sph", ".w64", ".caf"))

SILENCE_PEAK = 1e-4  # -80 dB of full scale: below the least bit but three of 16-bit audio
CLIPPED_LEVEL = 0.999  # of full scale
CLIPPED_SHARE = 1e-3  # loud but sound recordings touch full scale in far fewer samples
CHECK_BLOCK = 1 << 20  # samples decoded at once, so that hours of audio in one file fit in memory


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


def read_header(path: Path) -> Header:
    """Length in samples, sample rate in Hz and channels, without decoding.

    For FLAC only the 42 bytes that end the STREAMINFO block are read (RFC 9639, section 8.2), which is about ten times
    faster than opening the file with libsndfile.

    Raises:
        AudioError: the file is missing, no audio or empty.
    """
    try:
        _require_regular_file(path)
        with path.open("rb", buffering=0) as file:
            head = file.read(42)
        header = _flac_header(head)
        if header is None:
            info = soundfile.info(str(path))
            header = Header(info.frames, info.samplerate, info.channels)
    except (OSError, soundfile.SoundFileError) as error:
        raise AudioError(path, _reason(error)) from None
    if not 0 < header.num_frames <= MAX_FRAMES:
        raise AudioError(path, "the header gives no length" if header.num_frames else "holds no audio")
    return header


def read_crop(path: Path, start: int, num_frames: int, sample_rate: int) -> np.ndarray:
    """Seek, and decode only these samples: float32 ``[num_frames]``, full scale is 1.

    Raises:
        AudioError: the file is missing or corrupt, has another sample rate, several channels, fewer samples than asked
            for, or NaN or infinite samples.
    """
    try:
        _require_regular_file(path)
        with soundfile.SoundFile(str(path)) as file:
            if file.samplerate != sample_rate:
                raise AudioError(path, f"sample rate {file.samplerate} Hz, wanted {sample_rate} Hz")
            if file.channels != 1:
                raise AudioError(path, f"{file.channels} channels, wanted 1")
            if file.frames < start + num_frames:
                raise AudioError(path, f"{file.frames} samples, but the list of utterances says more")
            file.seek(start)
            waveform = file.read(num_frames, dtype="float32")
    except (OSError, soundfile.SoundFileError) as error:
        raise AudioError(path, _reason(error)) from None
    if len(waveform) != num_frames:
        raise AudioError(path, f"decoding stops at sample {start + len(waveform)}, the header promises more")
    if not np.isfinite(waveform).all():
        raise AudioError(path, "NaN or infinite samples")
    return waveform


def level_of(waveform: np.ndarray) -> str | None:
    """``silent`` or ``clipped`` where a stretch of audio ``[N]`` is suspicious, though it can be used."""
    level = np.abs(waveform)
    peak = level.max()
    if peak < SILENCE_PEAK:
        return "silent"
    clipped = peak >= CLIPPED_LEVEL and np.count_nonzero(level >= CLIPPED_LEVEL) > CLIPPED_SHARE * len(level)
    return "clipped" if clipped else None


def check_audio(path: Path, num_frames: int) -> Finding | None:
    """Decode a whole file whose header promises ``num_frames`` and name the worst thing found, if any."""
    count, clipped, peak = 0, 0, 0.0
    try:
        _require_regular_file(path)
        with soundfile.SoundFile(str(path)) as file:
            while len(block := file.read(CHECK_BLOCK, dtype="float32", always_2d=True)):
                # One pass over the samples finds NaN too: a maximum with NaN in it is NaN.
                level = np.abs(block)
                highest = float(level.max())
                if not np.isfinite(highest):
                    return Finding("NaN or infinite", f"between samples {count} and {count + len(block)}", False)
                peak = max(peak, highest)
                if highest >= CLIPPED_LEVEL:
                    clipped += int(np.count_nonzero(level >= CLIPPED_LEVEL))
                count += len(block)
    except AudioError as error:
        return Finding("unreadable", error.reason, False)
    except (OSError, soundfile.SoundFileError) as error:
        return Finding("unreadable", f"after {count} samples: {_reason(error)}", False)
    if count != num_frames:
        return Finding("length", f"the header says {num_frames} samples, decoding gives {count}", False)
    if peak < SILENCE_PEAK:
        return Finding("silent", f"peak {peak:.1e} of full scale", True)
    if clipped > CLIPPED_SHARE * count:
        return Finding("clipped", f"{clipped / count:.1%} of the samples at full scale", True)
    return None


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
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if getattr(error, "code", None) == 0:  # libsndfile keeps the reason in one place for all threads
        return "cannot be opened as audio"
    return getattr(error, "error_string", str(error)).removeprefix("Error : ").strip().rstrip(".")
