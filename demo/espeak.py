"""espeak-ng as a library: text to samples with the exact start of every phone and word.

The library comes from the pip package ``espeakng-loader`` or from an installed espeak-ng. The interface is that of
espeak-ng's ``speak_lib.h``. espeak-ng is GPL: only the synthetic corpus uses it, never the models.
"""

import ctypes
import ctypes.util
import functools
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from distillation.errors import UserError

AUDIO_OUTPUT_SYNCHRONOUS = 2
PHONEME_EVENTS, DONT_EXIT = 0x0001, 0x8000
CHARS_UTF8 = 1
EVENT_LIST_TERMINATED, EVENT_WORD, EVENT_PHONEME = 0, 1, 7
RATE, PITCH, RANGE = 1, 3, 4  # espeak_PARAMETER


class _EventId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EventId),
    )


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


@dataclass
class Speech:
    """Synthesised speech: ``samples`` [N] in [-1, 1]; ``phones`` and ``words`` as (start in samples, label) pairs."""

    samples: np.ndarray
    phones: list[tuple[int, str]]
    words: list[tuple[int, str]]


class Espeak:
    """One espeak-ng library. It keeps global state: use ``load_espeak``, which opens it once per process."""

    def __init__(self, library: str, data: str | None):
        self._lib = ctypes.CDLL(library)
        self._lib.espeak_Initialize.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_int)
        self._lib.espeak_Info.argtypes = (ctypes.POINTER(ctypes.c_char_p),)
        self._lib.espeak_Info.restype = ctypes.c_char_p
        path = data.encode() if data else None
        self.sample_rate: int = self._lib.espeak_Initialize(
            AUDIO_OUTPUT_SYNCHRONOUS, 0, path, PHONEME_EVENTS | DONT_EXIT
        )
        if self.sample_rate <= 0:
            raise OSError(f"espeak-ng found no voice data ({data or 'default place'})")
        where = ctypes.c_char_p()
        self.version: str = self._lib.espeak_Info(ctypes.byref(where)).decode()
        self._variants = Path((where.value or b"").decode()) / "voices" / "!v"
        self._chunks: list[np.ndarray] = []
        self._phones: list[tuple[int, str]] = []
        self._spans: list[tuple[int, slice]] = []
        self._callback = _Callback(self._collect)  # the library holds a bare pointer: it must outlive this call
        self._lib.espeak_SetSynthCallback(self._callback)

    def _collect(self, samples, num_samples: int, events) -> int:
        if samples and num_samples > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (num_samples,)).copy())
        i = 0
        while events[i].type != EVENT_LIST_TERMINATED:
            event = events[i]
            if event.type == EVENT_PHONEME:
                self._phones.append((event.sample, bytes(event.id.string).decode("utf-8", "ignore")))
            elif event.type == EVENT_WORD:
                first = event.text_position - 1
                self._spans.append((event.sample, slice(first, first + event.length)))
            i += 1
        return 0

    def set_voice(self, name: str, rate: int, pitch: int, pitch_range: int) -> None:
        """Choose a voice (``en-us+f1``), its rate in words per minute and its pitch and pitch range (0 to 99)."""
        # The library takes an unknown variant for the plain voice without a word, hence the second check.
        known = self._lib.espeak_SetVoiceByName(name.encode()) == 0
        if not known or not (self._variants / name.partition("+")[2]).exists():
            raise UserError(
                f"espeak-ng {self.version} has no voice {name!r} in {self._variants}: install all its voices"
            )
        for parameter, value in ((RATE, rate), (PITCH, pitch), (RANGE, pitch_range)):
            self._lib.espeak_SetParameter(parameter, value, 0)

    def say(self, text: str) -> Speech:
        """Synthesise ``text`` (ASCII) with the current voice, at ``sample_rate``."""
        for collected in (self._chunks, self._phones, self._spans):
            collected.clear()
        raw = text.encode("ascii") + b"\0"
        self._lib.espeak_Synth(raw, len(raw), 0, 0, 0, CHARS_UTF8, None, None)
        self._lib.espeak_Synchronize()
        words = [(sample, text[span].strip()) for sample, span in self._spans]
        return Speech(np.concatenate(self._chunks).astype(np.float32) / 32768, list(self._phones), words)


def _candidates() -> list[tuple[str, str | None]]:
    """Libraries to try, best first, each with its data folder (None: the one compiled in)."""
    found: list[tuple[str, str | None]] = []
    try:
        import espeakng_loader

        found.append((espeakng_loader.get_library_path(), espeakng_loader.get_data_path()))
    except (ImportError, OSError):
        pass
    if name := ctypes.util.find_library("espeak-ng"):
        found.append((name, None))
    if program := shutil.which("espeak-ng"):  # Homebrew, conda and local builds keep the library beside the program
        root = Path(program).resolve().parent.parent
        found += [(str(path), None) for path in sorted(root.glob("lib*/libespeak-ng.*")) if ".a" not in path.suffixes]
    return found


@functools.cache
def load_espeak() -> Espeak:
    """Open espeak-ng from pip or the system.

    Raises:
        UserError: neither is there, or none of those found works.
    """
    failures = []
    for library, data in _candidates():
        try:
            return Espeak(library, data)
        except OSError as error:
            failures.append(f"{library}: {error}")
    found = f" (tried {'; '.join(failures)})" if failures else ""
    raise UserError(
        f"espeak-ng is needed to make speech and was not found{found}:"
        " pip install espeakng-loader, or install espeak-ng (apt install espeak-ng, brew install espeak-ng)"
    )
