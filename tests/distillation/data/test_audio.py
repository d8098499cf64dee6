"""The one reader: what is cut off, streamed, joined or without length is read alike, or refused alike, everywhere."""

from __future__ import annotations

import os
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import soxr

from distillation.data import containers
from distillation.data.audio import AudioError, AudioReader, check_audio, decode, probe, read_crop, read_header
from distillation.data.corpus import find
from distillation.data.resampling import AudioFile, resampled, resampled_length
from tests.helpers import run_here

NUM = 48_000  # samples of most files here


def sound(num: int = NUM, seed: int = 0) -> np.ndarray:
    """Louder and louder, so that an MP3 has frames of different lengths."""
    random = np.random.default_rng(seed)
    rumble = random.standard_normal(num).cumsum()
    rumble -= rumble.mean()
    return 0.3 * rumble / np.abs(rumble).max() + 0.05 * random.standard_normal(num) * np.linspace(0, 1, num)


def write(path: Path, subtype: str | None = None, format: str | None = None, num: int = NUM, seed: int = 0) -> bytes:
    """A file in the format of its name or another: its bytes."""
    soundfile.write(path, sound(num, seed), 16_000, subtype, format=format)
    return path.read_bytes()


def decoded(path: Path) -> np.ndarray:
    return np.concatenate(list(decode(path)))[:, 0]


def assert_same_everywhere(path: Path) -> np.ndarray:
    """Header, crops, check and features agree about a file: what decoding gives."""
    whole = decoded(path)
    assert read_header(path) == (len(whole), 16_000, 1)
    assert check_audio(path, len(whole)) is None
    for start, num in ((0, len(whole)), (0, 100), (5000, 3000), (17_777, 9999), (len(whole) - 700, 700)):
        # libopus rounds differently after a seek
        np.testing.assert_allclose(read_crop(path, start, num, 16_000), whole[start : start + num], rtol=0, atol=1e-7)
    for start in (len(whole) - 699, len(whole)):
        with pytest.raises(AudioError, match=r"samples, but the list|decoding stops at"):
            read_crop(path, start, 700, 16_000)
    with AudioFile(path) as file:
        assert file.num_samples == len(whole)
        for begin, end in ((16_000, 33_000), (32_000, len(whole)), (32_000, 32_500), (0, 16_001)):  # also backwards
            np.testing.assert_allclose(file.read(begin, end), whole[begin:end], rtol=0, atol=1e-7)
    return whole


def refused_everywhere(path: Path) -> str:
    """Why; it is the same reason in all places."""
    with pytest.raises(AudioError) as caught:
        read_header(path)
    reason = caught.value.reason
    with pytest.raises(AudioError) as caught:
        read_crop(path, 0, 100, 16_000)
    assert caught.value.reason == reason
    with pytest.raises(AudioError) as caught:
        check_audio(path, NUM)
    assert caught.value.reason == reason
    with pytest.raises(AudioError) as caught:
        AudioFile(path)
    assert caught.value.reason == reason
    return reason


@pytest.mark.parametrize(
    ("suffix", "format"),
    [("wave", "WAV"), ("rf64", "RF64"), ("aifc", "AIFF"), ("snd", "AU"), ("nist", "NIST"), ("voc", "VOC"),
     ("mpga", "MP3"), ("oga", "OGG"), ("oga", "FLAC")],
)  # fmt: skip
def test_further_suffixes(tmp_path, suffix, format):
    write(tmp_path / f"x.{suffix}", format=format)
    assert_same_everywhere(tmp_path / f"x.{suffix}")
    assert find(tmp_path, ["."]).names == [f"x.{suffix}"]


def test_what_can_be_read_from_any_place(tmp_path):
    expected = {"PCM_16": True, "IMA_ADPCM": True, "GSM610": False}
    for subtype, seekable in expected.items():
        write(tmp_path / "x.wav", subtype)
        assert probe(tmp_path / "x.wav")[1] is seekable
    write(tmp_path / "x.mp3")
    assert not probe(tmp_path / "x.mp3")[1]


# Cut off


