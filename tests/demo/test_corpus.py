import ctypes
import importlib
import json
import os
import shutil
import signal
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from demo import corpus, espeak
from demo.corpus import CorpusSettings, is_silence, make_corpus
from demo.labels import IGNORE, FrameLabels, num_frames, read_split
from demo.sentences import KEYWORDS, draw_sentences
from distillation.errors import UserError
from distillation.journal import Journal

SMALL = CorpusSettings(train_speakers=3, train_utterances=4, dev_speakers=2, dev_utterances=3, keywords=False, seed=3)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "corpus"
    make_corpus(out, SMALL)
    return out


def rows(folder: Path, kind: str) -> list[dict]:
    return [json.loads(line) for line in (folder / "align" / f"{kind}.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_layout(small):
    found = {path.relative_to(small).as_posix() for path in small.rglob("*") if path.is_file()}
    expected = {"corpus.json", "align/train-clean-100.jsonl", "align/dev-clean.jsonl"}
    for split, speakers, num in (("train-clean-100", (100, 101, 102), 4), ("dev-clean", (103, 104), 3)):
        for speaker in speakers:
            chapter = speaker + 900
            stem = f"LibriSpeech/{split}/{speaker}/{chapter}/{speaker}-{chapter}"
            expected |= {f"{stem}.trans.txt", *(f"{stem}-{i:04d}.flac" for i in range(num))}
            lines = (small / f"{stem}.trans.txt").read_text().splitlines()
            texts = {row["id"]: row["text"] for row in rows(small, split) if row["speaker"] == speaker}
            assert dict(line.split(" ", 1) for line in lines) == {name: text.upper() for name, text in texts.items()}
    assert found == expected
    assert [path.name for path in small.parent.iterdir()] == ["corpus"]  # no scratch folder stays


def test_audio_and_alignments(small):
    for row in [*rows(small, "train-clean-100"), *rows(small, "dev-clean")]:
        samples, rate = soundfile.read(small / row["path"])
        assert rate == 16_000 and samples.shape == (row["num_samples"],)
        assert 0.05 < np.abs(samples).max() <= 1
        duration = len(samples) / rate
        assert 1 < duration < 8
        assert [label for *_, label in row["words"]] == row["text"].split()
        for kind in ("phones", "words"):
            times = np.array([span[:2] for span in row[kind]])
            assert (times[:, 0] >= 0).all() and (times[:, 1] <= duration + 1e-4).all()
            assert (times[:, 1] >= times[:, 0]).all() and (times[1:, 0] >= times[:-1, 1] - 1e-4).all()
        # the words are where the sound is: silence before and after is far weaker, whatever the noise
        start, end = (round(t * rate) for t in (row["words"][0][0], row["words"][-1][1]))
        quiet = samples[min(end + 800, len(samples) - 160) :]
        assert np.mean(quiet**2) < 0.5 * np.mean(samples[start:end] ** 2)


def test_speakers_and_sentences_are_held_out(small):
    train, dev = rows(small, "train-clean-100"), rows(small, "dev-clean")
    assert not {row["speaker"] for row in train} & {row["speaker"] for row in dev}
    texts = [row["text"] for row in train + dev]
    assert len(set(texts)) == len(texts) == 18
    speakers = corpus._draw_speakers(CorpusSettings())
    assert len({(s.voice, s.warp) for s in speakers}) == 50
    assert [s.split for s in speakers] == ["train-clean-100"] * 40 + ["dev-clean"] * 10
    texts = [sentence for speaker in speakers for sentence in speaker.sentences]
    assert len(set(texts)) == len(texts) == 4300


def test_most_utterances_are_long_enough_for_the_recipes(small):
    lengths = [row["num_samples"] for row in rows(small, "train-clean-100") + rows(small, "dev-clean")]
    assert np.mean(np.array(lengths) >= 32_000) > 0.8


def test_same_settings_same_bytes(small, tmp_path):
    make_corpus(tmp_path / "again", SMALL)
    assert contents(tmp_path / "again") == contents(small)


def test_the_seed_decides():
    one, same, other = (corpus._draw_speakers(CorpusSettings(seed=seed)) for seed in (0, 0, 1))
    assert one == same
    assert one[0].sentences != other[0].sentences and one[0].warp != other[0].warp


def test_complete_corpus_is_left_alone(small):
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    marker = make_corpus(small, SMALL)
    assert marker["utterances"] == {"train-clean-100": 12, "dev-clean": 6}
    assert {path: path.stat().st_mtime_ns for path in small.rglob("*")} == before


def test_conflicts_are_errors(small, tmp_path):
    with pytest.raises(UserError, match=f"{small} holds a corpus made with seed 3, not 0"):
        make_corpus(small, CorpusSettings(3, 4, 2, 3, False, seed=0))
    with pytest.raises(UserError, match="keywords False, not True"):
        make_corpus(small, CorpusSettings(3, 4, 2, 3, True, seed=3))
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="is not a corpus made here"):
            make_corpus(out, SMALL)
    assert (tmp_path / "file").read_text() == "mine"
    with pytest.raises(UserError, match="--dev_speakers is 0: it must be at least 1"):
        CorpusSettings(dev_speakers=0)


def test_what_fails_is_not_under_its_name(small, tmp_path, monkeypatch):
    """What another corpus has left there, or one that was moved away since, is not gone on with."""

    def fail(out, settings, partial):
        (out / "LibriSpeech").mkdir()
        journal = Journal(partial / "0.jsonl", {}, "speakers")
        journal["100"] = {"rows": {}, "said": []}
        raise OSError("disk full")

    for settings in (SMALL, CorpusSettings(1, 1, 1, 1, False)):
        with monkeypatch.context() as patch:
            patch.setattr(corpus, "_synthesise", fail)
            with pytest.raises(OSError, match="disk full"):
                make_corpus(tmp_path / "corpus", settings)
        assert [path.name for path in tmp_path.iterdir()] == [".corpus.partial"]
        if settings == SMALL:
            shutil.rmtree(tmp_path / ".corpus.partial" / "corpus")
        make_corpus(tmp_path / "corpus", SMALL)
        assert contents(tmp_path / "corpus") == contents(small)
        assert [path.name for path in tmp_path.iterdir()] == ["corpus"]
        shutil.rmtree(tmp_path / "corpus")


def descendants(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [*children, *(one for child in children for one in descendants(child))]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "corpus"
    make_corpus(out, CorpusSettings(6, 5, 2, 5, keywords=False))
    return out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_stopped_synthesis_goes_on(server, whole, tmp_path, name):
    """The signal reaches all processes, as that of a terminal does."""
    words = ["-m", "demo.corpus", "--train_speakers=6", "--train_utterances=5", "--dev_speakers=2"]
    words += ["--dev_utterances=5", "--no-keywords", "--out"]
    partial = tmp_path / ".stopped.partial"
    process = server.start(*words, tmp_path / "stopped")
    process.until(lambda: any(path.read_text().count("\n") > 1 for path in partial.glob("*.jsonl")))
    for pid in [*descendants(process.pid), process.pid]:
        os.kill(pid, getattr(signal, name))
    stopped = process.wait()
    assert stopped.code == 75 and not (tmp_path / "stopped").exists()
    assert stopped.error == f"stopped: {name}: the finished speakers are in {partial}; the same command goes on"
    assert "Error" not in stopped.output and "Exception" not in stopped.output
    finished = [key for path in partial.glob("*.jsonl") for key in Journal(path, {}, "speakers").pieces]
    before = {path.name: path.stat().st_mtime_ns for key in finished for path in partial.rglob(f"{key}-*.flac")}
    assert 5 <= len(before) < 40
    server.run(*words, tmp_path / "stopped")
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.rglob("*.flac") if path.name in before} == before
    assert contents(tmp_path / "stopped") == contents(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["stopped"]


def test_command_with_keywords(server, tmp_path):
    command = ["-m", "demo.corpus", "--out", str(tmp_path / "c"), "--train_speakers=1"]
    command += ["--train_utterances=1", "--dev_speakers=1", "--dev_utterances=1", "--keywords", "--seed=5"]
    made = server.run(*command)
    assert "Warning" not in made.stderr
    found = rows(tmp_path / "c", "keywords")
    assert [row["speaker"] for row in found] == [100] * len(KEYWORDS) + [101] * len(KEYWORDS)
    assert {row["path"] for row in found} == {
        f"keywords/{part}/{word}/{speaker}.flac"
        for part, speaker in (("train", 100), ("dev", 101))
        for word in KEYWORDS
    }
    assert all((tmp_path / "c" / row["path"]).is_file() for row in found)
    again = server.run(*command, "--no-keywords", code=2)
    assert "keywords True, not False" in again.error


@pytest.fixture
def no_package(monkeypatch):
    """As if espeakng-loader were not installed."""
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    espeak.load_espeak.cache_clear()
    yield
    espeak.load_espeak.cache_clear()


def test_error_line_without_espeak(no_package, monkeypatch, tmp_path):
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="pip install espeakng-loader, or install espeak-ng") as error:
        make_corpus(tmp_path / "out" / "corpus", SMALL)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_falls_back_to_an_installed_library(no_package, monkeypatch):
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: "libespeak-ng.so.1")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert espeak._candidates() == [("libespeak-ng.so.1", None)]


