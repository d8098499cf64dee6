"""A disturbed copy of each row of a batch: reverberation, then added noise, for a student whose teacher hears it clean.

What distillation with noise is: RobustDistiller, https://arxiv.org/abs/2403.08654. Everything drawn is a pure function
of the seed, the number of the micro-batch and the place in it, so any reading process gives the same.

Shapes: N samples of a row, L of an impulse response.
"""

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import soxr

from distillation.data.audio import SILENCE_PEAK, AudioError, AudioReader, Finding, Header
from distillation.data.corpus import Problem, find, read_headers, without_bad_names
from distillation.data.resampling import QUALITY
from distillation.errors import UserError, require
from wav2vec2.feature_extractor import SAMPLE_RATE

logger = logging.getLogger(__name__)

STREAM = 0x6E6F6973  # sets these draws apart from all others that a seed and a number give
# A recording that cannot be decoded, or is silent where it was cut, is drawn again so often.
TRIES = 5
LOWEST_HERTZ = 20.0  # of coloured noise: brown noise would else be all rumble that nobody hears
MOST_VOICES = 5  # of the same batch, in babble
MUSAN = ("music", "noise", "speech")
MUSAN_VOICES = (3, 7)  # recordings of MUSAN's speech at once, as in Kaldi's recipes
# Longer recordings are no impulse responses, but noise that lies beside them, as in RIRS_NOISES.
RESPONSE_SECONDS = 10.0
FFT_FACTORS = (1, 3, 5, 9, 15)  # times powers of two: lengths that are fast and close to each other


@dataclass
class NoiseConfig:
    """What the student hears besides the audio. By default as in the released RobustDistiller: noise in a half of the
    rows, reverberation in a half, so that a quarter stays as it is, for which the student must not get worse."""

    share: float = 0.5
    """Share of the rows that noise is added to."""
    snr: tuple[float, float] = (0.0, 20.0)
    """Least and greatest power of a row over that of its noise, in dB; drawn uniformly."""
    folders: list[Path] = field(default_factory=list)
    """Folders of noise recordings, searched with all below; every recording is equally likely. In MUSAN's layout 3 to 7
    recordings of speech/ sound at once. Without folders noise is made, from white to brown."""
    babble: float = 0.25
    """Share of the noisy rows in which 1 to 5 other rows of the batch sound instead of noise."""
    impulse_responses: list[Path] = field(default_factory=list)
    """Folders of room impulse responses, searched with all below; without them nothing is reverberated."""
    reverberation: float = 0.5
    """Share of the rows that are reverberated, noisy or not, where there are impulse responses."""

    def __post_init__(self) -> None:
        require(self, "data.noise.", "lie in (0, 1]", lambda value: 0 < value <= 1, "share")
        require(self, "data.noise.", "lie in [0, 1]", lambda value: 0 <= value <= 1, "babble", "reverberation")
        must = "be two numbers of dB in [-100, 100], the lower first"
        require(self, "data.noise.", must, lambda value: -100 <= value[0] <= value[1] <= 100, "snr")


class Noise:
    """Disturbs the rows of batches.

    Args:
        config: how.
        seed: of all draws.
        sample_rate: of the rows, in Hz.

    Raises:
        UserError: a folder is missing, cannot be read, or holds no audio that can be used.
    """

    def __init__(self, config: NoiseConfig, seed: int, sample_rate: int = SAMPLE_RATE) -> None:
        self.config, self.seed, self.sample_rate = config, seed, sample_rate
        self._noises = _Recordings("folders", config.folders, sample_rate)
        self._responses = _Recordings("impulse_responses", config.impulse_responses, sample_rate, RESPONSE_SECONDS)

    def describe(self) -> str:
        """Which recordings, wherever their folders are mounted."""
        noises = self._noises.describe() if len(self._noises) else "made"
        return f"{noises}; impulse responses: {self._responses.describe() if len(self._responses) else 'none'}"

    def __call__(self, rows: Sequence[np.ndarray], number: int) -> tuple[list[np.ndarray], dict[str, str]]:
        """Disturb a micro-batch.

        What a row hears depends on its place, and on the other rows only in babble. Silent rows stay as they are.

        Args:
            rows: float32 ``[N]`` each, of any lengths; they are not changed.
            number: of the micro-batch, over all epochs and ranks.

        Returns:
            The copies, float32 ``[N]`` each, neither clipped nor scaled, so that they may exceed full scale; and path
            and reason of each recording that could not be decoded, for which another was taken.
        """
        errors: dict[str, str] = {}
        return [self._disturbed(rows, place, number, errors) for place in range(len(rows))], errors

    def _disturbed(self, rows: Sequence[np.ndarray], place: int, number: int, errors: dict[str, str]) -> np.ndarray:
        random = np.random.default_rng((self.seed, number, STREAM, place))
        config = self.config
        noisy, babbling, reverberant = random.random(3) < (config.share, config.babble, config.reverberation)
        snr = random.uniform(*config.snr)
        row = rows[place].astype(np.float64)
        if _is_silent(row):
            return rows[place].copy()
        if reverberant and len(self._responses):
            row = self._reverberated(row, random, errors)
        if noisy:
            noise = _babble(rows, place, random) if babbling else None
            if noise is None:
                noise = self._recorded(len(row), random, errors)
            if noise is None:
                noise = _coloured(len(row), self.sample_rate, random)
            row += noise * math.sqrt(_power(row) / (_power(noise) * 10 ** (snr / 10)))
        return row.astype(np.float32)

    def _recorded(self, num_samples: int, random: np.random.Generator, errors: dict[str, str]) -> np.ndarray | None:
        """A stretch of noise ``[num_samples]``; None where there is no recording, or only silent or corrupt ones."""
        noises = self._noises
        for _ in range(TRIES if len(noises) else 0):
            chosen = [int(random.integers(len(noises)))]
            if chosen[0] in noises.speech:
                others = noises.speech[noises.speech != chosen[0]]
                more = int(random.integers(*MUSAN_VOICES, endpoint=True)) - 1
                chosen += random.choice(others, min(more, len(others)), replace=False).tolist()
            pieces = []
            for index in chosen:
                try:
                    pieces.append(_fitted(noises.draw(index, num_samples, random), num_samples, random))
                except AudioError as error:
                    errors[noises.paths[index]] = error.reason
            mixture = _mixture(pieces)
            if mixture is not None:
                return mixture
        return None

    def _reverberated(self, row: np.ndarray, random: np.random.Generator, errors: dict[str, str]) -> np.ndarray:
        """The row in a room, aligned with the dry one and as strong; dry where no impulse response can be used."""
        responses = self._responses
        for _ in range(TRIES):
            index = int(random.integers(len(responses)))
            try:
                response = responses.read(index)
            except AudioError as error:
                errors[responses.paths[index]] = error.reason
                continue
            if response.any():
                wet = reverberate(row, response)
                return wet * math.sqrt(_power(row) / _power(wet))
        return row


