"""Conversions that keep the output layer of recognisers: logits, vocabulary, exports and every wrong turn."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchaudio
from transformers import (
    AutoTokenizer,
    HubertConfig,
    HubertForCTC,
    HubertForSequenceClassification,
    HubertModel,
    PreTrainedModel,
    UniSpeechConfig,
    UniSpeechForCTC,
    UniSpeechSatConfig,
    UniSpeechSatForCTC,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForCTC,
    WavLMConfig,
    WavLMForCTC,
    pipeline,
)

from distillation.config import parse_recipe
from distillation.originals import describe_original, find_vocabulary
from distillation.recognition.decoding import greedy_decoder
from distillation.teacher import load_teacher
from exporting import onnx_asr as onnx_asr_export
from exporting import originals, verify
from exporting.source import Source
from tests.exports import exported, waveforms
from tests.helpers import HF_BASE, HF_LARGE, TORCHAUDIO_SIZE, run_error, run_exported_here, run_here, tiny_hf
from tests.wav2vec2.test_importers_fairseq import fairseq_state, model_settings, teacher
from wav2vec2 import CheckpointError, load_model
from wav2vec2.checkpoint import load_checkpoint
from wav2vec2.importers import ImportedModel

CONVERT, CONVERT_FILE = "convert_hubert_from_hf.py", "convert_from_checkpoint.py"
# as published: the blank first and capitals; the blank last, small letters, and special tokens that were added later
FACEBOOK = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "|": 4, "E": 5, "'": 6}
COMMUNITY = {"e": 0, "'": 1, " ": 2, "[UNK]": 3, "[PAD]": 4}
FILES: dict[str, dict[str, Any]] = {
    "tokenizer_config.json": {"unk_token": "[UNK]", "pad_token": "[PAD]", "word_delimiter_token": " "},
    "added_tokens.json": {"<s>": 5, "</s>": 7},
}
KINDS = {
    "hubert base": (HubertForCTC, HubertConfig, HF_BASE),
    "wav2vec2 base": (Wav2Vec2ForCTC, Wav2Vec2Config, HF_BASE),
    "wav2vec2 large": (Wav2Vec2ForCTC, Wav2Vec2Config, HF_LARGE),
    "wavlm base": (WavLMForCTC, WavLMConfig, HF_BASE | {"num_buckets": 16, "max_bucket_distance": 30}),
    "unispeech large": (UniSpeechForCTC, UniSpeechConfig, HF_LARGE),
    "unispeech-sat base": (UniSpeechSatForCTC, UniSpeechSatConfig, HF_BASE),
}
STRIDES = {"conv_kernel": (10, 8, 8), "conv_stride": (5, 8, 8)}  # frames 320 apart


def write_files(folder: Path, files: dict[str, dict[str, Any]]) -> None:
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content), encoding="utf-8")


def recogniser(folder: Path, kind: str = "hubert base", vocab: dict[str, int] = FACEBOOK) -> PreTrainedModel:
    """A folder of seven rows, each of which is the largest in some frames."""
    model_class, config_class, options = KINDS[kind]
    blank = vocab["[PAD]" if vocab is COMMUNITY else "<pad>"]
    original = tiny_hf(model_class, config_class, **STRIDES, **options, pad_token_id=blank)
    with torch.no_grad():
        logits = original(torch.from_numpy(waveforms()[0])[None]).logits
        spread = logits.std((0, 1))
        original.lm_head.weight.div_(spread[:, None])
        original.lm_head.bias.sub_(logits.mean((0, 1))).div_(spread)
    original.save_pretrained(folder)
    write_files(folder, {"vocab.json": vocab} | (FILES if vocab is COMMUNITY else {}))
    return original


@pytest.mark.parametrize(
    ("vocab", "order", "symbols"),
    [
        (FACEBOOK, range(7), [*FACEBOOK]),
        (COMMUNITY, [4, 0, 1, 2, 3, 5, 6], ["<pad>", "e", "'", "|", "[UNK]", "<s>", "<unused6>"]),
    ],
    ids=["blank first", "blank last"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_original(kind, vocab, order, symbols, tmp_path, capsys):
    original, out = recogniser(tmp_path / "asr", kind, vocab), tmp_path / "out.pth"
    run_here(CONVERT, "--model", tmp_path / "asr", "--out", out, "--ctc")
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[-4:]] == ["layer", "output", "logits", "over"]
    checkpoint = load_checkpoint(out)
    assert checkpoint.extra["vocabulary"] == symbols and checkpoint.config["aux_num_out"] == 7
    assert Source.read(out).vocabulary == symbols
    inputs = Wav2Vec2FeatureExtractor(do_normalize=KINDS[kind][2] is HF_LARGE)
    values = inputs(waveforms()[0], sampling_rate=16_000, return_tensors="pt").input_values
    with torch.no_grad():
        expected = original(values).logits[..., list(order)]
        torch.testing.assert_close(
            checkpoint.model(torch.from_numpy(waveforms()[0])[None])[0], expected, atol=1e-4, rtol=1e-4
        )
    assert describe_original(str(tmp_path / "asr"), ctc=True) == checkpoint.config
    assert find_vocabulary(str(tmp_path / "asr")).symbols == symbols


def test_a_layer_that_differs_is_not_saved(tmp_path, monkeypatch):
    recogniser(tmp_path / "asr")
    right = originals.keep_head

    def wrong(*args: Any) -> ImportedModel:
        imported = right(*args)
        imported.state_dict["aux.bias"][[1, 2]] = imported.state_dict["aux.bias"][[2, 1]]
        return imported

    monkeypatch.setattr(originals, "keep_head", wrong)
    error = run_error(CONVERT, "--model", tmp_path / "asr", "--out", tmp_path / "out.pth", "--ctc")
    assert "original and converted differ by" in error and "at logits" in error
    assert not (tmp_path / "out.pth").exists()


def test_the_same_source_with_and_without_its_layer(tmp_path, caplog):
    recogniser(tmp_path / "asr")
    out = tmp_path / "out.pth"
    run_here(CONVERT, "--model", tmp_path / "asr", "--out", out)
    error = run_error(CONVERT, "--model", tmp_path / "asr", "--out", out, "--ctc")
    assert f"{out} was converted without the output layer of asr: give another file by --out, or remove" in error
    without = load_checkpoint(out)
    assert without.model.aux is None and "vocabulary" not in without.extra
    assert without.config == describe_original(str(tmp_path / "asr"))
    out.unlink()
    with caplog.at_level("INFO"):
        run_here(CONVERT, "--model", tmp_path / "asr", "--out", out, "--ctc")
        run_here(CONVERT, "--model", tmp_path / "asr", "--out", out, "--ctc")
    assert "dropped the head" not in caplog.text
    assert "was converted with the output layer of asr" in run_error(CONVERT, "--model", tmp_path / "asr", "--out", out)
    # what a recipe takes for its teacher: the same source
    assert load_checkpoint(out).extra["source"] == without.extra["source"]
    flags = {"teacher_id": tmp_path / "asr", "teacher_ckpt": out, "teacher_layers": 2, "teacher_width": 24}
    words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
    assert load_teacher(parse_recipe(words)[0]).embed_dim == 24


def test_of_a_hub_id_the_vocabulary_comes_before_the_weights(tmp_path, monkeypatch):
    """And none of its files without --ctc."""
    recogniser(tmp_path / "asr")
    write_files(tmp_path / "asr", FILES | {"vocab.json": {"<pad>": 0, "the": 1}})
    fetched: list[str] = []

    def download(repository: str, name: str, revision: str | None = None) -> Path:
        fetched.append(name)
        if not (tmp_path / "asr" / name).is_file():
            raise FileNotFoundError(name)
        return tmp_path / "asr" / name

    monkeypatch.setattr("wav2vec2.importers.folder.download", download)
    out = tmp_path / "out.pth"
    error = run_error(CONVERT, "--model", "me/asr", "--out", out, "--ctc")
    assert "'the' (row 1) is a token of several letters" in error and "model.safetensors" not in fetched
    assert {"vocab.json", *FILES, "special_tokens_map.json"} < {*fetched}
    fetched.clear()
    run_here(CONVERT, "--model", "me/asr", "--out", out)
    assert "model.safetensors" in fetched and not {"vocab.json", *FILES} & {*fetched}


@pytest.mark.parametrize(
    ("model_class", "options", "files", "message"),
    [
        (HubertModel, {}, {}, "vocab.json: no such file, which says what an output layer writes"),
        (HubertModel, {}, {"vocab.json": FACEBOOK}, "no output layer of a model fine-tuned with CTC (lm_head.weight"),
        (HubertForSequenceClassification, {}, {"vocab.json": FACEBOOK}, "no output layer of a model fine-tuned with"),
        (HubertForCTC, {}, {"vocab.json": {"eng": FACEBOOK}}, "vocab.json: a vocabulary for each of several languages"),
        (HubertForCTC, {}, {"vocab.json": FACEBOOK | {"th": 6}}, "vocab.json: 'th' (row 6) is a token of several lett"),
        (HubertForCTC, {"pad_token_id": 7}, {"vocab.json": {"a": 0}}, "the blank is row 7, but the output layer has"),
        (Wav2Vec2ForCTC, {"add_adapter": True}, {"vocab.json": FACEBOOK}, "add_adapter is true in its config"),
        (HubertForCTC, {"adapter_attn_dim": 16}, {"vocab.json": FACEBOOK}, "adapter_attn_dim=16"),
    ],
)
def test_what_has_no_layer_to_keep(model_class, options, files, message, tmp_path):
    config_class = Wav2Vec2Config if model_class is Wav2Vec2ForCTC else HubertConfig
    tiny_hf(model_class, config_class, **STRIDES, **HF_BASE, **options).save_pretrained(tmp_path / "asr")
    write_files(tmp_path / "asr", files)
    error = run_error(CONVERT, "--model", tmp_path / "asr", "--out", tmp_path / "out.pth", "--ctc")
    assert message in error and str(tmp_path / "asr") in error
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("normalize", [False, True])
def test_torchaudio_bundle(tmp_path, monkeypatch, capsys, normalize):
    params = torchaudio.pipelines.HUBERT_ASR_LARGE._params | TORCHAUDIO_SIZE | {"aux_num_out": 4}
    state = torchaudio.models.wav2vec2_model(**params).state_dict()
    bundle = torchaudio.pipelines.Wav2Vec2ASRBundle(
        "tiny.pth", params, 16_000, normalize, "Wav2Vec2", _labels=("|", "e", "'")
    )
    monkeypatch.setattr(bundle, "_get_state_dict", lambda dl_kwargs: state)
    monkeypatch.setattr(torchaudio.pipelines, "TINY", bundle, raising=False)
    out = tmp_path / "out.pth"
    run_here(CONVERT, "--model", "torchaudio:TINY", "--out", out, "--ctc")
    assert "\nlogits " in capsys.readouterr().out
    checkpoint = load_checkpoint(out)
    assert checkpoint.extra["vocabulary"] == ["<pad>", "|", "e", "'"]
    assert checkpoint.config == describe_original("torchaudio:TINY", ctc=True)
    original = bundle.get_model()
    waveform = torch.from_numpy(waveforms()[0])[None]
    with torch.no_grad():
        torch.testing.assert_close(checkpoint.model(waveform)[0], original(waveform)[0], atol=1e-4, rtol=1e-4)
    assert "was converted with the output layer" in run_error(CONVERT, "--model", "torchaudio:TINY", "--out", out)
    monkeypatch.setattr(bundle, "_labels", ("|", "e", "'", "th"))
    bundle._params["aux_num_out"] = 5
    assert "torchaudio:TINY: 'th' (row 4) is a token" in run_error(CONVERT, "--model", "torchaudio:TINY", "--ctc")
    error = run_error(CONVERT, "--model", "torchaudio:HUBERT_BASE", "--ctc")
    assert "torchaudio:HUBERT_BASE is not fine-tuned with CTC, so it has no output layer to keep" in error


@pytest.fixture
def fairseq_file(tmp_path: Path) -> Callable[..., Path]:
    """Writes a tiny HuBERT in the layout of fairseq, fine-tuned unless it is named otherwise."""

    def write(head: dict[str, torch.Tensor], name: str = "hubert_ctc") -> Path:
        original = teacher("hubert")
        inner = {"model": {"_name": "hubert"} | model_settings(original), "task": {"normalize": False}}
        model: dict[str, Any] = inner["model"] if name == "hubert" else {"_name": name, "w2v_args": inner}
        prefix = "" if name == "hubert" else "w2v_encoder.w2v_model."
        state = {f"{prefix}{key}": tensor for key, tensor in fairseq_state(original).items()} | head
        torch.save({"cfg": {"model": model, "task": {"normalize": False}}, "model": state}, tmp_path / "x.pt")
        return tmp_path / "x.pt"

    return write


def test_fairseq_with_its_dictionary(tmp_path, fairseq_file):
    head = {"w2v_encoder.proj.weight": torch.randn(7, 24), "w2v_encoder.proj.bias": torch.randn(7)}
    path, letters, out = fairseq_file(head), tmp_path / "dict.ltr.txt", tmp_path / "out.pth"
    letters.write_text("| 94802\nE 51860\n' 7\n")
    run_here(CONVERT_FILE, "--checkpoint", path, "--out", out, "--ctc_dict", letters)
    checkpoint = load_checkpoint(out)
    assert checkpoint.extra["vocabulary"] == ["<pad>", "<s>", "</s>", "<unk>", "|", "E", "'"]
    waveform = torch.randn(1, 3000)
    run_here(CONVERT_FILE, "--checkpoint", path, "--out", tmp_path / "without.pth")
    without = load_model(tmp_path / "without.pth")
    with torch.no_grad():
        expected = torch.nn.functional.linear(without(waveform)[0], *head.values())
        torch.testing.assert_close(checkpoint.model(waveform)[0], expected)
    error = run_error(CONVERT_FILE, "--checkpoint", path, "--out", out)
    assert f"{out} was converted with the output layer of {path.name}" in error
    assert load_checkpoint(out).extra["source"] == load_checkpoint(tmp_path / "without.pth").extra["source"]


@pytest.mark.parametrize(
    ("text", "head", "name", "message"),
    [
        ("| 1\n", {}, "hubert", "x.pt: --ctc_dict {}: it has no output layer of a model fine-tuned with CTC (w2v_enc"),
        ("| 1\n", {"w2v_encoder.proj.bias": torch.ones(5)}, "hubert_ctc", "it has no output layer of a model"),
        (
            "| 1\n", {f"w2v_encoder.proj.{kind}": torch.ones(6) for kind in ("weight", "bias")}, "wav2vec_ctc",
            "--ctc_dict {}: its output layer does not fit a vocabulary of 5 symbols: w2v_encoder.proj: weight is no",
        ),
        ("the quick fox\n", {}, "hubert_ctc", "error: {}: line 1 is 'the quick fox', but must have a symbol and its"),
        (None, {}, "hubert_ctc", "error: {}: no such file"),
    ],
)  # fmt: skip
def test_fairseq_without_a_layer_for_the_dictionary(text, head, name, message, tmp_path, fairseq_file):
    letters = tmp_path / "dict.ltr.txt"
    if text is not None:
        letters.write_text(text)
    arguments = ("--checkpoint", fairseq_file(head, name), "--out", tmp_path / "out.pth", "--ctc_dict", letters)
    assert message.format(letters) in run_error(CONVERT_FILE, *arguments)
    assert not (tmp_path / "out.pth").exists()


@pytest.fixture(scope="module", params=["capitals, blank first", "small letters, blank last", "no delimiter"])
def converted(request, tmp_path_factory) -> Path:
    """A recogniser of others that writes every symbol, converted."""
    folder = tmp_path_factory.mktemp("converted")
    capitals = request.param.startswith("capitals")
    recogniser(folder / "asr", "wav2vec2 large" if capitals else "wavlm base", FACEBOOK if capitals else COMMUNITY)
    if request.param == "no delimiter":
        write_files(folder / "asr", {"vocab.json": {"e": 0, "'": 1, "\u597d": 2, "[UNK]": 3, "[PAD]": 4}})
    run_here(CONVERT, "--model", folder / "asr", "--out", folder / "model.pth", "--ctc")
    return folder / "model.pth"


def texts(path: Path) -> list[str]:
    """Of the waveforms, one at a time; special symbols are among the best."""
    checkpoint = load_checkpoint(path)
    vocabulary = checkpoint.extra["vocabulary"]
    found = []
    for waveform in waveforms()[:2]:
        with torch.no_grad():
            logits, _ = checkpoint.model(torch.from_numpy(waveform)[None])
        assert {*range(7)} == {*logits[0].argmax(-1).tolist()} or len(waveform) < 16_000
        found += greedy_decoder(vocabulary)(logits, torch.tensor([logits.shape[1]]))
    assert len(found[0]) > 3 and {*found[0]} <= {*vocabulary, " "}
    return found


@pytest.mark.usefixtures("exported_here", "short_batches")
@pytest.mark.parametrize("native", [False, True], ids=["own code", "native"])
def test_a_pipeline_of_transformers_writes_the_same(native, converted, tmp_path, monkeypatch):
    monkeypatch.setattr(verify, "BATCHES", [[0.05], [0.05, 0.4]])
    out = exported(converted, "hf", tmp_path / "hf", native=native)
    vocabulary = load_checkpoint(converted).extra["vocabulary"]
    entries = json.loads((out / "vocab.json").read_text())
    assert entries == {s: i for i, s in enumerate(vocabulary) if i == 0 or len(s) == 1}
    tokenizer = AutoTokenizer.from_pretrained(out, trust_remote_code=not native)
    assert tokenizer.get_vocab() == entries
    letter = "e" if "e" in entries else "E"
    assert tokenizer(f"{letter}'").input_ids == [entries[letter], entries["'"]]
    recognise = pipeline("automatic-speech-recognition", model=str(out), trust_remote_code=not native)
    for waveform, text in zip(waveforms(), texts(converted)):
        assert " ".join(recognise(waveform.copy())["text"].split()) == text
        pieces = recognise(waveform.copy(), return_timestamps="char")["chunks"]
        assert "".join(piece["text"] for piece in pieces).split() == text.split()


@pytest.mark.slow
def test_onnx_asr_writes_the_same(converted, tmp_path, monkeypatch):
    package = pytest.importorskip("onnx_asr", reason="requirements/export.txt")
    pytest.importorskip("onnxscript", reason="requirements/export.txt")
    monkeypatch.setattr(verify, "BATCHES", [[0.05], [0.05, 0.4], [1.0]])
    for module in (verify, onnx_asr_export):
        monkeypatch.setattr(module, "run_exported", run_exported_here)
    out = exported(converted, "onnx-asr", tmp_path / "asr")
    monkeypatch.syspath_prepend(out)
    import wav2vec2_ctc  # noqa: F401

    vocabulary = load_checkpoint(converted).extra["vocabulary"]
    lines = (out / "vocab.txt").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "<blk> 0" and len(lines) == 7
    assert [line.rpartition(" ")[0] for line in lines[1:]] == [
        "\u2581" if symbol == "|" else symbol if len(symbol) == 1 else "" for symbol in vocabulary[1:]
    ]
    assert f", {sum(len(symbol) == 1 for symbol in vocabulary)}\ncharacters" in (out / "README.md").read_text()
    model = package.load_model("wav2vec2-ctc", out)
    assert model.recognize(waveforms()[:2]) == texts(converted)


@pytest.mark.usefixtures("exported_here")
def test_a_native_folder_comes_back(converted, tmp_path, monkeypatch):
    """The same logits and vocabulary; special symbols, which its tokenizer does not know, come back without a name."""
    monkeypatch.setattr(verify, "BATCHES", [[0.05], [0.05, 0.4]])
    out = exported(converted, "hf", tmp_path / "hf", native=True)
    run_here(CONVERT, "--model", out, "--out", tmp_path / "back.pth", "--ctc")
    once, again = (load_checkpoint(path) for path in (converted, tmp_path / "back.pth"))
    assert again.extra["vocabulary"] == [
        symbol if i == 0 or len(symbol) == 1 else f"<unused{i}>" for i, symbol in enumerate(once.extra["vocabulary"])
    ]
    waveform = torch.from_numpy(waveforms()[0])[None]
    with torch.no_grad():
        assert torch.equal(again.model(waveform)[0], once.model(waveform)[0])
    assert texts(tmp_path / "back.pth") == texts(converted)


def test_a_local_folder_without_weights(tmp_path):
    recogniser(tmp_path / "asr")
    (tmp_path / "asr" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no weights; expected one of"):
        describe_original(str(tmp_path / "asr"), ctc=True)
    assert find_vocabulary(str(tmp_path / "asr")).order == [*range(7)]
