"""What transformers does with an exported folder: loading, outputs, training, saving."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCTC,
    AutoProcessor,
    Trainer,
    TrainingArguments,
    pipeline,
)

from distillation.errors import UserError
from exporting import verify
from exporting.huggingface import remote_code
from exporting.verify import ExportedOutputs, require_agreement
from tests.configs import first_layers
from tests.exports import LARGE, MAP_REUSE, exported, make, transformers_folder, waveforms
from wav2vec2 import load_model, save_model


def same_states(model: Any, hf_folder: Path) -> None:
    """A transformers model gives what load_model of the folder's source gives, padded rows included."""
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


def test_the_file_that_is_loaded_names_all_others():
    """Of a local folder transformers 4 copies no more than what the loaded file itself imports."""
    code = remote_code()
    named = set(re.findall(r"from \.(\w+) import", code["modeling_compressed_speech.py"]))
    assert {f"{name}.py" for name in named} | {"modeling_compressed_speech.py"} == code.keys()


def test_outputs_of_the_transformers_model(hf_folder):
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


def test_trainer_fits_the_ctc_head(hf_folder, tmp_path):
    pytest.importorskip("accelerate")
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
    model = AutoModelForCTC.from_pretrained(ctc_folder, trust_remote_code=True, ctc_loss_reduction="sum")
    rows, labels = [torch.from_numpy(w) for w in waveforms()[:2]], [[2, 3, 4], [1]]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.arange(16_000)[None] < torch.tensor([[16_000], [7_000]])
    together = model(padded, mask.long(), torch.tensor([[2, 3, 4], [1, -100, -100]])).loss
    alone = sum(model(row[None], labels=torch.tensor([label])).loss for row, label in zip(rows, labels))
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-3)
    other = model(padded, mask.long(), torch.tensor([[2, 3, 4], [-1, 1, -2]])).loss
    assert torch.equal(other, together)  # every negative label is padding, as in transformers' own classes
    with pytest.raises(ValueError, match="fewer than 400 samples have no frame to transcribe"):
        model(padded[:, :300], labels=torch.tensor([[2], [1]]))


def test_auto_processor_reads_the_folder(ctc_folder):
    processor = AutoProcessor.from_pretrained(ctc_folder, trust_remote_code=True)
    card = (ctc_folder / "README.md").read_text()
    assert 'AutoProcessor.from_pretrained("ctc_hf", trust_remote_code=True)' in card
    assert processor(waveforms(), sampling_rate=16_000, padding=True).input_values.shape == (3, 16_000)
    assert processor.batch_decode(torch.tensor([[2, 0, 2, 1, 3, 3, 0]])) == ["AA B"]


def test_model_card(tiny_config, hf_folder, tmp_path, exported_here, short_batches):
    card = (hf_folder / "README.md").read_text()
    assert "## Results" not in card and 'from_pretrained("pruned_hf"' in card
    assert 'pipeline("feature-extraction", model="pruned_hf", trust_remote_code=True)' in card
    assert f"{sum(p.numel() for p in load_model(hf_folder).parameters()):,} parameters" in card
    cost = {"num_params": 12345, "macs_10s": 2.5e9, "speed": [{"device": "cpu", "real_time_factor": 0.0123}]}
    models = [{"name": "teacher", "cost": cost, "held_out": {"loss": -0.5}}, {"name": "x", "cost": cost}]
    make(tmp_path / "final" / "final.pth", tiny_config)
    (tmp_path / "report.json").write_text(json.dumps({"models": models, "held_out_data": "4 utterances"}))
    card = (exported(tmp_path / "final" / "final.pth", "hf", tmp_path / "out") / "README.md").read_text()
    assert "| teacher | 12,345 | 2.50 G | 0.0123 | -0.500 |" in card and "Held out: 4 utterances." in card


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


@pytest.fixture(scope="module")
def native_twin(tmp_path_factory, tiny_config, modules_cache) -> tuple[Path, Path]:
    """One model that ignores padding in both forms: with its own code, and as transformers' own class."""
    folder = tmp_path_factory.mktemp("twin")
    changes = {**first_layers({**tiny_config, **LARGE}, 2), "normalize_waveform": False, "encoder_layer_drop": 0.0}
    path = make(folder / "model.pth", changes)
    model = load_model(path)
    model.feature_extractor.dummy_weight.data.fill_(1.0)
    save_model(path, model)
    return transformers_folder(path, folder / "own"), transformers_folder(path, folder / "native", native=True)


