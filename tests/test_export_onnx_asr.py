"""A recogniser in the folder that the package onnx-asr loads: texts, times, batches, 8 bits, mistakes."""

from __future__ import annotations

import contextlib
import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from distillation.errors import UserError
from distillation.recognition.decoding import greedy_decoder
from exporting import onnx_asr as onnx_asr_export
from exporting import verify
from tests.configs import first_layers
from tests.exports import LARGE, exported, make
from tests.helpers import run_exported_here
from wav2vec2 import load_model, save_model

onnx_asr = pytest.importorskip("onnx_asr", reason="requirements/export.txt")
pytest.importorskip("onnxscript", reason="requirements/export.txt")
VOCABULARY = ["<pad>", "|", "A", "'", "B"]


def waveforms() -> list[np.ndarray]:
    """Tones that come and go: 1 s, 0.44 s, and 19 ms, which are no frame."""
    random = np.random.default_rng(1)
    time = np.arange(16_000) / 16_000
    whole = np.sin(2 * np.pi * 2000 * time**2) * np.sin(2 * np.pi * 3 * time) + 0.1 * random.standard_normal(16_000)
    return [whole[:count].astype(np.float32) for count in (16_000, 7_000, 300)]


@pytest.fixture(scope="module")
def recogniser(tmp_path_factory, tiny_config, short_batches) -> Path:
    """A random model that writes every character, beside it its folder in float32 and 8 bits."""
    folder = tmp_path_factory.mktemp("asr")
    config = {**first_layers(tiny_config, 1), **LARGE, "encoder_layer_drop": 0.0}
    model = load_model(make(folder / "model.pth", config, aux_num_out=len(VOCABULARY)))
    assert model.aux is not None
    with torch.no_grad():
        logits, _ = model(torch.from_numpy(waveforms()[0])[None])
        spread = logits.std((0, 1))
        model.aux.weight.div_(spread[:, None])
        model.aux.bias.sub_(logits.mean((0, 1))).div_(spread)
    save_model(folder / "model.pth", model, vocabulary=VOCABULARY)
    with pytest.MonkeyPatch.context() as patch:  # in a fresh process by the command of docs/use.md
        for module in (verify, onnx_asr_export):
            patch.setattr(module, "run_exported", run_exported_here)
        return exported(folder / "model.pth", "onnx-asr", folder / "recogniser", int8=True)


