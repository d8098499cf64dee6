"""Noise for the student: how loud, from where, in which rows, the same in any process; what is wrong with folders."""

from __future__ import annotations

import logging
import pickle
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch.utils.data import DataLoader, Dataset

from distillation.data.noise import Noise, NoiseConfig, reverberate
from distillation.errors import UserError
from tests.helpers import write_noise

RATE = 16_000
NO_NOISE = 1e-12  # a share that no draw reaches

SNR = "it must be two numbers of dB in [-100, 100], the lower first"


def make_rows(*lengths: int, seed: int = 0) -> list[np.ndarray]:
    random = np.random.default_rng(seed)
    return [(0.1 * random.standard_normal(length)).astype(np.float32) for length in lengths]


def tone(cycles: int, num: int = RATE, rate: int = RATE) -> np.ndarray:
    """So many cycles per second; tones of other numbers of cycles are orthogonal over whole seconds."""
    return (0.3 * np.sin(2 * np.pi * cycles * np.arange(num) / rate)).astype(np.float32)


def write(path: Path, samples: np.ndarray, rate: int = RATE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, samples, rate, subtype="FLOAT" if path.suffix == ".wav" else None)
    return path


def added(config: NoiseConfig, rows: list[np.ndarray], number: int = 0, rate: int = RATE) -> list[np.ndarray]:
    """Noise of each row, in float64, behind the reverberation."""
    noisy, errors = Noise(config, 1, rate)(rows, number)
    silent = NoiseConfig(**{**vars(config), "share": NO_NOISE})
    assert not errors
    return [a.astype(np.float64) - b for a, b in zip(noisy, Noise(silent, 1, rate)(rows, number)[0])]


def decibels(row: np.ndarray, noise: np.ndarray) -> float:
    return float(10 * np.log10(np.square(row, dtype=np.float64).mean() / np.square(noise, dtype=np.float64).mean()))


def cycles_in(noise: np.ndarray) -> dict[int, float]:
    """Tones that make up a second of noise, and the share of the power that each has."""
    power = np.square(np.abs(np.fft.rfft(noise)))
    power /= power.sum()
    return {int(cycles): float(power[cycles]) for cycles in np.flatnonzero(power > 0.01)}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise longer and shorter than the rows, stereo at 48 kHz, in MUSAN's layout; impulse responses."""
    root = tmp_path_factory.mktemp("noise")
    for seed in range(3):
        write_noise(root / f"long/{seed}.flac", 3, seed)
        write_noise(root / f"short/deeper/{seed}.wav", 0.2, seed)
        write_noise(root / f"stereo/{seed}.flac", 1.5, seed, rate=48_000, channels=2)
        response = np.random.default_rng(seed).standard_normal(4000) * np.exp(-np.arange(4000) / 500) / 10
        response[40] = 0.9
        write(root / f"rooms/{seed}.wav", response)
    write(root / "musan/noise/a.wav", tone(100))
    write(root / "musan/music/a.wav", tone(200))
    for speaker in range(10):
        write(root / f"musan/speech/{speaker}.wav", tone(1000 + speaker) / (1 + speaker))
    return root


# Level


@pytest.mark.parametrize("rooms", [[], ["rooms"]], ids=["dry", "reverberated"])
@pytest.mark.parametrize("kind", ["made", "babble", "long", "short", "stereo", "musan"])
def test_snr(folders, kind, rooms):
    rows = make_rows(16_000, 25_000, 400, 31_999)
    config = NoiseConfig(
        share=1,
        snr=(7.5, 7.5),
        folders=[] if kind in ("made", "babble") else [folders / kind],
        babble=kind == "babble",
        impulse_responses=[folders / room for room in rooms],
        reverberation=1,
    )
    for number in range(5):
        for row, noise in zip(rows, added(config, rows, number)):
            assert len(noise) == len(row)
            assert decibels(row, noise) == pytest.approx(7.5, abs=0.001)  # reverberation keeps the power