def test_falls_back_to_the_library_beside_the_program(monkeypatch, tmp_path):
    """A real synthesis through a copy laid out as an installation, where the package is broken."""
    package = importlib.import_module("espeakng_loader")
    library, data = Path(package.get_library_path()), package.get_data_path()
    (tmp_path / "bin").mkdir()
    (tmp_path / "lib").mkdir()
    (tmp_path / "bin" / "espeak-ng").touch()
    shutil.copy(library, tmp_path / "lib" / f"libespeak-ng{library.suffix}")
    broken = types.SimpleNamespace(get_library_path=lambda: str(tmp_path / "gone.so"), get_data_path=lambda: "")
    monkeypatch.setitem(sys.modules, "espeakng_loader", broken)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: str(tmp_path / "bin" / "espeak-ng"))
    monkeypatch.setenv("ESPEAK_DATA_PATH", str(data))
    espeak.load_espeak.cache_clear()
    try:
        speaker = espeak.load_espeak()
        speaker.set_voice("en-us+m1", 160, 50, 50)
        speech = speaker.say("green apples")
    finally:
        espeak.load_espeak.cache_clear()
    assert [word for _, word in speech.words] == ["green", "apples"]
    assert len(speech.samples) > 0.5 * speaker.sample_rate


def test_unknown_voice():
    with pytest.raises(UserError, match="has no voice 'en-us\\+nobody'"):
        espeak.load_espeak().set_voice("en-us+nobody", 160, 50, 50)


