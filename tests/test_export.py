"""Exports: each kind of student in each format against PyTorch, and what transformers does with a folder."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import export
from distillation.errors import UserError
from exporting import verify
from exporting.huggingface import remote_code
from exporting.source import ExportOptions
from exporting.verify import ExportedOutputs, make_batches, require_agreement
from tests.configs import first_layers
from tests.helpers import ROOT, run_exported_here
from wav2vec2 import Wav2Vec2Model, load_model, save_model, wav2vec2_model

WAVLM = {
    "encoder_num_heads": None,
    "encoder_head_dim": None,
    "encoder_total_num_heads": [4] * 4,
    "encoder_remaining_heads": [[0, 1, 2, 3]] * 4,
    "encoder_num_buckets": 32,
    "encoder_max_distance": 80,
}
MASKS = {
    "extractor_prune_conv_channels": True,
    "encoder_prune_attention_heads": True,
    "encoder_prune_feed_forward_intermediate": True,
    "encoder_prune_attention_layer": True,
    "encoder_prune_feed_forward_layer": True,
}
THIN = {"extractor_conv_layer_config": [(8, 10, 5), (12, 1, 1), *[(12, 3, 2)] * 4, (24, 1, 1), *[(24, 2, 2)] * 2],
        "encoder_use_projection": False}  # fmt: skip
MAP_REUSE = {"encoder_reuse_attention": [False, True] * 2, "encoder_layer_drop": 0.0}
LARGE = {"extractor_mode": "layer_norm", "encoder_layer_norm_first": True, "normalize_waveform": True}
KINDS: dict[str, dict[str, Any]] = {
    "DPHuBERT": MASKS,
    "DPWavLM": {**WAVLM, **MASKS},
    "DPHuBERT of Large": {**LARGE, **MASKS},
    "ARMHuBERT": {**THIN, **MAP_REUSE},
    "FitHuBERT": {**THIN, "encoder_time_reduction": 2},
}
# all that is special about students and WavLM in one model
EVERYTHING = {**WAVLM, **MASKS, **THIN, **MAP_REUSE, "encoder_time_reduction": 2}
ALL_BATCHES = verify.BATCHES
VOCABULARY = ["<pad>", "|", "A", "B", "C"]
needs_onnx = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxscript", "onnxruntime")),
    reason="requirements/export.txt",
)


def make(path: Path, tiny_config: dict, **changes: Any) -> Path:
    """A random model; masks leave about half of it."""
    torch.manual_seed(0)
    model = wav2vec2_model(**{**tiny_config, **changes})
    for name, parameter in model.named_parameters():
        if not name.endswith("log_alpha"):
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    for mask in model.masks().values():
        torch.nn.init.normal_(mask.log_alpha, 0.0, 2.0)
    extra = {"vocabulary": VOCABULARY} if model.aux is not None else {}
    save_model(path, model, **extra)
    return path


def exported(model: Path, to: str, out: Path, last: bool = False, int8: bool = False) -> Path:
    export.run(model, to, out, ExportOptions(last, "int8" if int8 else None))
    return out


def transformers_folder(model: Path, out: Path) -> Path:
    """A folder for transformers, checked as the fixture ``exported_here`` does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "run_exported", run_exported_here)
        return exported(model, "hf", out)