def test_snr_is_uniform():
    rows = make_rows(*[500] * 400)
    levels = [decibels(*pair) for pair in zip(rows, added(NoiseConfig(share=1, snr=(-5, 15), babble=0), rows))]
    counts, _ = np.histogram(levels, bins=4, range=(-5.001, 15.001))
    assert counts.sum() == 400 and counts.min() > 75


def test_sum_is_not_clipped():
    rows = [tone(300)]
    (noisy,), _ = Noise(NoiseConfig(share=1, snr=(-30, -30)), 0)(rows, 0)
    assert np.abs(noisy).max() > 3
    assert decibels(rows[0], noisy - rows[0]) == pytest.approx(-30, abs=0.001)


# Sources


def test_made_noise_is_white_to_brown():
    """The slope of its spectrum, fitted over octaves from 40 Hz to 5 kHz; nothing of it is below 20 Hz."""
    octaves = 40 * 2 ** np.arange(8)
    slopes = []
    for noise in added(NoiseConfig(share=1, snr=(-60, -60), babble=0), make_rows(*[64_000] * 30)):
        power = np.square(np.abs(np.fft.rfft(noise * np.hanning(len(noise)))))
        hertz = np.fft.rfftfreq(len(noise), 1 / RATE)
        bands = [power[(low <= hertz) & (hertz < 2 * low)].mean() for low in octaves]
        slopes.append(np.polyfit(np.log2(octaves), np.log2(bands), 1)[0])
        assert power[hertz < 18].max() < 1e-3 * power.max()
    assert -2.2 < min(slopes) < -1.6 and -0.4 < max(slopes) < 0.2 and np.std(slopes) > 0.3


def test_long_noise_is_cut_at_any_place(tmp_path):
    recordings = [0.1 * np.random.default_rng(seed).standard_normal(20_000) for seed in range(3)]
    for index, recording in enumerate(recordings):
        write(tmp_path / f"{index}.wav", recording)
    found = set()
    for noise in added(NoiseConfig(share=1, babble=0, folders=[tmp_path]), make_rows(*[1000] * 12)):
        fits = np.array([np.correlate(recording, noise, "valid") for recording in recordings])
        which, place = map(int, np.unravel_index(fits.argmax(), fits.shape))
        piece = recordings[which][place : place + 1000]
        assert np.corrcoef(piece, noise)[0, 1] > 0.99999
        found.add((which, place))
    assert len(found) == 12 and {which for which, _ in found} == {0, 1, 2}
    assert min(place for _, place in found) < 5000 and max(place for _, place in found) > 14_000


def test_short_noise_is_repeated_from_any_place(tmp_path):
    recording = 0.2 * np.random.default_rng(0).standard_normal(1000)
    write(tmp_path / "a.wav", recording)
    starts = set()
    for noise in added(NoiseConfig(share=1, babble=0, folders=[tmp_path]), make_rows(*[3500] * 10)):
        np.testing.assert_allclose(noise[1000:], noise[:-1000], atol=1e-6)
        cycle = noise[:1000]
        start = int(np.fft.irfft(np.fft.rfft(recording) * np.fft.rfft(cycle).conj()).argmax())
        ratio = cycle / np.roll(recording, -start)
        assert np.median(ratio) > 0 and np.std(ratio) / np.median(ratio) < 0.01
        starts.add(start)
    assert len(starts) == 10


@pytest.mark.parametrize("rate", [8000, 16_000, 48_000, 96_000])
def test_resampled_and_averaged(tmp_path, rate):
    """A tone in both channels of 48 kHz, with another that the average cancels: the tone alone at the rows' rate."""
    wide, side = tone(440, 4 * 48_000, 48_000), tone(700, 4 * 48_000, 48_000)
    write(tmp_path / "a.flac", np.stack([wide + side, wide - side], 1), 48_000)
    for noise in added(NoiseConfig(share=1, babble=0, folders=[tmp_path]), make_rows(rate, rate), rate=rate):
        assert cycles_in(noise) == {440: pytest.approx(1, abs=0.01)}


