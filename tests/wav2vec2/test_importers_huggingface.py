"""Tiny transformers models with random weights import with the same hidden states in every layer."""

import functools
import re

import pytest
import torch
from transformers import (
    HubertConfig,
    HubertForCTC,
    HubertModel,
    PreTrainedModel,
    UniSpeechConfig,
    UniSpeechForCTC,
    UniSpeechForPreTraining,
    UniSpeechForSequenceClassification,
    UniSpeechModel,
    UniSpeechSatConfig,
    UniSpeechSatForCTC,
    UniSpeechSatForPreTraining,
    UniSpeechSatForSequenceClassification,
    UniSpeechSatForXVector,
    UniSpeechSatModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForPreTraining,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from tests.helpers import HF_BASE, HF_LARGE, tiny_hf
from wav2vec2.checkpoint import CheckpointError, model_from_state
from wav2vec2.importers import import_huggingface
from wav2vec2.importers.huggingface import MODEL_TYPES, NORMALIZE_EPS, REFUSED

KINDS = {
    "hubert base": (HubertModel, HubertConfig, HF_BASE),
    "hubert large": (HubertModel, HubertConfig, HF_LARGE),
    "hubert group norm with bias": (HubertModel, HubertConfig, HF_BASE | {"conv_bias": True}),
    "hubert odd positional kernel": (HubertModel, HubertConfig, HF_BASE | {"num_conv_pos_embeddings": 15}),
    "hubert without norm before the projection": (HubertModel, HubertConfig, HF_BASE | {"feat_proj_layer_norm": False}),
    "wav2vec2 base": (Wav2Vec2Model, Wav2Vec2Config, HF_BASE),
    "wav2vec2 xls-r": (Wav2Vec2Model, Wav2Vec2Config, HF_LARGE | {"num_hidden_layers": 5, "intermediate_size": 48}),
    "wav2vec2 layer norm without bias, post-norm": (
        Wav2Vec2Model,
        Wav2Vec2Config,
        {"feat_extract_norm": "layer", "do_stable_layer_norm": False, "conv_bias": False},
    ),
    # Few buckets and a short distance, so that the logarithmic and the last bucket are in use.
    "wavlm base": (WavLMModel, WavLMConfig, HF_BASE | {"num_buckets": 16, "max_bucket_distance": 30}),
    "wavlm large": (WavLMModel, WavLMConfig, HF_LARGE | {"num_buckets": 16, "max_bucket_distance": 30}),
    "unispeech base": (UniSpeechModel, UniSpeechConfig, HF_BASE),
    "unispeech large": (UniSpeechModel, UniSpeechConfig, HF_LARGE),
    "unispeech-sat base": (UniSpeechSatModel, UniSpeechSatConfig, HF_BASE),
    "unispeech-sat large": (UniSpeechSatModel, UniSpeechSatConfig, HF_LARGE | {"conv_bias": False}),
}


tiny = functools.partial(
    tiny_hf, num_hidden_layers=3, num_codevectors_per_group=4, codevector_dim=8, proj_codevector_dim=8
)


def imported(model: PreTrainedModel, state: dict | None = None, **kwargs: object):
    found = import_huggingface(model.config.to_dict(), model.state_dict() if state is None else state, **kwargs)
    return found, model_from_state(found.config, found.state_dict, source="test")


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_agrees_with_transformers(kind: str) -> None:
    model_class, config_class, options = KINDS[kind]
    original = tiny(model_class, config_class, **options)
    _, model = imported(original, normalize_waveform=False)
    lengths = torch.tensor([2400, 1555])
    waveforms = torch.randn(2, 2400)
    waveforms[1, 1555:] = 0
    with torch.no_grad():
        hidden, frames = model.extract_features(waveforms, lengths)
        output, _ = model(waveforms, lengths)
        if options["feat_extract_norm"] == "layer":
            mask = (torch.arange(2400) < lengths[:, None]).long()
            batch = original(waveforms, attention_mask=mask, output_hidden_states=True)
            rows = [(batch.hidden_states, batch.last_hidden_state, i) for i in range(2)]
        else:  # transformers' group norm lets padding into the statistics: run each row alone
            alone = [original(w[None, :n], output_hidden_states=True) for w, n in zip(waveforms, lengths, strict=True)]
            rows = [(result.hidden_states, result.last_hidden_state, 0) for result in alone]
        projected = [
            original.feature_projection(original.feature_extractor(w[None, :n]).transpose(1, 2))
            for w, n in zip(waveforms, lengths, strict=True)
        ]
    assert len(hidden) == original.config.num_hidden_layers + 1
    for row, (states, last, index) in enumerate(rows):
        n = int(frames[row])
        reference = projected[row][0] if isinstance(projected[row], tuple) else projected[row]
        torch.testing.assert_close(hidden[0][row, :n], reference[0], atol=2e-5, rtol=1e-5)
        for layer in range(1, len(hidden)):
            torch.testing.assert_close(hidden[layer][row, :n], states[layer][index, :n], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(output[row, :n], last[index, :n], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("spelling", ["parametrizations", "weight_g"])
def test_both_spellings_of_weight_norm(spelling: str) -> None:
    original = tiny(HubertModel, HubertConfig, **HF_BASE)
    state = dict(original.state_dict())
    if spelling == "weight_g":
        stem = "encoder.pos_conv_embed.conv."
        state[stem + "weight_g"] = state.pop(stem + "parametrizations.weight.original0")
        state[stem + "weight_v"] = state.pop(stem + "parametrizations.weight.original1")
    _, model = imported(original, state)
    expected = original.encoder.pos_conv_embed.conv.parametrizations.weight.original1
    assert torch.equal(model.encoder.transformer.pos_conv_embed.conv.weight_v, expected)


def test_half_precision_becomes_float32() -> None:
    original = tiny(HubertModel, HubertConfig, **HF_BASE).half()
    found, model = imported(original)
    assert {tensor.dtype for tensor in found.state_dict.values()} == {torch.float32}
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("model_class", "config_class", "heads"),
    [
        (HubertForCTC, HubertConfig, {"lm_head.weight", "lm_head.bias"}),
        (Wav2Vec2ForPreTraining, Wav2Vec2Config, {"quantizer.codevectors", "project_hid.weight", "project_q.bias"}),
        (UniSpeechForCTC, UniSpeechConfig, {"lm_head.weight"}),
        (UniSpeechForPreTraining, UniSpeechConfig, {"ctc_proj.weight", "quantizer.codevectors", "project_q.bias"}),
        (UniSpeechForSequenceClassification, UniSpeechConfig, {"classifier.bias"}),
        (UniSpeechSatForCTC, UniSpeechSatConfig, {"lm_head.weight"}),
        (
            UniSpeechSatForPreTraining,
            UniSpeechSatConfig,
            {"speaker_proj.weight", "label_embeddings_concat", "layer_norm_for_extract.weight"},
        ),
        (UniSpeechSatForSequenceClassification, UniSpeechSatConfig, {"projector.weight"}),
        (UniSpeechSatForXVector, UniSpeechSatConfig, {"tdnn.0.kernel.weight", "objective.weight"}),
    ],
)
def test_heads_are_dropped_by_name_and_the_mask_embedding_kept(model_class, config_class, heads) -> None:
    original = tiny(model_class, config_class, **HF_BASE)
    found, _ = imported(original)
    backbone = original.base_model
    assert heads <= set(found.dropped)
    assert len(found.dropped) + len(found.state_dict) + 1 == len(original.state_dict())
    assert torch.equal(found.mask_embedding, backbone.masked_spec_embed)


def test_every_tensor_is_used_exactly_once() -> None:
    original = tiny(WavLMModel, WavLMConfig, **HF_BASE)
    state = dict(original.state_dict())
    with pytest.raises(CheckpointError, match=r"'encoder\.layers\.0\.attention\.k_proj\.wieght'"):
        imported(original, state | {"encoder.layers.0.attention.k_proj.wieght": torch.ones(1)})
    with pytest.raises(CheckpointError, match="are the same tensor"):
        imported(original, state | {"encoder.pos_conv_embed.conv.weight_g": torch.ones(1)})
    del state["encoder.layers.1.attention.gru_rel_pos_const"]
    with pytest.raises(CheckpointError, match=r"layers\.1\.attention\.gru_rel_pos_const"):
        imported(original, state)
    with pytest.raises(CheckpointError, match="floating-point"):
        imported(original, state | {"encoder.layer_norm.weight": torch.ones(24, dtype=torch.int64)})


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"model_type": "dac"}, "model_type 'dac' is not supported; valid: hubert, unispeech, unispeech-sat, wav2vec2"),
        ({"model_type": None}, "model_type None is not supported; valid: hubert"),
        ({"model_type": ["hubert"]}, "model_type ['hubert'] is not supported; valid: hubert"),
        (
            {"model_type": "data2vec-audio"},
            "data2vec-audio: five positional convolutions with layer norms, which models here have not; valid: hubert",
        ),
        ({"hidden_act": "relu"}, "hidden_act='relu'"),
        ({"conv_pos_batch_norm": True}, "conv_pos_batch_norm=True"),
        ({"adapter_attn_dim": 16}, "adapter_attn_dim=16"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps=1e-06"),
        ({"feat_extract_norm": "batch"}, "'batch' is not supported; valid: group, layer"),
        ({"num_attention_heads": 7}, "7 attention heads do not divide the width 768"),
    ],
)
def test_other_architectures_and_options_are_refused(option: dict, message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        import_huggingface(HubertConfig().to_dict() | option, {})
    assert message in str(error.value)


def test_reasons_are_of_architectures_that_transformers_has() -> None:
    """A name with a typing mistake would never be met."""
    known = {*CONFIG_MAPPING_NAMES, "compressed_speech"}
    assert known >= {*REFUSED, *MODEL_TYPES} and not REFUSED.keys() & set(MODEL_TYPES)
    for name, reason in REFUSED.items():
        with pytest.raises(CheckpointError, match=f"^model_type {name}: {re.escape(reason)}; valid: hubert, "):
            import_huggingface({"model_type": name}, {})


def test_config_follows_the_source() -> None:
    options = {"feat_proj_dropout": 0.1, "attention_dropout": 0.2, "activation_dropout": 0.3, "hidden_dropout": 0.4}
    config = Wav2Vec2Config(**options, layerdrop=0.5, hidden_size=1280, num_hidden_layers=48, num_attention_heads=16)
    flat = import_huggingface(config.to_dict(), {}).config
    assert flat["encoder_head_dim"] == 80 and flat["encoder_num_heads"] == [16] * 48
    names = ("projection_dropout", "attention_dropout", "ff_interm_dropout", "dropout", "layer_drop")
    assert [flat[f"encoder_{name}"] for name in names] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert flat["normalize_waveform"] is False and flat["aux_num_out"] is None
    large = config.to_dict() | {"feat_extract_norm": "layer"}
    assert import_huggingface(large, {}).config["normalize_waveform"] == NORMALIZE_EPS
    assert import_huggingface(large, {}, False).config["normalize_waveform"] is False


@pytest.mark.parametrize("level", [1.0, 1e-3, 1e-5])
def test_the_waveform_is_normalised_as_by_transformers(level: float) -> None:
    """Down to where nearly nothing is there, which is not the same with the constant of fairseq."""
    original = tiny(HubertModel, HubertConfig, **HF_LARGE)
    found, model = imported(original)
    prepare = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    waveforms = [level * torch.randn(2400), level * torch.randn(1555)]
    inputs = prepare([w.numpy() for w in waveforms], sampling_rate=16_000, padding=True, return_tensors="pt")
    padded, lengths = torch.nn.utils.rnn.pad_sequence(waveforms, batch_first=True), torch.tensor([2400, 1555])
    with torch.no_grad():
        expected = original(**inputs).last_hidden_state
        output, frames = model(padded, lengths)
        fairseq = model_from_state(found.config | {"normalize_waveform": True}, found.state_dict, "test")(
            padded, lengths
        )
    for row, num_frames in enumerate(frames.tolist()):
        torch.testing.assert_close(output[row, :num_frames], expected[row, :num_frames], atol=5e-5, rtol=1e-5)
    if level < 1:
        assert (fairseq[0] - output).abs().max() > 1e-3


def test_only_hubert_may_lack_the_norm_before_the_projection() -> None:
    """The other classes have it whatever their config says."""
    original = tiny(Wav2Vec2Model, Wav2Vec2Config, **HF_BASE)
    found = import_huggingface(original.config.to_dict() | {"feat_proj_layer_norm": False}, original.state_dict())
    assert "encoder_projection_layer_norm" not in found.config


def test_a_head_of_unknown_name_is_dropped_by_name() -> None:
    """ContentVec has its backbone without prefix beside ``final_proj``; what a head holds does not matter."""
    original = tiny(HubertModel, HubertConfig, **HF_BASE)
    head = {
        "final_proj.weight": torch.zeros(16, 24),
        "final_proj.bias": [1, 2],
        "vocabulary.size": torch.tensor(7),
        5: 0,
    }
    found, model = imported(original, original.state_dict() | head)
    assert found.dropped == [str(name) for name in head]
    assert model.state_dict().keys() == imported(original)[1].state_dict().keys()


@pytest.mark.parametrize(
    "name",
    ["encoder.layers.0.adapter.weight", "encoder.adapter.bias", "feature_projection.gate", "masked_spec_embed.x"],
)
def test_a_tensor_of_unknown_name_inside_the_backbone_is_refused(name: str) -> None:
    original = tiny(HubertModel, HubertConfig, **HF_BASE)
    with pytest.raises(CheckpointError, match=f"'{name}' belongs to no known part"):
        imported(original, original.state_dict() | {name: torch.ones(1)})


def test_a_misspelt_backbone_is_no_head() -> None:
    original = tiny(HubertModel, HubertConfig, **HF_BASE)
    state = original.state_dict()
    with pytest.raises(CheckpointError, match=r"none of its \d+ tensors belongs to the model; the first is 'model\."):
        imported(original, {f"model.{name}": tensor for name, tensor in state.items()})
    with pytest.raises(CheckpointError, match=r"do not fit its config: 3 missing \(encoder.feature_projection"):
        imported(original, {name.replace("projection.projection", "x.y"): tensor for name, tensor in state.items()})


def test_hubert_base_has_the_dropouts_of_its_released_conversion() -> None:
    published = {"feat_proj_dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1, "hidden_dropout": 0.1}
    flat = import_huggingface(HubertConfig(**published, layerdrop=0.1).to_dict(), {}).config
    names = ("projection_dropout", "attention_dropout", "ff_interm_dropout", "dropout", "layer_drop")
    assert [flat[f"encoder_{name}"] for name in names] == [0.1, 0.1, 0.0, 0.1, 0.05]