def test_sentences_are_distinct():
    sentences = draw_sentences(500, np.random.default_rng(0))
    assert len(set(sentences)) == 500
    assert all(5 <= len(sentence.split()) <= 12 for sentence in sentences)


def test_frame_labels(small):
    """Against the alignment, frame by frame."""
    train = read_split(small, "train-clean-100")
    words, phones = FrameLabels(train, "words", 2), FrameLabels(train, "phones", 5)
    assert phones.names[0] == "SIL" and "SIL" not in words.names
    utterance = train[0]
    of_words, of_phones = words(utterance), phones(utterance)
    assert len(of_words) == len(of_phones) == utterance.num_frames == num_frames(len(utterance.audio))
    for t in range(utterance.num_frames):
        middle = (320 * t + 200) / 16_000
        word = next((label for start, end, label in utterance.words if start <= middle < end), None)
        phone = next((label for start, end, label in utterance.phones if start <= middle < end), "_")
        assert of_words[t] == (words.names.index(word) if word in words.names else IGNORE)
        phone = "SIL" if is_silence(phone) else phone
        assert of_phones[t] == (phones.names.index(phone) if phone in phones.names else IGNORE)
    assert (of_words != IGNORE).any() and (of_phones > 0).any()
    assert torch.equal(
        utterance.waveform,
        torch.from_numpy(soundfile.read(small / rows(small, "train-clean-100")[0]["path"], dtype="float32")[0]),
    )


def test_labels_want_a_corpus(tmp_path):
    with pytest.raises(UserError, match="is missing: make the corpus"):
        read_split(tmp_path, "dev-clean")