@pytest.fixture(scope="module")
def load(recogniser):
    """Loads the folder with the package, as the page in it says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(recogniser)
        import wav2vec2_ctc  # noqa: F401

        yield lambda name="wav2vec2-ctc", **options: onnx_asr.load_model(name, recogniser, **options)


def ours(recogniser: Path) -> list[tuple[str, list[float]]]:
    """Texts of the waveforms, and seconds at which the characters begin."""
    model = load_model(recogniser.with_name("model.pth"))
    padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(w) for w in waveforms()], batch_first=True)
    with torch.no_grad():
        logits, frames = model(padded, torch.tensor([len(w) for w in waveforms()]))
    texts = greedy_decoder(VOCABULARY)(logits, frames)
    times = []
    for row, count in zip(logits.argmax(-1).tolist(), frames.tolist()):
        ids = [0, *row[:count]]
        times.append([i / 50 for i in range(count) if ids[i + 1] not in (0, ids[i])])
    return list(zip(texts, times))


@pytest.mark.slow
def test_texts_and_times_are_ours(recogniser, load, tmp_path):
    expected = ours(recogniser)
    texts = [text for text, _ in expected]
    assert {*texts[0]} == {" ", "A", "'", "B"} and " '" in texts[0] and texts[2] == ""
    files = []
    for i, waveform in enumerate(waveforms()):
        files.append(tmp_path / f"{i}.wav")
        soundfile.write(files[-1], waveform / 2, 16_000, "PCM_24")  # loudness does not count
    model = load()
    assert model.recognize(waveforms()) == texts
    assert [model.recognize(waveform) for waveform in waveforms()] == texts
    assert load("me/recogniser").recognize(files) == texts  # the type stands in the folder
    for result, (text, times) in zip(model.with_timestamps().recognize(waveforms()), expected):
        assert result.text == text and result.timestamps == pytest.approx(times)
        assert len(result.tokens) == len(times)


@pytest.mark.slow
def test_8_bits_are_close(recogniser, load):
    exact, rounded = load(), load(quantization="int8")
    assert (recogniser / "model.int8.onnx").stat().st_size != (recogniser / "model.onnx").stat().st_size
    (whole, *_), lengths = waveforms(), np.array([16_000])
    a, b = (model.asr._encode(whole[None], lengths)[0] for model in (exact, rounded))
    assert np.abs(a - b).max() > 1e-4 and (a.argmax(-1) == b.argmax(-1)).mean() > 0.8
    assert rounded.recognize(whole)


@pytest.mark.slow
def test_a_release_with_the_type_needs_the_folder_alone(recogniser):
    """What such a release reads: names of files, inputs and outputs, and 10 ms as the unit of times."""
    import onnxruntime

    settings = json.loads((recogniser / "config.json").read_text())
    assert settings == {"model_type": "wav2vec2-ctc", "subsampling_factor": 2}
    assert (recogniser / "vocab.txt").read_text(encoding="utf-8") == "<blk> 0\n\u2581 1\nA 2\n' 3\nB 4\n"
    for name in ("model.onnx", "model.int8.onnx"):
        session = onnxruntime.InferenceSession(recogniser / name, providers=["CPUExecutionProvider"])
        assert [i.name for i in session.get_inputs()] == ["input_values", "input_lengths"]
        assert session.get_outputs()[0].name == "logprobs"
        assert [value.shape for value in session.get_inputs()] == [["batch", "samples"], ["batch"]]
        assert session.get_outputs()[0].shape == ["batch", "frames", 5]
    assert {p.name for p in recogniser.iterdir()} == {
        "config.json", "vocab.txt", "model.onnx", "model.int8.onnx", "wav2vec2_ctc.py", "README.md"
    }  # fmt: skip


def test_a_release_with_the_type_is_left_alone(monkeypatch):
    """Its private names may be others."""
    known = lambda model, local_dir: None  # noqa: E731
    monkeypatch.setattr(onnx_asr.loader, "create_asr_resolver", known)
    monkeypatch.delattr(onnx_asr.asr, "_AsrWithCtcDecoding")
    runpy.run_path(str(onnx_asr_export.TYPE))
    assert onnx_asr.loader.create_asr_resolver is known


def test_mistakes(tiny_config, tmp_path, monkeypatch):
    small = first_layers(tiny_config, 1)
    with pytest.raises(UserError, match=r"model.pth: has no output layer.*fine-tune with finetune_ctc.py"):
        exported(make(tmp_path / "model.pth", small), "onnx-asr", tmp_path / "out")
    model = make(tmp_path / "model.pth", small, aux_num_out=len(VOCABULARY))
    with pytest.raises(UserError, match=r"exists; name a new folder"):
        exported(model, "onnx-asr", tmp_path)
    monkeypatch.setitem(sys.modules, "onnx_asr", None)
    with pytest.raises(UserError, match=r"package onnx_asr: pip install -r requirements/export.txt"):
        exported(model, "onnx-asr", tmp_path / "out")
    silent = load_model(model)
    silent.vocabulary = None
    save_model(model, silent)
    with pytest.raises(UserError, match=r"no vocabulary for it; fine-tune with finetune_ctc.py"):
        exported(model, "onnx-asr", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


@pytest.mark.parametrize(
    ("text", "last", "message"),
    [("A B", 0.08, None), ("AB", 0.08, r"writes \['AB'\] instead of \['A B'\]"), ("A B", 0.09, "other times")],
)
def test_texts_and_times_must_be_those_of_the_log_probabilities(text, last, message, tmp_path, monkeypatch):
    made = {
        "logprobs": np.eye(5)[None, [0, 2, 2, 1, 4]],
        "texts": np.array([text]),
        "times": np.array([0.02, 0.06, last]),
    }
    monkeypatch.setattr(onnx_asr_export, "run_exported", lambda *_: [made])
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        onnx_asr_export.require_texts("onnx_asr", tmp_path, VOCABULARY, 320)