def at_level(snr: float, folders: Sequence[Path], seed: int) -> Noise:
    """Noise in every row at one ratio in dB, to measure in: of recordings, or made where there are no folders."""
    return Noise(NoiseConfig(share=1.0, snr=(snr, snr), folders=list(folders), babble=0.0), seed)


class _Recordings:
    """Audio files below some folders, of any rate and number of channels, read in pieces as one channel.

    Args:
        setting: that names the folders.
        folders: each has to hold some.
        sample_rate: that they are read at, in Hz.
        most_seconds: longer ones are left out.
    """

    def __init__(self, setting: str, folders: Sequence[Path], sample_rate: int, most_seconds: float = math.inf) -> None:
        self.sample_rate = sample_rate
        self.paths: list[str] = []
        self.headers: list[Header] = []
        speech: list[int] = []
        problems: list[Problem] = []
        digest = hashlib.sha256()
        for folder in folders:
            if not folder.is_dir():
                raise UserError(f"data.noise.{setting}: {folder} is not a folder")
            unusable: list[Problem] = []
            found = without_bad_names(find(folder, ["."]), unusable)
            foreign = Finding("format", "only ffmpeg reads it", False)
            unusable += [Problem(found.root / name, foreign) for name in found.foreign]
            files = read_headers(found.root, found.names, None, None, unusable)
            before, speech_folder = len(self.paths), _musan_speech(files.names)
            for name, header in zip(files.names, files.headers):
                seconds = header.num_frames / header.sample_rate
                if seconds > most_seconds:
                    reason = f"{seconds:.1f} s, more than {most_seconds:g} s"
                    unusable.append(Problem(found.root / name, Finding("length", reason, False)))
                    continue
                if speech_folder is not None and name.startswith(speech_folder):
                    speech.append(len(self.paths))
                self.paths.append(f"{found.root}/{name}")
                self.headers.append(header)
                digest.update(f"{name}\t{header.num_frames}\t{header.sample_rate}\n".encode())
            if len(self.paths) == before:
                none = f"none of {len(unusable)} files in {folder} can be used, the first {_first(unusable)}"
                raise UserError(f"data.noise.{setting}: {none}")
            problems += unusable
        self.speech = np.array(speech, dtype=np.int64)
        """Index of those that sound several at once."""
        self._digest = digest.hexdigest()
        if problems:
            of = setting, len(problems), _first(problems)
            logger.warning("data.noise.%s: %d files are left out, the first %s", *of)

    def __len__(self) -> int:
        return len(self.paths)

    def describe(self) -> str:
        """How many, how long, and a digest of names and lengths."""
        hours = sum(header.num_frames / header.sample_rate for header in self.headers) / 3600
        return f"{len(self)} recordings of {hours:.2f} h, {self._digest}"

    def draw(self, index: int, num_samples: int, random: np.random.Generator) -> np.ndarray:
        """A piece from a random place, float64: a sample more than ``num_samples`` at most, or all of a shorter one.

        Raises:
            AudioError: it cannot be decoded.
        """
        num_frames, rate, _ = self.headers[index]
        wanted = -(-num_samples * rate // self.sample_rate)
        first = int(random.integers(num_frames - wanted, endpoint=True)) if num_frames > wanted else 0
        return self._resampled(index, self._decoded(index, first, min(num_frames, wanted)).mean(1))

    def read(self, index: int) -> np.ndarray:
        """The first channel of a whole recording, float64; averaged channels would be no room's.

        Raises:
            AudioError: it cannot be decoded.
        """
        return self._resampled(index, self._decoded(index, 0, self.headers[index].num_frames)[:, 0])

    def _decoded(self, index: int, first: int, count: int) -> np.ndarray:
        """So many samples of a file as it is: float64 ``[count, C]``."""
        path = Path(self.paths[index])
        with AudioReader(path) as reader:
            reader.seek(first)
            block = reader.read(count)
        if len(block) != count:
            raise AudioError(path, f"decoding stops at sample {first + len(block)}, the header promised more")
        if not np.isfinite(block).all():
            raise AudioError(path, "NaN or infinite samples")
        return block.astype(np.float64)

    def _resampled(self, index: int, waveform: np.ndarray) -> np.ndarray:
        rate = self.headers[index].sample_rate
        return waveform if rate == self.sample_rate else soxr.resample(waveform, rate, self.sample_rate, QUALITY)


def reverberate(row: np.ndarray, response: np.ndarray) -> np.ndarray:
    """A row in a room, aligned at the direct path: what comes before the greatest sample of the response is cut off.

    Args:
        row: float64 ``[N]``.
        response: float64 ``[L]``, not silent.

    Returns:
        ``[N]``; the direct path is the row itself, whatever the level and the polarity of the response.
    """
    direct = int(np.abs(response).argmax())
    response = response[direct : direct + len(row)] / response[direct]
    size = _fast_length(len(row) + len(response) - 1)
    return np.fft.irfft(np.fft.rfft(row, size) * np.fft.rfft(response, size), size)[: len(row)]


def _coloured(num_samples: int, sample_rate: int, random: np.random.Generator) -> np.ndarray:
    """Gaussian noise ``[num_samples]`` with a power spectrum of 1 / f^a from 20 Hz on; a is drawn from [0, 2].

    0 is white, 1 pink and 2 brown.
    """
    exponent = random.uniform(0, 2)
    size = _fast_length(max(num_samples, sample_rate // 10))
    spectrum = random.standard_normal(2 * (size // 2 + 1)).view(np.complex128)
    frequencies = np.fft.rfftfreq(size, 1 / sample_rate)
    spectrum *= np.where(frequencies < LOWEST_HERTZ, 0.0, np.maximum(frequencies, LOWEST_HERTZ) ** (-exponent / 2))
    return np.fft.irfft(spectrum, size)[:num_samples]


def _babble(rows: Sequence[np.ndarray], place: int, random: np.random.Generator) -> np.ndarray | None:
    """Some of the other rows at once, as long as the one at ``place``; None where they are silent."""
    others = [index for index in range(len(rows)) if index != place]
    if not others:
        return None
    chosen = random.choice(others, random.integers(1, min(MOST_VOICES, len(others)), endpoint=True), replace=False)
    return _mixture([_fitted(rows[index].astype(np.float64), len(rows[place]), random) for index in chosen])


def _fitted(noise: np.ndarray, num_samples: int, random: np.random.Generator) -> np.ndarray:
    """``[num_samples]`` of noise of any length: cut at a random place, or repeated from a random start."""
    if len(noise) >= num_samples:
        start = int(random.integers(len(noise) - num_samples, endpoint=True))
        return noise[start : start + num_samples]
    # A few samples at a high rate are none at a lower one, and repeated they are silence.
    return np.resize(np.roll(noise, -int(random.integers(max(len(noise), 1)))), num_samples)


def _mixture(pieces: Sequence[np.ndarray]) -> np.ndarray | None:
    """Sum of noises ``[N]`` at equal power, without the silent ones; None where all are."""
    sounding = [piece / math.sqrt(_power(piece)) for piece in pieces if not _is_silent(piece)]
    return sum(sounding[1:], sounding[0]) if sounding else None


def _power(waveform: np.ndarray) -> float:
    return float(np.square(waveform).mean())


def _is_silent(waveform: np.ndarray) -> bool:
    return float(np.abs(waveform).max(initial=0.0)) < SILENCE_PEAK


def _fast_length(least: int) -> int:
    """The shortest length from ``least`` on that is fast to transform."""
    return min(factor << max(-(-least // factor) - 1, 0).bit_length() for factor in FFT_FACTORS)


def _musan_speech(names: Sequence[str]) -> str | None:
    """Where the speech is, if the files, or those in musan/, are laid out as MUSAN."""
    for prefix in ("", "musan/"):
        if all(any(name.startswith(f"{prefix}{part}/") for name in names) for part in MUSAN):
            return f"{prefix}speech/"
    return None


def _first(problems: Sequence[Problem]) -> str:
    return f"{problems[0].file}: {problems[0].finding.detail}"
