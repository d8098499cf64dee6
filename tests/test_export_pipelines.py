"""The pipelines of an exported folder: each utterance in a batch gives what it gives alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset
from transformers import AutoFeatureExtractor, AutoModelForAudioClassification, AutoModelForCTC, AutoTokenizer, pipeline

from tests.exports import VOCABULARY, waveforms
from wav2vec2 import load_model


@pytest.fixture(scope="module")
def features(hf_folder):
    return pipeline("feature-extraction", model=str(hf_folder), trust_remote_code=True)


class Corpus(Dataset):
    """A dataset of waveforms as those of the package datasets are."""

    def __init__(self, rows: list[np.ndarray]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"array": self.rows[i], "sampling_rate": 16_000, "path": "x.wav"}


@pytest.mark.parametrize("batch_size", [1, 2, 8])
@pytest.mark.parametrize("form", ["list", "generator", "dataset", "dicts"])
def test_features_of_a_batch_are_those_of_each_alone(form, batch_size, features, hf_folder):
    rows = [*waveforms(), np.zeros(100, np.float32), waveforms()[1][::-1], waveforms()[1]]
    forms = {
        "list": lambda: rows,
        "generator": lambda: (row for row in rows),
        "dataset": lambda: Corpus(rows),
        "dicts": lambda: [{"sampling_rate": 16_000, "raw": torch.tensor(row.copy())} for row in rows],
    }
    found = list(features(forms[form](), batch_size=batch_size, return_tensors=True))
    expected = load_model(hf_folder).embed(rows)
    assert [len(state) for state in expected] == [49, 21, 2, 0, 21, 21]
    for one, alone in zip(found, expected, strict=True):
        torch.testing.assert_close(one, alone[None], atol=1e-5, rtol=1e-5)


def test_feature_extraction(features, hf_folder):
    expected = load_model(hf_folder)(torch.from_numpy(waveforms()[0])[None])[0]
    torch.testing.assert_close(features(waveforms()[0], return_tensors=True), expected, atol=1e-5, rtol=1e-5)
    nested = features([{"array": waveforms()[0], "sampling_rate": 16_000}, waveforms()[1]])
    assert np.asarray(nested[0]).shape == (1, 49, 24) and np.asarray(nested[1]).shape == (1, 21, 24)
    samples = SimpleNamespace(data=torch.from_numpy(waveforms()[0])[None], sample_rate=16_000)
    decoder = SimpleNamespace(get_all_samples=lambda: samples)
    assert torch.equal(features(decoder, return_tensors=True), features(waveforms()[0], return_tensors=True))
    options = {"trust_remote_code": True, "return_tensors": True, "dtype": torch.bfloat16}
    half = pipeline("feature-extraction", model=str(hf_folder), **options)(waveforms()[0])
    assert half.dtype == torch.bfloat16 and torch.cosine_similarity(half.float(), expected, -1).min() > 0.99


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        ({"array": waveforms()[0], "sampling_rate": 8_000}, "audio of 8000 Hz: resample it to 16000 Hz"),
        ({"array": waveforms()[0]}, r"\"sampling_rate\": ...}, got the keys \['array'\]"),
        ("x.wav", "full scale 1 .*, got str"),
        (np.zeros((2, 8_000), np.float32), r"\[2, 8000\]"),
        (np.zeros(8_000, np.int16), "int16"),
        (np.full(8_000, np.nan, np.float32), "NaN"),
    ],
)
def test_what_is_no_audio_of_the_model_is_refused(audio, message, features):
    with pytest.raises(ValueError, match=message) as error:
        features([audio], batch_size=2)
    assert "\n" not in str(error.value)
    with pytest.raises(TypeError, match="layer"):
        features(waveforms()[0], layer=3)


def test_speech_recognition(ctc_folder):
    pipe = pipeline("automatic-speech-recognition", model=str(ctc_folder), trust_remote_code=True)
    texts = []
    for waveform in waveforms()[:2]:
        ids = load_model(ctc_folder)(torch.from_numpy(waveform)[None])[0][0].argmax(-1).unique_consecutive().tolist()
        expected = "".join(VOCABULARY[i] for i in ids if i != 0).replace("|", " ")
        texts.append(" ".join(pipe(waveform.copy())["text"].split()))
        assert texts[-1] == " ".join(expected.split())
    assert any(texts)
    words = pipe(waveforms()[0].copy(), return_timestamps="char")["chunks"]
    assert 0 <= words[0]["timestamp"][0] <= words[-1]["timestamp"][1] <= 1.0
    assert pipe(waveforms()[0].copy(), chunk_length_s=0.5)["text"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"return_timestamps": "char"},
        {"return_timestamps": "word", "chunk_length_s": 0.4},
        {"chunk_length_s": 0.22, "stride_length_s": (0.04, 0.02)},
        {"chunk_length_s": 0.43, "stride_length_s": 0},  # which leaves a last piece of 120 samples
    ],
)
def test_texts_of_a_batch_are_those_of_each_alone(options, ctc_folder):
    """Where the model hears something in padding: it hears something in every frame."""
    model = AutoModelForCTC.from_pretrained(ctc_folder, trust_remote_code=True)
    model.lm_head.bias.data[0] = -100.0
    pipe = pipeline(
        "automatic-speech-recognition",
        model=model,
        feature_extractor=AutoFeatureExtractor.from_pretrained(ctc_folder),
        tokenizer=AutoTokenizer.from_pretrained(ctc_folder, trust_remote_code=True),
    )
    rows = [waveforms()[1], waveforms()[0], waveforms()[2], waveforms()[0][:100]]
    alone = [pipe(row.copy(), **options) for row in rows]
    assert all(one["text"].strip() for one in alone[:3]) and not alone[3]["text"]
    for batch_size in (2, 3, 4):
        assert pipe([row.copy() for row in rows], batch_size=batch_size, **options) == alone


def test_classes_of_a_batch_are_those_of_each_alone(hf_folder):
    torch.manual_seed(0)
    model = AutoModelForAudioClassification.from_pretrained(hf_folder, trust_remote_code=True, num_labels=3)
    extractor = AutoFeatureExtractor.from_pretrained(hf_folder)
    pipe = pipeline("audio-classification", model=model, feature_extractor=extractor)
    alone = [pipe(row) for row in waveforms()]
    assert len({tuple(one["score"] for one in row) for row in alone}) == 3
    for batch_size in (2, 3):
        for found, expected in zip(pipe(waveforms(), batch_size=batch_size), alone, strict=True):
            assert [one["label"] for one in found] == [one["label"] for one in expected]
            np.testing.assert_allclose(*([one["score"] for one in row] for row in (found, expected)), rtol=1e-5)