def batch(hf_folder: Path, rows: list[np.ndarray]) -> Any:
    extractor = AutoFeatureExtractor.from_pretrained(hf_folder)
    return extractor(rows, sampling_rate=16_000, padding=True, return_tensors="pt")


def test_frames_of_samples_as_in_transformers_own_class(native_twin):
    own, theirs = (AutoModel.from_pretrained(folder, trust_remote_code=True) for folder in native_twin)
    lengths = torch.arange(400, 2_000, 7)
    frames = own._get_feat_extract_output_lengths(lengths)
    assert torch.equal(frames, theirs._get_feat_extract_output_lengths(lengths))
    assert [own._get_feat_extract_output_lengths(n) for n in (16_000, 399)] == [49, 0]
    mask = batch(native_twin[0], waveforms()).attention_mask
    valid = own._get_feature_vector_attention_mask(49, mask)
    assert valid.dtype == torch.bool and torch.equal(valid, theirs._get_feature_vector_attention_mask(49, mask))


def test_attention_maps_as_in_transformers_own_class(native_twin, hf_folder):
    inputs = batch(native_twin[0], waveforms())
    own = AutoModel.from_pretrained(native_twin[0], trust_remote_code=True, output_attentions=True)
    theirs = AutoModel.from_pretrained(native_twin[1], attn_implementation="eager")
    with torch.no_grad():
        found, expected = own(**inputs), theirs(**inputs, output_attentions=True)
    assert len(found.attentions) == len(expected.attentions) == 2
    for maps, reference in zip(found.attentions, expected.attentions):
        for row, frames in enumerate((49, 21, 2)):
            torch.testing.assert_close(maps[row, :, :frames], reference[row, :, :frames], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(own(**inputs, output_attentions=False).last_hidden_state, found.last_hidden_state)
    assert own(**inputs, output_attentions=False).attentions is None
    pruned = AutoModel.from_pretrained(hf_folder, trust_remote_code=True)
    maps = pruned(**inputs, output_attentions=True).attentions
    heads = [n if block else 0 for n, block in zip(*(pruned.config.model_config[f"encoder_{name}"]
             for name in ("num_heads", "use_attention")))]  # fmt: skip
    assert [list(one.shape) for one in maps] == [[3, n, 49, 49] for n in heads] and 0 in heads
    assert all(torch.allclose(one.sum(-1), torch.tensor(1.0)) for one in maps)


def test_reused_maps_at_the_reduced_rate(tiny_config, tmp_path, modules_cache):
    changes = {**first_layers({**tiny_config, **MAP_REUSE}, 2), "encoder_time_reduction": 2}
    folder = transformers_folder(make(tmp_path / "model.pth", changes), tmp_path / "out")
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    first, second = model(torch.randn(1, 16_000), output_attentions=True).attentions
    assert first.shape == (1, 4, 24, 24) and torch.equal(first, second)


def test_any_mask_of_samples_is_taken_and_no_other(hf_folder):
    model = AutoModel.from_pretrained(hf_folder, trust_remote_code=True)
    inputs = batch(hf_folder, waveforms()[:2])
    expected = model(**inputs).last_hidden_state
    for dtype in (torch.bool, torch.int64, torch.float32):
        mask = inputs.attention_mask.to(dtype)
        assert torch.equal(model(inputs.input_values, mask).last_hidden_state, expected)
    with pytest.raises(ValueError, match=r"attention_mask \[2, 49\] must have the shape of input_values \[2, 16000\]"):
        model(inputs.input_values, torch.ones(2, 49))
    with pytest.raises(ValueError, match="padding before samples; pad on the right"):
        model(inputs.input_values.flip(-1), inputs.attention_mask.flip(-1))
    with pytest.raises(TypeError, match="mask_time_indices"):
        model(inputs.input_values, mask_time_indices=torch.ones(2, 49, dtype=torch.bool))


def test_labels_outside_of_the_vocabulary(ctc_folder):
    model = AutoModelForCTC.from_pretrained(ctc_folder, trust_remote_code=True)
    with pytest.raises(ValueError, match="labels: 5 is not in the vocabulary of 5"):
        model(torch.randn(1, 4_000), labels=torch.tensor([[1, 5]]))


def test_classes_as_of_transformers_own_class(native_twin, tmp_path):
    torch.manual_seed(0)
    options = {"num_labels": 3, "classifier_proj_size": 7, "trust_remote_code": True}
    own, theirs = (AutoModelForAudioClassification.from_pretrained(folder, **options) for folder in native_twin)
    head = {name: tensor for name, tensor in own.state_dict().items() if name.startswith(("projector", "classifier"))}
    assert len(head) == 4 and not theirs.load_state_dict(head, strict=False).unexpected_keys
    inputs = batch(native_twin[0], waveforms())
    for labels in (None, torch.tensor([2, 0, 1])):
        found, expected = own(**inputs, labels=labels), theirs(**inputs, labels=labels)
        torch.testing.assert_close(found.logits, expected.logits)
        assert labels is None or torch.isclose(found.loss, expected.loss)
    own.save_pretrained(tmp_path / "classes")
    again = AutoModelForAudioClassification.from_pretrained(tmp_path / "classes", trust_remote_code=True)
    assert torch.equal(again(**inputs).logits, found.logits)
    backbone, before = (load_model(folder).state_dict() for folder in (tmp_path / "classes", native_twin[0]))
    assert all(torch.equal(backbone[name], before[name]) for name in before) and len(backbone) == len(before)
    with pytest.raises(ValueError, match="fewer than 400 samples has no frame to classify"):
        own(torch.randn(2, 300))


def test_labels_that_are_no_classes(hf_folder):
    options = {"num_labels": 3, "trust_remote_code": True}
    model, rows = AutoModelForAudioClassification.from_pretrained(hf_folder, **options), torch.randn(2, 800)
    for labels in ([[0.0, 1.0, 0.0]] * 2, [0.5, 1.0], [[0, 1, 0]] * 2):
        with pytest.raises(ValueError, match=r"labels \[2.* must be the number of a class per row, \[2\]"):
            model(rows, labels=torch.tensor(labels))
    for label in (3, -1):
        with pytest.raises(ValueError, match=f"labels: {label} is none of the 3 classes"):
            model(rows, labels=torch.tensor([0, label]))
    assert torch.equal(model(rows, labels=torch.tensor([1, -100])).loss, model(rows[:1], labels=torch.tensor([1])).loss)
    model.config.problem_type = "regression"
    with pytest.raises(ValueError, match=r"problem_type 'regression'.*'single_label_classification'"):
        model(rows, labels=torch.tensor([0, 1]))


def test_classes_of_a_weighted_mean_of_all_states(ctc_folder, tmp_path):
    options = {"num_labels": 3, "use_weighted_layer_sum": True, "trust_remote_code": True}
    model = AutoModelForAudioClassification.from_pretrained(ctc_folder, **options)
    assert torch.equal(model.layer_weights, torch.full((5,), 0.2))
    model.layer_weights.data = torch.randn(5)
    row = torch.from_numpy(waveforms()[1])[None]
    states, _ = load_model(ctc_folder).extract_features(row)
    mean = torch.einsum("l,lbtd->btd", model.layer_weights.softmax(-1), torch.stack(states)).mean(1)
    expected = model.classifier(model.projector(mean))
    inputs = batch(ctc_folder, [waveforms()[1], waveforms()[0]])
    torch.testing.assert_close(model(**inputs).logits[:1], expected, atol=1e-5, rtol=1e-4)
    assert model(row).hidden_states is None and len(model(row, output_hidden_states=True).hidden_states) == 5
    model.save_pretrained(tmp_path / "classes")
    again = AutoModelForAudioClassification.from_pretrained(tmp_path / "classes", trust_remote_code=True)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("changes", [{}, MAP_REUSE], ids=["plain", "reused maps"])
def test_gradient_checkpointing_saves_memory_and_changes_no_gradient(changes, tiny_config, tmp_path, modules_cache):
    """Under dropout and LayerDrop, whose draws are the same."""
    names = ("dropout", "attention_dropout", "ff_interm_dropout", "projection_dropout", "layer_drop")
    path = make(tmp_path / "model.pth", tiny_config, **{f"encoder_{name}": 0.3 for name in names} | changes)
    folder = transformers_folder(path, tmp_path / "out")
    options = {"trust_remote_code": True, "final_dropout": 0.3}
    model = AutoModelForCTC.from_pretrained(folder, **options).train()
    model.freeze_feature_encoder()  # its activations are kept in any case
    rows, labels = torch.randn(2, 16_000), torch.tensor([[2, 3, 4], [1, -100, -100]])

    def gradients() -> tuple[dict[str, torch.Tensor], int]:
        kept = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        torch.manual_seed(1)
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(rows, labels=labels).loss
        num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
        loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, num_bytes

    expected, whole = gradients()
    model.gradient_checkpointing_enable()
    found, part = gradients()
    assert found.keys() == expected.keys() and len(found) > 50
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert part < 0.5 * whole
    model.gradient_checkpointing_disable()
    assert gradients()[1] == whole


@pytest.mark.parametrize("head", ["CTC", "AudioClassification"])
def test_trainer_averages_over_accumulated_batches(head, hf_folder, tmp_path):
    """Two equal batches per update move the weights as one does, with and without gradient checkpointing."""
    pytest.importorskip("accelerate")
    auto = {"CTC": AutoModelForCTC, "AudioClassification": AutoModelForAudioClassification}[head]
    labels = torch.tensor([2, 3] if head == "CTC" else 1)
    data = [{"input_values": torch.from_numpy(waveforms()[1]), "labels": labels}] * 2
    updated = []
    for count in (1, 2):
        torch.manual_seed(0)
        model = auto.from_pretrained(hf_folder, trust_remote_code=True, vocab_size=5, final_dropout=0.0)
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for layer in model.base_model.backbone.encoder.transformer.layers:
            if layer.attention is not None:
                layer.attention.dropout = 0.0
        model.base_model.backbone.encoder.transformer.layer_drop = 0.0
        arguments = TrainingArguments(
            str(tmp_path), max_steps=1, learning_rate=0.1, optim="sgd", max_grad_norm=0.0, lr_scheduler_type="constant",
            per_device_train_batch_size=1, gradient_accumulation_steps=count, gradient_checkpointing=count == 2,
            report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        before = [parameter.detach().clone() for parameter in model.parameters()]
        Trainer(model, arguments, train_dataset=data).train()
        assert model.base_model.gradient_checkpointing == (count == 2)
        updated.append([new.detach() - old for new, old in zip(model.parameters(), before)])
    assert max(step.abs().max() for step in updated[0]) > 1e-3
    for once, twice in zip(*updated):
        torch.testing.assert_close(twice, once, atol=1e-6, rtol=1e-4)


def test_trainer_fits_the_classes(hf_folder, tmp_path):
    """The base weights are those of the folder, the head is new, and both are trained."""
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    labels = {"id2label": {0: "high", 1: "low"}, "label2id": {"high": 0, "low": 1}}
    model, report = AutoModelForAudioClassification.from_pretrained(
        hf_folder, trust_remote_code=True, output_loading_info=True, classifier_proj_size=16, **labels
    )
    head = ("projector", "classifier")
    assert set(report["missing_keys"]) == {f"{name}.{kind}" for name in head for kind in ("weight", "bias")}
    assert not report["unexpected_keys"]
    random = np.random.default_rng(0)
    rows = [random.standard_normal(n).astype(np.float32) for n in (4_000, 3_000, 5_000, 2_000)]
    rows[1::2] = [np.convolve(row, np.ones(20) / 20, "same").astype(np.float32) for row in rows[1::2]]

    def collate(indices: list[int]) -> dict:
        return {**batch(hf_folder, [rows[i] for i in indices]), "labels": torch.tensor([i % 2 for i in indices])}

    arguments = TrainingArguments(
        str(tmp_path), max_steps=30, learning_rate=5e-3, per_device_train_batch_size=4, logging_steps=1, report_to=[],
        use_cpu=True, save_strategy="no", remove_unused_columns=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=[0, 1, 2, 3], eval_dataset=[0, 1, 2, 3], data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert np.mean(losses[-5:]) < 0.5 * np.mean(losses[:5])
    assert trainer.predict([0, 1, 2, 3]).predictions.argmax(-1).tolist() == [0, 1, 0, 1]
    trainer.save_model(str(tmp_path / "tuned"))
    shutil.copy(hf_folder / "preprocessor_config.json", tmp_path / "tuned")
    classify = pipeline("audio-classification", model=str(tmp_path / "tuned"), trust_remote_code=True)
    assert [found[0]["label"] for found in classify(rows, batch_size=2)] == ["high", "low"] * 2