@pytest.mark.parametrize("above", [False, True])
def test_musan(folders, above):
    """Speech of 3 to 7 recordings at once, all equally loud; music and noise alone."""
    folder = folders / "musan"
    if above:
        (folders / "above").mkdir()
        folder = (folders / "above/musan").symlink_to(folder) or folders / "above"
    counts = set()
    for noise in added(NoiseConfig(share=1, babble=0, folders=[folder]), make_rows(*[RATE] * 60)):
        heard = cycles_in(noise)
        assert list(heard.values()) == [pytest.approx(1 / len(heard), abs=0.01)] * len(heard)
        assert (len(heard) == 1) == (min(heard) < 1000)
        counts.add(len(heard))
    assert counts == {1, 3, 4, 5, 6, 7}


def test_speech_folder_alone_is_any_folder(folders):
    config = NoiseConfig(share=1, babble=0, folders=[folders / "musan/speech"])
    assert {len(cycles_in(noise)) for noise in added(config, make_rows(*[RATE] * 10))} == {1}


def test_babble_is_of_other_rows():
    rows = [tone(100 * (place + 1), RATE * (1 + place % 3)) / (1 + place) for place in range(9)]
    counts = set()
    for number in range(6):
        for place, noise in enumerate(added(NoiseConfig(share=1, babble=1), rows, number)):
            heard = cycles_in(noise[:RATE])
            assert 100 * (place + 1) not in heard
            assert list(heard.values()) == [pytest.approx(1 / len(heard), abs=0.01)] * len(heard)
            counts.add(len(heard))
    assert counts == {1, 2, 3, 4, 5}


def test_babble_is_cut_at_any_place():
    short, long = make_rows(1000, 20_000)
    places = []
    for number in range(10):
        noise, _ = added(NoiseConfig(share=1, babble=1), [short, long], number)
        places.append(int(np.correlate(long, noise, "valid").argmax()))
        assert np.corrcoef(long[places[-1] :][:1000], noise)[0, 1] > 0.99999
    assert min(places) < 6000 and max(places) > 13_000


@pytest.mark.parametrize("kind", ["made", "long"])
def test_babble_of_one_row_is_what_others_would_hear(folders, kind):
    row = make_rows(5000)
    noises = [folders / kind] if kind != "made" else []
    (babbling,), (other,) = (added(NoiseConfig(share=1, folders=noises, babble=babble), row) for babble in (1, 0))
    assert np.array_equal(babbling, other)
    silent = np.zeros(7000, np.float32)
    noise, nothing = added(NoiseConfig(share=1, folders=noises, babble=1, snr=(3, 3)), [*row, silent])
    assert decibels(row[0], noise) == pytest.approx(3, abs=0.001) and not nothing.any()


# Shares


def test_shares(folders):
    rows = make_rows(*[400] * 1000)
    both = NoiseConfig(share=0.3, babble=0, impulse_responses=[folders / "rooms"], reverberation=0.6)
    wet, _ = Noise(NoiseConfig(**{**vars(both), "share": NO_NOISE}), 1)(rows, 0)
    noisy = np.array([noise.any() for noise in added(both, rows)])
    reverberated = np.array([not np.array_equal(*pair) for pair in zip(wet, rows)])
    assert noisy.mean() == pytest.approx(0.3, abs=0.05) and reverberated.mean() == pytest.approx(0.6, abs=0.05)
    assert (noisy & reverberated).mean() == pytest.approx(0.18, abs=0.04)
    babble = added(NoiseConfig(**{**vars(both), "babble": 0.4}), rows)
    other = sum(not np.array_equal(*pair) for pair in zip(babble, added(both, rows)))
    assert other / noisy.sum() == pytest.approx(0.4, abs=0.08)