@pytest.fixture(scope="module")
def short_batches():
    """Exports are checked on short audio alone, where the test is about something else."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "BATCHES", [[0.05], [0.05, 0.4]])
        yield


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory, tiny_config, modules_cache, short_batches) -> Path:
    """A pruned model for transformers."""
    folder = tmp_path_factory.mktemp("hf")
    return transformers_folder(make(folder / "model.pth", tiny_config, **MASKS), folder / "pruned_hf")


@pytest.fixture(scope="module")
def ctc_folder(tmp_path_factory, tiny_config, modules_cache, short_batches) -> Path:
    """A fine-tuned model for transformers, beside its .pth."""
    folder = tmp_path_factory.mktemp("ctc")
    changes = {**LARGE, "aux_num_out": len(VOCABULARY), "encoder_layer_drop": 0.0}
    return transformers_folder(make(folder / "model.pth", tiny_config, **changes), folder / "ctc_hf")


def waveforms() -> list[np.ndarray]:
    random = np.random.default_rng(1)
    return [random.standard_normal(n).astype(np.float32) for n in (16_000, 7_000, 900)]


def same_states(model: Any, hf_folder: Path) -> None:
    """A transformers model gives what load_model of the folder's source gives, padded rows included."""
    from transformers import AutoFeatureExtractor

    ours = load_model(hf_folder.with_name("model.pth"))
    extractor = AutoFeatureExtractor.from_pretrained(hf_folder)
    inputs = extractor(waveforms(), sampling_rate=16_000, padding=True, return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
    for row, waveform in enumerate(waveforms()):
        expected, _ = ours.extract_features(torch.from_numpy(waveform)[None])
        assert len(outputs.hidden_states) == len(expected)
        for state, alone in zip(outputs.hidden_states, expected, strict=True):
            torch.testing.assert_close(state[row, : alone.shape[1]], alone[0], atol=2e-5, rtol=1e-4)


def test_auto_model_round_trip(hf_folder, tmp_path):
    from transformers import AutoConfig, AutoModel

    model = AutoModel.from_pretrained(hf_folder, trust_remote_code=True)
    assert not model.training
    same_states(model, hf_folder)
    model.save_pretrained(tmp_path / "again")
    shutil.copy(hf_folder / "preprocessor_config.json", tmp_path / "again")
    same_states(AutoModel.from_pretrained(tmp_path / "again", trust_remote_code=True), hf_folder)
    config = AutoConfig.from_pretrained(tmp_path / "again", trust_remote_code=True)
    assert config.model_config["encoder_num_heads"] == load_model(hf_folder).config["encoder_num_heads"]
    assert (config.hidden_size, config.num_hidden_layers, config.inputs_to_logits_ratio) == (24, 4, 320)
    code = {path.name for path in hf_folder.glob("*.py")}
    assert code == {path.name for path in (tmp_path / "again").glob("*.py")} == set(remote_code())


def test_outputs_of_the_transformers_model(hf_folder):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(hf_folder, trust_remote_code=True)
    waveform = torch.randn(1, 4000)
    outputs = model(waveform)
    assert outputs.hidden_states is None and outputs.last_hidden_state.shape == (1, 12, 24)
    assert torch.equal(model(waveform, return_dict=False)[0], outputs.last_hidden_state)
    model.freeze_feature_encoder()
    frozen = {name.split(".")[1] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"feature_extractor"}


def test_load_model_reads_the_folder(hf_folder, ctc_folder):
    for folder in (hf_folder, ctc_folder):
        ours, theirs = load_model(folder), load_model(folder.with_name("model.pth"))
        waveform = torch.randn(1, 4000)
        assert torch.equal(ours(waveform)[0], theirs(waveform)[0])
    assert ours.aux is not None


def test_feature_extraction_pipeline(hf_folder):
    from transformers import pipeline

    pipe = pipeline("feature-extraction", model=str(hf_folder), trust_remote_code=True)
    expected = load_model(hf_folder)(torch.from_numpy(waveforms()[0])[None])[0]
    torch.testing.assert_close(pipe(waveforms()[0], return_tensors=True), expected, atol=1e-5, rtol=1e-5)
    nested = pipe([{"array": waveforms()[0], "sampling_rate": 16_000}, waveforms()[1]])
    assert np.asarray(nested[0]).shape == (1, 49, 24) and np.asarray(nested[1]).shape == (1, 21, 24)
    with pytest.raises(ValueError, match="8000"):
        pipe({"array": waveforms()[0], "sampling_rate": 8_000})


def test_speech_recognition_pipeline(ctc_folder):
    from transformers import pipeline

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


def test_trainer_fits_the_ctc_head(hf_folder, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import AutoFeatureExtractor, AutoModelForCTC, Trainer, TrainingArguments

    torch.manual_seed(0)
    model = AutoModelForCTC.from_pretrained(hf_folder, trust_remote_code=True, vocab_size=5)
    backbone = load_model(hf_folder).state_dict()
    own = model.base_model.backbone.state_dict()
    own = {n.replace("parametrizations.weight.original0", "weight_g"): tensor for n, tensor in own.items()}
    own = {n.replace("parametrizations.weight.original1", "weight_v"): tensor for n, tensor in own.items()}
    assert own.keys() == backbone.keys() and all(torch.equal(own[name], backbone[name]) for name in own)
    extractor = AutoFeatureExtractor.from_pretrained(hf_folder)
    labels = [[2, 3, 4], [3, 1], [4, 4, 2, 2]]
    data = [{"audio": w, "labels": row} for w, row in zip([*waveforms()[:2], waveforms()[0][::-1].copy()], labels)]

    def collate(rows: list[dict]) -> dict:
        batch = extractor([r["audio"] for r in rows], sampling_rate=16_000, padding=True, return_tensors="pt")
        longest = max(len(r["labels"]) for r in rows)
        batch["labels"] = torch.tensor([r["labels"] + [-100] * (longest - len(r["labels"])) for r in rows])
        return batch

    arguments = TrainingArguments(
        str(tmp_path), max_steps=30, learning_rate=3e-3, per_device_train_batch_size=3, logging_steps=1,
        report_to=[], use_cpu=True, save_strategy="no", remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=data, data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    trainer.save_model(str(tmp_path / "tuned"))
    tuned = AutoModelForCTC.from_pretrained(tmp_path / "tuned", trust_remote_code=True)
    batch = collate(data)
    with torch.no_grad():
        loss = tuned(**batch).loss
    torch.testing.assert_close(loss, model.eval()(**batch).loss.detach(), atol=1e-4, rtol=1e-4)
    moved = load_model(tmp_path / "tuned").state_dict()
    changed = {name for name in backbone if not torch.equal(backbone[name], moved[name])}
    assert "feature_extractor.dummy_weight" not in changed and len(changed) > 0.7 * len(backbone)


def test_ctc_loss_of_padded_rows_is_that_of_each_alone(ctc_folder):
    from transformers import AutoModelForCTC

    model = AutoModelForCTC.from_pretrained(ctc_folder, trust_remote_code=True, ctc_loss_reduction="sum")
    rows, labels = [torch.from_numpy(w) for w in waveforms()[:2]], [[2, 3, 4], [1]]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(16_000)[None] < torch.tensor([[16_000], [7_000]])
    together = model(padded, mask.long(), torch.tensor([[2, 3, 4], [1, -100, -100]])).loss
    alone = sum(model(row[None], labels=torch.tensor([label])).loss for row, label in zip(rows, labels))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-3)


def test_model_card(tiny_config, hf_folder, tmp_path, exported_here, short_batches):
    card = (hf_folder / "README.md").read_text()
    assert "## Results" not in card and 'from_pretrained("pruned_hf"' in card
    assert f"{sum(p.numel() for p in load_model(hf_folder).parameters()):,} parameters" in card
    cost = {"num_params": 12345, "macs_10s": 2.5e9, "speed": [{"device": "cpu", "real_time_factor": 0.0123}]}
    models = [{"name": "teacher", "cost": cost, "held_out": {"loss": -0.5}}, {"name": "x", "cost": cost}]
    make(tmp_path / "final" / "final.pth", tiny_config)
    (tmp_path / "report.json").write_text(json.dumps({"models": models, "held_out_data": "4 utterances"}))
    card = (exported(tmp_path / "final" / "final.pth", "hf", tmp_path / "out") / "README.md").read_text()
    assert "| teacher | 12,345 | 2.50 G | 0.0123 | -0.500 |" in card and "Held out: 4 utterances." in card


@pytest.mark.slow
@needs_onnx
def test_everything_at_once(trace_once, exported_here, tiny_config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(verify, "BATCHES", ALL_BATCHES)
    model = make(tmp_path / "model.pth", first_layers({**tiny_config, **EVERYTHING}, 2), aux_num_out=5)
    for to in ("torch-export", "onnx", "hf"):
        exported(model, to, tmp_path / f"out{export.FORMATS[to].suffix}", last=to != "hf")
        printed = float(capsys.readouterr().out.split("PyTorch ")[1].split()[0])
        assert 0 <= printed <= 1e-4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.pth", "out.hf", "out.onnx", "out.pt2"]


@needs_onnx
@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_in_every_format(trace_once, exported_here, kind, tiny_config, tmp_path, monkeypatch):
    """On long audio where it is not part of everything at once."""
    batches = ALL_BATCHES if "Large" in kind else [batch for batch in ALL_BATCHES if max(batch) < 10]
    monkeypatch.setattr(verify, "BATCHES", batches)
    model = make(tmp_path / "model.pth", first_layers({**tiny_config, **KINDS[kind]}, 2))
    for to in ("torch-export", "onnx", "hf"):
        exported(model, to, tmp_path / f"out{export.FORMATS[to].suffix}")


@pytest.mark.slow
@needs_onnx
def test_large_values_are_compared_as_float32_rounds_them(tiny_config, tmp_path, short_batches, capsys):
    """Inner layers of large pre-norm models reach thousands, where two orders of one sum differ by more than 1e-4."""
    path = make(tmp_path / "model.pth", first_layers({**tiny_config, **LARGE}, 1))
    model = load_model(path)
    model.encoder.transformer.layers[0].feed_forward.output_dense.weight.data *= 1e4
    save_model(path, model)
    assert exported(path, "onnx", tmp_path / "model.onnx").is_file()
    assert float(capsys.readouterr().out.split()[4]) > 1e-4


@pytest.mark.slow
@needs_onnx
def test_int8_is_smaller_close_and_names_its_difference(tiny_config, tmp_path, capsys, short_batches):
    # wide enough for the linear layers to be most of the file
    wide = {"encoder_embed_dim": 96, "encoder_head_dim": 24, "encoder_ff_interm_features": [1024] * 4}
    model = make(tmp_path / "model.pth", first_layers({**tiny_config, **wide}, 2))
    out = exported(model, "onnx", tmp_path / "model.int8.onnx", int8=True)
    printed = float(capsys.readouterr().out.split("PyTorch ")[1].split()[0])
    assert 1e-4 < printed < 1.0
    assert out.stat().st_size < 0.6 * model.stat().st_size
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.int8.onnx", "model.pth"]


def test_safetensors(tiny_config, tmp_path):
    model = make(tmp_path / "model.pth", tiny_config, **KINDS["DPWavLM"])
    export.run(model, "safetensors", None, ExportOptions())
    waveform = torch.randn(1, 4000)
    ours, theirs = load_model(tmp_path / "model.safetensors"), load_model(model)
    assert not ours.masks() and theirs.masks()
    torch.testing.assert_close(ours(waveform)[0], theirs(waveform)[0], atol=1e-5, rtol=1e-5)


def test_what_differs_is_not_kept(hf_folder, exported_here, tiny_config, tmp_path, monkeypatch):
    model = load_model(hf_folder)
    model.encoder.transformer.layers[-1].final_layer_norm.bias.data[0] += 2e-2
    outputs = ExportedOutputs(model, last=False)
    with pytest.raises(UserError, match=r"differs from PyTorch by 2.0e-02, more than 0.0001 \(of a layer.*; not kept"):
        require_agreement(outputs, "transformers", hf_folder)
    monkeypatch.setattr(verify, "TOLERANCE", -1.0)
    monkeypatch.setattr(verify, "BATCHES", [[0.05]])
    path = make(tmp_path / "model.pth", first_layers(tiny_config, 1))
    with pytest.raises(UserError, match="not kept"):
        exported(path, "hf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_batches_cover_the_promised_lengths(monkeypatch):
    assert min(map(min, ALL_BATCHES)) == 0.05 and max(map(max, ALL_BATCHES)) == 35.0
    monkeypatch.setattr(verify, "BATCHES", ALL_BATCHES)
    for (batch, lengths), seconds in zip(make_batches(), ALL_BATCHES, strict=True):
        assert lengths.tolist() == [round(16_000 * s) for s in seconds] and batch.shape == (len(lengths), max(lengths))
        assert all(not row[n:].any() and row[:n].all() for row, n in zip(batch, lengths))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--to", "hf", "--quantize", "int8"], "--quantize int8: only with --to onnx"),
        (["--to", "safetensors", "--last"], "--last: only with --to onnx or torch-export"),
        (["--to", "onnx", "--out", "x.bin"], "--out x.bin: its name must end in .onnx"),
        (["--to", "tflite"], "tflite"),
        (["--to", "hf", "--report", "nowhere.json"], "nowhere.json: no report of report.py"),
        (["--to", "hf", "--out", "tests"], "--out tests: exists; name a new folder"),
    ],
)
def test_mistakes_on_the_command_line(flags, message, teacher_path, script_error, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert message in script_error("export.py", teacher_path, *flags)


def test_an_output_layer_without_vocabulary(tiny_config, tmp_path):
    model: Wav2Vec2Model = wav2vec2_model(**{**tiny_config, "aux_num_out": 5})
    save_model(tmp_path / "model.pth", model)
    with pytest.raises(UserError, match="an output layer but no vocabulary for it; fine-tune with"):
        exported(tmp_path / "model.pth", "hf", tmp_path / "out")