@pytest.mark.parametrize(
    ("suffix", "format", "subtype", "size"),
    [
        ("wav", "WAV", "PCM_16", 2),
        ("wav", "WAV", "PCM_U8", 1),
        ("wav", "WAVEX", "PCM_24", 3),
        ("wav", "WAV", "FLOAT", 4),
        ("wav", "RF64", "PCM_16", 2),
        ("w64", "W64", "PCM_16", 2),
        ("aiff", "AIFF", "PCM_16", 2),
        ("aif", "AIFF", "ALAW", 1),
        ("au", "AU", "PCM_16", 2),
        ("sph", "NIST", "PCM_16", 2),
        ("sph", "NIST", "ULAW", 1),
        ("wav", "WAV", "MS_ADPCM", 0),
        ("wav", "WAV", "GSM610", 0),
        ("w64", "W64", "IMA_ADPCM", 0),
        ("aiff", "AIFF", "IMA_ADPCM", 0),
        ("au", "AU", "G721_32", 0),
        ("caf", "CAF", "ALAC_16", 0),
    ],
)
def test_a_header_that_promises_more_than_there_is(tmp_path, suffix, format, subtype, size):
    path = tmp_path / f"x.{suffix}"
    content = write(path, subtype, format)
    assert_same_everywhere(path)
    path.write_bytes(content[: len(content) // 3])
    reason = refused_everywhere(path)
    if format == "CAF":  # libsndfile finds it by itself
        assert "malformed" in reason
    elif size:
        held = (len(content) // 3 - (len(content) - NUM * size)) // size
        assert reason == f"the header promises {NUM} samples, the file holds {held}: cut off?"
    else:
        assert "bytes, the file holds" in reason
    path.write_bytes(content[:-size] if size else content[:-40])  # the least that can be missing
    refused_everywhere(path)


def test_mp3_and_ogg_that_are_cut_off(tmp_path):
    for name, subtype, words in (
        ("x.mp3", "MPEG_LAYER_III", "bytes, the file holds"),
        ("x.ogg", "VORBIS", "Ogg page"),
        ("x.opus", "OPUS", "Ogg page"),
    ):
        path = tmp_path / name
        content = write(path, subtype, "MP3" if name == "x.mp3" else "OGG")
        assert_same_everywhere(path)
        path.write_bytes(content[: len(content) * 2 // 3])
        assert words in refused_everywhere(path)


def test_flac_that_is_cut_off_is_found_by_decoding(tmp_path):
    content = write(tmp_path / "x.flac")
    (tmp_path / "x.flac").write_bytes(content[: len(content) // 3])
    assert read_header(tmp_path / "x.flac").num_frames == NUM
    with pytest.raises(AudioError, match="lost sync"):
        check_audio(tmp_path / "x.flac", NUM)
    with AudioFile(tmp_path / "x.flac") as file, pytest.raises(AudioError, match=r"x\.flac: .*lost sync"):
        file.read(0, NUM)


def test_the_check_refuses_a_copy_that_stopped(tmp_path):
    for name in ("a/whole.wav", "b/whole.wav", "a/cut.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        content = write(tmp_path / name)
    (tmp_path / "a/cut.wav").write_bytes(content[: len(content) // 3])
    run_here("prepare_data.py", "--data", tmp_path, "--out", tmp_path / "lists", "--check", code=2)
    row = (tmp_path / "lists/broken.tsv").read_text().splitlines()
    assert len(row) == 1 and row[0].startswith(f"{tmp_path}/a/cut.wav\tunreadable\tthe header promises {NUM} samples")
    run_here("prepare_data.py", "--data", tmp_path, "--out", tmp_path / "lists", "--skip_broken")
    assert "cut" not in "".join((tmp_path / f"lists/{name}.tsv").read_text() for name in ("train", "valid"))


# Without length


def streamed(content: bytes, patches: dict[int, bytes]) -> bytes:
    changed = bytearray(content)
    for position, value in patches.items():
        changed[position : position + len(value)] = value
    return bytes(changed)


@pytest.mark.parametrize("data", [0, 0xFFFFFFFF, 0x7FFFF000, 0x7FFFFFFF - 36, 0x80000000 - 44])
@pytest.mark.parametrize("riff", [0, 36, 0xFFFFFFFF, 0x7FFFF024])
def test_a_streamed_wav_is_read_to_its_end(tmp_path, riff, data):
    path = tmp_path / "x.wav"
    content = write(path)
    expected = decoded(path)
    path.write_bytes(streamed(content, {4: struct.pack("<I", riff), 40: struct.pack("<I", data)}))
    assert np.array_equal(assert_same_everywhere(path), expected)


@pytest.mark.parametrize("size", [0, -1, 2**63 - 1])
@pytest.mark.parametrize("name", ["x.w64", "x.caf", "rf64.wav", "x.au", "x.aiff"])
def test_other_streams_are_read_to_their_end(tmp_path, name, size):
    path = tmp_path / name
    content = write(path, "PCM_16", "RF64" if name == "rf64.wav" else None)
    expected = decoded(path)
    at = content.find(b"SSND" if name == "x.aiff" else b"data")
    wide = struct.pack("<q" if name in ("x.w64", "rf64.wav") else ">q", size)
    narrow = wide[-4:] if size >= 0 else b"\xff\xff\xff\xff"
    patches = {
        "x.w64": {16: wide, at + 16: wide},
        "x.caf": {at + 4: wide},
        "rf64.wav": {20: wide, 28: wide},
        "x.au": {8: narrow},
        "x.aiff": {4: narrow, at + 4: struct.pack(">I", 0x7F000008) if size else bytes(4)},
    }[name]
    path.write_bytes(streamed(content, patches))
    assert np.array_equal(assert_same_everywhere(path), expected)


def test_a_wav_without_audio_is_no_stream(tmp_path):
    soundfile.write(tmp_path / "x.wav", np.empty(0), 16_000)
    content = (tmp_path / "x.wav").read_bytes() + b"LIST" + struct.pack("<I", 20) + bytes(20)
    (tmp_path / "x.wav").write_bytes(streamed(content, {4: struct.pack("<I", len(content) - 8)}))
    with pytest.raises(AudioError, match="holds no audio"):
        read_header(tmp_path / "x.wav")


def test_a_flac_at_0_hz_is_refused(tmp_path):
    content = bytearray(write(tmp_path / "x.flac"))
    content[18:20], content[20] = bytes(2), content[20] & 0x0F
    (tmp_path / "x.flac").write_bytes(content)
    with pytest.raises(AudioError, match="its header says 0 Hz"):
        read_header(tmp_path / "x.flac")


def test_a_flac_without_length_is_decoded_for_it(tmp_path):
    content = bytearray(write(tmp_path / "x.flac"))
    expected = decoded(tmp_path / "x.flac")
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    (tmp_path / "x.flac").write_bytes(content)
    assert np.array_equal(assert_same_everywhere(tmp_path / "x.flac"), expected)
    (tmp_path / "x.flac").write_bytes(content[: len(content) // 2])
    with pytest.raises(AudioError, match="lost sync"):
        read_header(tmp_path / "x.flac")


@pytest.fixture(params=["VARIABLE", "CONSTANT"])
def mp3(tmp_path, request) -> bytes:
    """Its first frame holds a Xing or Info header alone."""
    path = tmp_path / "mp3"
    with soundfile.SoundFile(path, "w", 16_000, 1, format="MP3", bitrate_mode=request.param) as file:
        file.write(sound())
    return path.read_bytes()


def first_frame(content: bytes) -> int:
    """Bytes of the first frame, which the second begins after."""
    descriptor = os.memfd_create("mp3")
    os.write(descriptor, content)
    frame = containers._find_frame(descriptor, len(content), 0)
    os.close(descriptor)
    assert frame is not None and frame.position == 0
    return frame.length


def test_mp3_without_length_is_decoded_for_it(tmp_path, mp3):
    (tmp_path / "plain.mp3").write_bytes(mp3)
    assert len(assert_same_everywhere(tmp_path / "plain.mp3")) == NUM
    bare = mp3[first_frame(mp3) :]
    tag = b"ID3\x04\0\0\0\0\x02\0" + bytes(256)
    for name, content, times in (
        ("bare", bare, 1),
        ("tagged", tag + bare + b"TAG" + bytes(125), 1),
        ("joined", mp3 + mp3, 2),
        ("tags between", tag + mp3 + tag + mp3, 2),
        ("three", bare + mp3 + bare, 3),
    ):
        path = tmp_path / f"{name}.mp3"
        path.write_bytes(content)
        whole = assert_same_everywhere(path)
        # An encoder fills the last frame up, and delays by up to three frames of 576 samples.
        assert times * NUM < len(whole) < times * (NUM + 4 * 576), name
        part = whole[-NUM // 4 :]
        assert part.std() > 0.5 * sound()[-NUM // 4 :].std(), name


def test_tags_around_an_mp3_do_not_hide_its_length(tmp_path, mp3):
    path = tmp_path / "x.mp3"
    path.write_bytes(b"ID3\x04\0\0\0\0\x02\0" + bytes(256) + mp3 + b"TAG" + bytes(2000))
    assert len(assert_same_everywhere(path)) == NUM
    with AudioReader(path) as reader:
        assert reader.num_frames == NUM, "it was decoded"


@pytest.mark.parametrize("subtype", ["VORBIS", "OPUS"])
@pytest.mark.parametrize("other", [0, 1])
def test_joined_ogg_streams_are_refused(tmp_path, subtype, other):
    path = tmp_path / "x.ogg"
    path.write_bytes(write(path, subtype) + write(path, subtype, seed=other, num=NUM // 2))
    assert "several Ogg streams joined" in refused_everywhere(path)


# The system's errors


def test_errors_of_the_system_keep_their_names(tmp_path, monkeypatch):
    path = tmp_path / "x.wav"
    write(path)
    assert refused_everywhere(tmp_path / "gone.wav") == "No such file or directory"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = [os.dup(0)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken[0] + 1, hard))
    try:
        while True:
            taken.append(os.open(path, os.O_RDONLY))
    except OSError:
        assert refused_everywhere(path) == "Too many open files"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for descriptor in taken:
            os.close(descriptor)

    def denied(*args: object, **kwargs: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)  # root may read everything
    assert refused_everywhere(path) == "Permission denied"


def test_a_refused_file_is_closed(tmp_path):
    content = write(tmp_path / "x.wav")
    (tmp_path / "x.wav").write_bytes(content[:5000])
    write(tmp_path / "y.wav")
    before = list(Path("/proc/self/fd").iterdir())
    errors = []
    for name in ("x.wav", "y.wav"):
        try:
            read_crop(tmp_path / name, 0, NUM + 1, 16_000)
        except AudioError as error:
            errors.append(error)  # with the frames of its traceback
    assert len(errors) == 2 and list(Path("/proc/self/fd").iterdir()) == before


# Resampling


@pytest.mark.parametrize("rate", [16_000, 8_000, 44_100, 48_000, 11_025, 15_991])
def test_blocks_are_resampled_as_the_whole(rate):
    for num in (0, 1, 13, 1000, 30_001):
        waveform = sound(max(num, 2))[:num].astype(np.float32)
        expected = soxr.resample(waveform, rate, 16_000, "HQ") if num else waveform
        blocks = np.split(waveform, [num // 7, num // 3, num // 3])
        found = np.concatenate(list(resampled(iter(blocks), rate)))
        assert len(found) == len(expected) == resampled_length(num, rate)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_resampled_length_is_rounded():
    assert [resampled_length(n, 44_100) for n in (0, 1, 2, 4, 44_100, 44_101)] == [0, 0, 1, 1, 16_000, 16_000]
    assert [resampled_length(n, 32_000) for n in (1, 2, 3)] == [1, 1, 2]  # a half goes up


@pytest.mark.parametrize(
    ("suffix", "rate", "tolerance"),
    [("wav", 44_100, 1e-6), ("mp3", 44_100, 1e-6), ("wav", 8_000, 1e-6), ("mp3", 8_000, 1e-6), ("wav", 15_991, 5e-5)],
)
def test_pieces_are_those_of_the_whole(tmp_path, suffix, rate, tolerance):
    path = tmp_path / f"x.{suffix}"
    soundfile.write(path, np.stack([sound(5 * rate + 77), sound(5 * rate + 77, 1)], 1), rate)
    samples = np.concatenate(list(decode(path))).mean(1)
    expected = soxr.resample(samples, rate, 16_000, "HQ")
    with AudioFile(path) as file:
        assert file.num_samples == len(expected)
        for begin, end in ((0, 40_000), (32_000, 48_000), (48_000, 50_001), (64_000, len(expected)), (16_000, 20_000)):
            np.testing.assert_allclose(file.read(begin, end), expected[begin:end], rtol=0, atol=tolerance)