# Draws


class Disturbed(Dataset):
    def __init__(self, noise: Noise, rows: list[np.ndarray]) -> None:
        self.noise, self.rows = noise, rows

    def __getitem__(self, number: int) -> list[bytes]:
        np.random.seed(number)
        return [row.tobytes() for row in self.noise(self.rows, number)[0]]


@pytest.fixture
def everything(folders) -> NoiseConfig:
    return NoiseConfig(
        share=0.7, folders=[folders / "musan", folders / "stereo", folders / "short"],
        impulse_responses=[folders / "rooms"],
    )  # fmt: skip


def test_same_in_any_process(everything):
    rows = make_rows(*[3000] * 10)
    here = [[row.tobytes() for row in Noise(everything, 5)(rows, number)[0]] for number in (3, 0, 4)]
    data = Disturbed(pickle.loads(pickle.dumps(Noise(everything, 5))), rows)
    for workers in (1, 2):
        assert list(DataLoader(data, None, sampler=[3, 0, 4], num_workers=workers)) == here
    flat = [row for batch in here for row in batch] + [row.tobytes() for row in Noise(everything, 6)(rows, 3)[0]]
    assert len(set(flat)) > 25, "other numbers and seeds give other draws"


def test_no_random_state_is_touched(everything):
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    Noise(everything, 5)(make_rows(*[3000] * 10), 0)
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_batched_is_alone(everything):
    everything.babble = 0
    rows, others = make_rows(*range(2000, 2020)), make_rows(*range(500, 520), seed=1)
    together, _ = Noise(everything, 5)(rows, 8)
    for place in range(20):
        alone, _ = Noise(everything, 5)([*others[:place], rows[place]], 8)
        assert np.array_equal(alone[place], together[place])


def test_rows_are_not_changed(everything):
    rows = make_rows(*[2000] * 12)
    before = [row.copy() for row in rows]
    copies, errors = Noise(everything, 5)(rows, 0)
    assert errors == {} and all(map(np.array_equal, rows, before))
    assert any(map(np.array_equal, rows, copies)) and not all(map(np.array_equal, rows, copies))
    for row, copy in zip(rows, copies):
        assert copy.dtype == np.float32 and copy.shape == row.shape and not np.shares_memory(row, copy)
    assert Noise(everything, 5)([], 0) == ([], {})


# Reverberation


