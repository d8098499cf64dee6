"""Exports to transformers' own classes: round trips of every kind, what is refused, and what padding does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoFeatureExtractor,
    HubertConfig,
    HubertForCTC,
    HubertModel,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMForCTC,
    WavLMModel,
    pipeline,
)

import export
from distillation.errors import UserError
from exporting import verify
from exporting.source import ExportOptions
from exporting.verify import make_batches
from tests.configs import first_layers
from tests.helpers import HF_BASE, HF_LARGE, assert_same_tensors, tiny_hf
from wav2vec2 import load_model, save_model, wav2vec2_model
from wav2vec2.checkpoint import load_checkpoint, model_from_state
from wav2vec2.importers import import_huggingface

BUCKETS = {"num_buckets": 16, "max_bucket_distance": 30}
DISTILHUBERT = HF_BASE | {"feat_proj_layer_norm": False}
KINDS = {
    "hubert base": (HubertModel, HubertConfig, HF_BASE),
    "hubert large": (HubertModel, HubertConfig, HF_LARGE),
    "hubert odd positional kernel, conv bias": (
        HubertModel, HubertConfig, HF_BASE | {"num_conv_pos_embeddings": 15, "conv_bias": True},
    ),
    "wav2vec2 base": (Wav2Vec2Model, Wav2Vec2Config, HF_BASE),
    "wav2vec2 xls-r": (Wav2Vec2Model, Wav2Vec2Config, HF_LARGE),
    "wavlm base": (WavLMModel, WavLMConfig, HF_BASE | BUCKETS),
    "wavlm large": (WavLMModel, WavLMConfig, HF_LARGE | BUCKETS),
    "distilhubert": (HubertModel, HubertConfig, DISTILHUBERT),
}  # fmt: skip
WAVLM = {
    "encoder_num_heads": None,
    "encoder_head_dim": None,
    "encoder_total_num_heads": [4] * 2,
    "encoder_remaining_heads": [[0, 1, 2, 3]] * 2,
    "encoder_num_buckets": 32,
    "encoder_max_distance": 80,
}
LARGE = {"extractor_mode": "layer_norm", "encoder_layer_norm_first": True, "normalize_waveform": 1e-7}
VOCABULARY = ["<pad>", "|", "A", "B", "C"]


@pytest.fixture(autouse=True)
def short_batches(monkeypatch, exported_here):
    """Exports are checked in this process and on short audio."""
    monkeypatch.setattr(verify, "BATCHES", [[0.05], [0.05, 0.4]])


def native(model: Path, out: Path) -> Path:
    export.run(model, "hf", out, ExportOptions(native=True))
    return out


def make(path: Path, tiny_config: dict, **changes: Any) -> Path:
    """A random model of two layers."""
    torch.manual_seed(0)
    model = wav2vec2_model(**{**first_layers(tiny_config, 2), **changes})
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    save_model(path, model, **({"vocabulary": VOCABULARY} if model.aux is not None else {}))
    return path


def convert(original: PreTrainedModel, path: Path) -> Path:
    found = import_huggingface(original.config.to_dict(), original.state_dict())
    save_model(path, model_from_state(found.config, found.state_dict, path), mask_embedding=found.mask_embedding)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_the_round_trip_gives_the_same_model(kind, tmp_path):
    model_class, config_class, options = KINDS[kind]
    original = tiny_hf(model_class, config_class, **options)
    original.save_pretrained(tmp_path / "original")
    out = native(convert(original, tmp_path / "model.pth"), tmp_path / "out")
    assert_same_tensors(*(load_file(folder / "model.safetensors") for folder in (tmp_path / "original", out)))
    # wav2vec 2.0 comes back as HuBERT, which computes the same
    back_class = WavLMModel if model_class is WavLMModel else HubertModel
    back, report = back_class.from_pretrained(out, output_loading_info=True)
    assert not any(report.values())
    waveform = torch.randn(1, 4000)
    with torch.no_grad():
        assert torch.equal(back(waveform).last_hidden_state, original(waveform).last_hidden_state)
    extractor = AutoFeatureExtractor.from_pretrained(out)
    assert extractor.do_normalize is (options["feat_extract_norm"] == "layer")
    convert(back, tmp_path / "again.pth")
    once, again = (load_checkpoint(tmp_path / name) for name in ("model.pth", "again.pth"))
    assert once.config == again.config
    assert_same_tensors(*({**c.model.state_dict(), "mask": c.extra["mask_embedding"]} for c in (once, again)))


@pytest.mark.slow
def test_in_a_fresh_process(tiny_config, tmp_path, monkeypatch):
    monkeypatch.undo()  # of what stands in for the process
    monkeypatch.setattr(verify, "BATCHES", [[0.05], [0.05, 0.4]])
    native(make(tmp_path / "model.pth", tiny_config, **LARGE, aux_num_out=5), tmp_path / "out")


@pytest.mark.parametrize(
    "changes", [{}, LARGE, WAVLM, {**WAVLM, **LARGE}], ids=["Base", "Large", "WavLM", "WavLM Large"]
)
def test_fine_tuned(changes, tiny_config, tmp_path):
    path = make(tmp_path / "model.pth", tiny_config, **changes, aux_num_out=5)
    out = native(path, tmp_path / "out")
    model = (WavLMForCTC if "encoder_num_buckets" in changes else HubertForCTC).from_pretrained(out)
    assert (model.config.pad_token_id, model.config.ctc_zero_infinity) == (0, True)
    recognise = pipeline("automatic-speech-recognition", model=str(out))
    waveform = np.random.default_rng(1).standard_normal(16_000).astype(np.float32)
    ids = load_model(path)(torch.from_numpy(waveform)[None])[0][0].argmax(-1).unique_consecutive().tolist()
    expected = "".join(VOCABULARY[i] for i in ids if i != 0).replace("|", " ")
    assert recognise(waveform)["text"].split() == expected.split() != []


def test_without_a_mask_embedding_nothing_is_drawn(tiny_config, tmp_path):
    out = native(make(tmp_path / "model.pth", tiny_config), tmp_path / "out")
    model, report = HubertModel.from_pretrained(out, output_loading_info=True)
    assert not any(report.values()) and not hasattr(model, "masked_spec_embed")
    model.train()(torch.randn(1, 16_000))


def test_pruned_alike(tiny_config, tmp_path):
    """Channels may differ per layer, units not; the mask embedding stays."""
    masks = {"extractor_prune_conv_channels": True, "encoder_prune_feed_forward_intermediate": True}
    path = make(tmp_path / "model.pth", tiny_config, **masks)
    model = load_model(path)
    for i, mask in enumerate(model.masks().values()):
        mask.log_alpha.data.fill_(30.0)
        mask.log_alpha.data[: 1 + i if mask.log_alpha.numel() == 12 else 15] = -30.0
    save_model(path, model, mask_embedding=torch.arange(24.0))
    back = HubertModel.from_pretrained(native(path, tmp_path / "out"))
    assert tuple(back.config.conv_dim) == (11, 10, 9, 8, 7, 6, 5) and back.config.intermediate_size == 25
    assert torch.equal(back.masked_spec_embed.data, torch.arange(24.0))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"encoder_time_reduction": 2}, "time reduction"),
        ({"encoder_reuse_attention": [False, True], "encoder_layer_drop": 0.0}, "reuse of attention maps"),
        (
            {"extractor_conv_layer_config": [(8, 10, 5), (24, 3, 2)], "encoder_use_projection": False},
            "models without a feature projection",
        ),
        (
            {**WAVLM, "encoder_projection_layer_norm": False},
            "WavLM without a layer norm before the feature projection",
        ),
        ({"encoder_use_attention": [True, False]}, "layers without an attention or a feed-forward block"),
        ({"encoder_num_heads": [3, 3]}, "layers without some of their heads"),
        ({**WAVLM, "encoder_remaining_heads": [[0, 1, 2, 3], [0, 1, 3]]}, "layers without some of their heads"),
        ({"encoder_ff_interm_features": [40, 39]}, "feed-forward units that differ per layer"),
        ({"normalize_waveform": True}, "waveform normalisation with an eps of 1e-05, only 1e-07"),
    ],
)  # fmt: skip
def test_what_transformers_lacks_is_refused(changes, what, tiny_config, tmp_path):
    path = make(tmp_path / "model.pth", tiny_config, **changes)
    with pytest.raises(UserError) as error:
        native(path, tmp_path / "out")
    assert (
        str(error.value)
        == f"{path}: --native: transformers has no {what}; without the flag the folder brings its own code"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_factors_of_channels_are_refused(tiny_config, tmp_path):
    path = make(tmp_path / "model.pth", tiny_config)
    model = load_model(path)
    model.feature_extractor.dummy_weight.data[3] = 0.9
    save_model(path, model)
    with pytest.raises(UserError, match="dummy_weight"):
        native(path, tmp_path / "out")


def test_padding_is_compared_where_the_class_is_exact(tiny_config, tmp_path, capsys, monkeypatch):
    """Group norm takes padding in: such a model is run one row at a time, and the command and the card say so."""
    seen = []
    run = verify.run_exported
    monkeypatch.setattr(verify, "run_exported", lambda *a: seen.append([n.tolist() for _, n in a[2]]) or run(*a))
    group, layer = (make(tmp_path / f"{i}.pth", tiny_config, **changes) for i, changes in enumerate(({}, LARGE)))
    cards = [(native(path, path.with_suffix(".hf")) / "README.md").read_text() for path in (group, layer)]
    assert seen == [[[800], [6400]], [[800], [800, 6400]]]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("0.hf (HubertModel of transformers; exact only without padding)")
    assert lines[1].endswith("1.hf (HubertModel of transformers)")
    assert not any("trust_remote_code" in card or "its own" in card for card in cards)
    assert "One waveform at a time" in cards[0] and "padding=True" not in cards[0]
    assert "`attention_mask` matters" in cards[1] and "padding=True" in cards[1]
    with monkeypatch.context() as patch:  # what the comparison would have found
        patch.setattr("exporting.huggingface.padding_changes", lambda model: False)
        with pytest.raises(UserError, match="differs from PyTorch"):
            native(group, tmp_path / "padded")


def test_rows_alone_have_every_duration_once(monkeypatch):
    monkeypatch.setattr(verify, "BATCHES", [[0.05], [0.05, 0.4], [0.3]])
    assert [(w.shape, n.tolist()) for w, n in make_batches(padded=False)] == [
        *(((1, 800), [800]), ((1, 6400), [6400]), ((1, 4800), [4800]))
    ]


def test_only_with_hf(script_error, teacher_path):
    assert "--native: only with --to hf" in script_error("export.py", teacher_path, "--to", "onnx", "--native")
