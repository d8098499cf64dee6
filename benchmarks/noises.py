"""Noise that no training of ours hears: hum, clicks, chords and an engine, made on the spot, the same every time."""

from pathlib import Path

import numpy as np
import soundfile

from wav2vec2.feature_extractor import SAMPLE_RATE

SECONDS = 30
FILES = 4  # of each kind


def make_noises(folder: Path) -> Path:
    """Write the recordings that are missing; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (name, make) in enumerate(KINDS.items()):
        for i in range(FILES):
            path = folder / f"{name}{i}.flac"
            if not path.is_file():
                waveform = make(np.arange(SECONDS * SAMPLE_RATE) / SAMPLE_RATE, np.random.default_rng((number, i)))
                soundfile.write(path, 0.3 * waveform / np.abs(waveform).max(), SAMPLE_RATE)
    return folder


def _hum(time: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Mains: harmonics of 50 or 60 Hz that fall off, swelling slowly."""
    base = random.choice([50.0, 60.0])
    waveform = np.zeros(len(time))
    for k in range(1, 60):
        waveform += np.sin(2 * np.pi * (k * base * time + random.uniform())) / k ** random.uniform(0.5, 1)
    return waveform * (1 + 0.5 * np.sin(2 * np.pi * random.uniform(0.1, 0.5) * time))


def _clicks(time: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A keyboard: some ten decaying bursts a second."""
    waveform = np.zeros(len(time))
    for start in random.integers(len(time) - 800, size=int(random.uniform(6, 14) * SECONDS)):
        decay = np.exp(-np.arange(800) / random.uniform(20, 120))
        waveform[start : start + 800] += random.uniform(0.2, 1) * decay * random.standard_normal(800)
    return waveform


def _chords(time: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Music: a new chord of plucked strings every half a second."""
    waveform = np.zeros(len(time))
    step = SAMPLE_RATE // 2
    for start in range(0, len(time), step):
        rest = time[: len(time) - start][: 2 * step]
        for note in random.choice(np.arange(-24, 12), 3, replace=False):
            pitch = 440 * 2 ** (note / 12)
            partials = [k for k in range(1, 7) if k * pitch < SAMPLE_RATE / 2]
            tone = sum(np.sin(2 * np.pi * k * pitch * rest) / k**1.5 for k in partials)
            waveform[start : start + len(rest)] += tone * np.exp(-4 * rest)
    return waveform


def _engine(time: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Strokes of filtered noise, faster and slower."""
    speed = random.uniform(15, 40) * (1 + 0.3 * np.sin(2 * np.pi * random.uniform(0.05, 0.2) * time))
    strokes = np.maximum(0, np.sin(2 * np.pi * np.cumsum(speed) / SAMPLE_RATE)) ** 3
    width = int(random.integers(4, 24))
    rumble = np.convolve(random.standard_normal(len(time)), np.hanning(2 * width + 1), "same")
    return strokes * rumble


KINDS = {"hum": _hum, "clicks": _clicks, "chords": _chords, "engine": _engine}