@pytest.mark.parametrize("length", [100, 1000, 5000])
def test_reverberation_is_convolution_from_the_direct_path_on(length):
    row = make_rows(1000)[0].astype(np.float64)
    response = np.random.default_rng(0).uniform(-0.3, 0.3, length)
    response[60] = -0.5
    expected = np.convolve(row, response[60:] / -0.5)[:1000]
    np.testing.assert_allclose(reverberate(row, response), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_delayed_impulse_gives_the_row_back(tmp_path, rate):
    """Alignment and power are kept, at any level; the second channel is not listened to."""
    impulse = np.zeros((rate // 10, 2))
    impulse[rate // 20, 0] = 0.01
    impulse[:, 1] = 0.5
    write(tmp_path / "a.wav", impulse, rate)
    config = NoiseConfig(share=NO_NOISE, impulse_responses=[tmp_path], reverberation=1)
    (row,) = make_rows(RATE)
    spectrum = np.fft.rfft(row)
    spectrum[len(spectrum) // 2 :] = 0  # what resampling keeps
    row = np.fft.irfft(spectrum).astype(np.float32)
    (wet,), _ = Noise(config, 0)([row], 0)
    # the half of a resampled impulse before its greatest sample is cut off
    assert np.corrcoef(wet, row)[0, 1] > (0.999999 if rate == RATE else 0.9)
    assert np.correlate(wet, row, "full").argmax() == len(row) - 1
    assert decibels(row, wet) == pytest.approx(0, abs=0.001)
    if rate == RATE:
        np.testing.assert_allclose(wet, row, rtol=0, atol=1e-6)


def test_shares_of_rooms_without_rooms():
    rows = make_rows(3000, 3000)
    copies, _ = Noise(NoiseConfig(share=NO_NOISE, reverberation=1), 0)(rows, 0)
    assert all(map(np.array_equal, copies, rows))


# Silence and damage


def test_silence(tmp_path):
    """Silent recordings and stretches are drawn again, silent rows stay; silence has no power to divide by."""
    write(tmp_path / "silent/a.wav", np.zeros(9000))
    write(tmp_path / "short/a.wav", np.full(1, 0.5), 48_000)  # less than a sample at 16 kHz
    write(tmp_path / "half/a.wav", np.concatenate([np.zeros(20_000), tone(500, 20_000)]))
    rows = [*make_rows(*[1600] * 12), np.zeros(800, np.float32), np.full(800, 5e-5, np.float32)]
    for name in ("silent", "short", "half"):
        config = NoiseConfig(
            share=1, babble=0, snr=(5, 5), folders=[tmp_path / name], impulse_responses=[tmp_path / "silent"],
            reverberation=1,
        )  # fmt: skip
        copies, errors = Noise(config, 0)(rows, 0)
        assert errors == {}
        for row, copy in zip(rows[:-2], copies):
            assert decibels(row, copy - row) == pytest.approx(5, abs=0.001)
        assert all(map(np.array_equal, rows[-2:], copies[-2:])) and not np.shares_memory(rows[-1], copies[-1])
        if name == "half":
            noise = np.stack([copy - row for row, copy in zip(rows[:-2], copies)])
            assert (np.abs(np.fft.rfft(noise)).argmax(1) == 50).mean() > 0.8, "500 Hz"


@pytest.fixture
def damaged(tmp_path) -> Path:
    """Two recordings whose headers are fine, and a good one."""
    for name in ("bit", "cut", "good"):
        write_noise(tmp_path / f"damaged/{name}.flac", 1, 0)
    flac = bytearray((tmp_path / "damaged/bit.flac").read_bytes())
    (tmp_path / "damaged/cut.flac").write_bytes(flac[: len(flac) // 2])
    flac[len(flac) // 2] ^= 4
    (tmp_path / "damaged/bit.flac").write_bytes(flac)
    return tmp_path / "damaged"


@pytest.mark.parametrize("good", [True, False])
def test_recordings_that_cannot_be_decoded(damaged, good, caplog):
    if not good:
        (damaged / "good.flac").unlink()
        write(damaged / "nan.wav", np.full(20_000, np.nan))
    noise = Noise(NoiseConfig(share=1, babble=0, snr=(5, 5), folders=[damaged]), 0)
    assert not caplog.messages
    rows = make_rows(*[20_000] * 12)
    copies, errors = noise(rows, 0)
    names = ["bit.flac", "cut.flac"] if good else ["bit.flac", "cut.flac", "nan.wav"]
    assert sorted(errors) == [str(damaged / name) for name in names]
    assert all("flac" in reason or reason == "NaN or infinite samples" for reason in errors.values())
    for row, copy in zip(rows, copies):
        assert decibels(row, copy - row) == pytest.approx(5, abs=0.001)
    again, same = noise(rows, 0)
    assert same == errors and all(map(np.array_equal, again, copies))


def test_impulse_responses_that_cannot_be_decoded(damaged):
    (damaged / "good.flac").unlink()
    noise = Noise(NoiseConfig(share=NO_NOISE, impulse_responses=[damaged], reverberation=1), 0)
    rows = make_rows(*[3000] * 5)
    copies, errors = noise(rows, 0)
    assert sorted(errors) == [str(damaged / "bit.flac"), str(damaged / "cut.flac")]
    assert all(map(np.array_equal, copies, rows))


def test_recordings_that_are_gone_or_others_now(tmp_path):
    path = write(tmp_path / "a.wav", tone(100))
    noise = Noise(NoiseConfig(share=1, babble=0, folders=[tmp_path]), 0)
    write(path, tone(100, 700))
    reason = "decoding stops at sample 700, the header promised more"
    assert noise(make_rows(20_000), 0)[1] == {str(path): reason}
    path.unlink()
    assert noise(make_rows(500), 0)[1] == {str(path): "No such file or directory"}


def test_unreadable_headers_are_named_once(damaged, caplog):
    for name in ("a.wav", "b.flac"):
        (damaged / name).write_text("not audio at all\n" * 9)
    (damaged / "c.m4a").write_bytes(b"")
    noise = Noise(NoiseConfig(folders=[damaged]), 0)
    assert "3 recordings" in noise.describe()
    (message,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert message.startswith(
        f"data.noise.folders: 3 files are left out, the first {damaged / 'c.m4a'}: only ffmpeg reads it"
    )


# Settings and folders


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"share": 0}, "data.noise.share is 0: it must lie in (0, 1]"),
        ({"share": float("nan")}, "data.noise.share is nan: it must lie in (0, 1]"),
        ({"babble": -0.1}, "data.noise.babble is -0.1: it must lie in [0, 1]"),
        ({"reverberation": 1.1}, "data.noise.reverberation is 1.1: it must lie in [0, 1]"),
        ({"snr": (5, 4)}, "data.noise.snr is (5, 4): it must be two numbers of dB in [-100, 100], the lower first"),
        (
            {"snr": (0, np.inf)},
            "data.noise.snr is (0, inf): it must be two numbers of dB in [-100, 100], the lower first",
        ),
    ],
)
def test_settings(settings, message):
    with pytest.raises(UserError) as caught:
        NoiseConfig(**settings)
    assert str(caught.value) == message


@pytest.mark.parametrize("setting", ["folders", "impulse_responses"])
def test_folders_without_recordings(tmp_path, folders, setting):
    def error(folder: Path) -> str:
        with pytest.raises(UserError) as caught:
            Noise(
                NoiseConfig(**{setting: [folders / "long" if setting == "folders" else folders / "rooms", folder]}), 0
            )
        return str(caught.value)

    missing, empty, text = tmp_path / "missing", tmp_path / "empty", tmp_path / "text"
    assert error(missing) == f"data.noise.{setting}: {missing} is not a folder"
    empty.mkdir()
    assert error(empty).startswith(f"{empty} holds no audio files")
    text.mkdir()
    for name in ("a.flac", "b.flac"):
        (text / name).write_text("not audio at all\n" * 9)
    first = f"data.noise.{setting}: none of 2 files in {text} can be used, the first {text / 'a.flac'}: "
    assert error(text).startswith(first) and "\n" not in error(text)


def test_noise_is_no_impulse_response(tmp_path):
    write_noise(tmp_path / "noise.flac", 11, 0)
    with pytest.raises(UserError, match=r"noise\.flac: 11\.0 s, more than 10 s$"):
        Noise(NoiseConfig(impulse_responses=[tmp_path]), 0)


def test_description_is_of_the_content(folders, tmp_path):
    def describe(folder: Path) -> str:
        return Noise(NoiseConfig(folders=[folder], impulse_responses=[folders / "rooms"]), 0).describe()

    before = describe(folders / "long")
    assert before.startswith("3 recordings of 0.00 h, ") and "; impulse responses: 3 recordings" in before
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(folders / "long", elsewhere)
    assert describe(elsewhere) == before
    write_noise(elsewhere / "2.flac", 4, 0)
    longer = describe(elsewhere)
    (elsewhere / "2.flac").rename(elsewhere / "3.flac")
    assert len({before, longer, describe(elsewhere)}) == 3
    assert Noise(NoiseConfig(), 0).describe() == "made; impulse responses: none"
