"""The model against torchaudio and transformers, layer by layer, and against itself: batched equals unbatched."""

from __future__ import annotations

import pytest
import torch
import torchaudio
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from wav2vec2 import Wav2Vec2Model, wav2vec2_model
from wav2vec2.feature_extractor import valid_frames
from wav2vec2.model import normalize
from wav2vec2.transformer import PassOptions

ARCHITECTURES = ["hubert_base", "hubert_large", "wavlm_base", "wavlm_large"]
DUMMY_WEIGHT = "feature_extractor.dummy_weight"


@pytest.fixture
def plain(tiny):
    """Tiny models as others have them: without masks and what masks leave behind."""

    def build(architecture, **changes):
        model = tiny(architecture, **changes)
        model.feature_extractor.dummy_weight.data.fill_(1.0)
        return model

    return build


def torchaudio_twin(model: Wav2Vec2Model) -> torch.nn.Module:
    """torchaudio's model of the same config and weights."""
    config, is_wavlm = model.config, "encoder_num_buckets" in model.config
    names = [
        "extractor_mode",
        "extractor_conv_layer_config",
        "extractor_conv_bias",
        "encoder_embed_dim",
        "encoder_projection_dropout",
        "encoder_pos_conv_kernel",
        "encoder_pos_conv_groups",
        "encoder_num_layers",
        "encoder_attention_dropout",
        "encoder_ff_interm_dropout",
        "encoder_dropout",
        "encoder_layer_norm_first",
        "encoder_layer_drop",
        "aux_num_out",
    ]
    same = {name: config[name] for name in names}
    interm = config["encoder_ff_interm_features"][0]
    state = {name: tensor for name, tensor in model.state_dict().items() if name != DUMMY_WEIGHT}
    if not is_wavlm:
        heads = config["encoder_num_heads"][0]
        twin = torchaudio.models.wav2vec2_model(**same, encoder_num_heads=heads, encoder_ff_interm_features=interm)
    else:
        twin = torchaudio.models.wavlm_model(
            **same,
            encoder_num_heads=config["encoder_total_num_heads"][0],
            encoder_ff_interm_features=interm,
            encoder_num_buckets=config["encoder_num_buckets"],
            encoder_max_distance=config["encoder_max_distance"],
        )
        for i in range(model.num_layers):
            block = f"encoder.transformer.layers.{i}.attention."
            for kind in ("weight", "bias"):
                parts = [state.pop(f"{block}{name}_proj.{kind}") for name in "qkv"]
                state[f"{block}attention.in_proj_{kind}"] = torch.cat(parts)
                state[f"{block}attention.out_proj.{kind}"] = state.pop(f"{block}out_proj.{kind}")
    twin.load_state_dict(state, strict=True)
    return twin.eval()


def as_released(waveforms, lengths=None):
    """What torchaudio's pipelines, fairseq and the released DPHuBERT do with each waveform before the model."""
    rows = [len(row) for row in waveforms] if lengths is None else lengths.tolist()
    normalised = [torch.nn.functional.layer_norm(row[:n], (n,)) for row, n in zip(waveforms, rows)]
    return torch.nn.utils.rnn.pad_sequence(normalised, batch_first=True)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_torchaudio_agrees_on_every_layer(plain, architecture):
    model = plain(architecture, aux_num_out=5)
    twin = torchaudio_twin(model)
    waveforms = torch.randn(2, 2003)
    inputs = as_released(waveforms) if model.normalize_waveform else waveforms
    expected, _ = twin.extract_features(inputs)
    states, frames = model.extract_features(waveforms)
    assert frames is None and len(states) == len(expected) + 1
    for state, reference in zip(states[1:], expected):
        torch.testing.assert_close(state, reference, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(model(waveforms)[0], twin(inputs)[0], atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_torchaudio_agrees_on_padded_batches(plain):
    model = plain("hubert_large")  # with group norm torchaudio's rows depend on the padding; its WavLM takes none
    lengths = torch.tensor([2000, 1234])
    waveforms = torch.randn(2, 2000) * valid_frames(lengths, 2000)
    expected, expected_frames = torchaudio_twin(model).extract_features(as_released(waveforms, lengths), lengths)
    states, frames = model.extract_features(waveforms, lengths)
    assert torch.equal(frames, expected_frames)
    for state, reference in zip(states[1:], expected):
        for row, num_frames in enumerate(frames):
            torch.testing.assert_close(state[row, :num_frames], reference[row, :num_frames], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("num_buckets, max_distance", [(320, 800), (264, 800), (32, 128), (8, 16)])
def test_every_distance_falls_in_torchaudios_bucket(tiny, num_buckets, max_distance):
    changes = {"encoder_num_buckets": num_buckets, "encoder_max_distance": max_distance}
    block = tiny("wavlm_base", **changes).encoder.transformer.layers[0].attention
    num_frames = max_distance + 50
    attention = torchaudio.models.wav2vec2.components.WavLMSelfAttention(
        16, 4, 0.0, True, True, num_buckets, max_distance
    )
    attention.rel_attn_embed.load_state_dict(block.rel_attn_embed.state_dict())
    assert torch.equal(block.position_bias(num_frames), attention.compute_bias(num_frames, num_frames))


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["hubert_base", "hubert_large"])
def test_transformers_agrees_on_every_layer(plain, architecture):
    model = plain(architecture)
    large = architecture.endswith("large")
    channels, kernels, strides = zip(*model.config["extractor_conv_layer_config"])
    config = HubertConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=24,
        feat_extract_norm="layer" if large else "group",
        conv_dim=channels,
        conv_kernel=kernels,
        conv_stride=strides,
        conv_bias=large,
        num_conv_pos_embeddings=8,
        num_conv_pos_embedding_groups=4,
        do_stable_layer_norm=large,
    )
    other = HubertModel(config).eval()
    state = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("encoder.transformer.", "encoder.").replace(
            "encoder.feature_projection", "feature_projection"
        )
        name = name.replace("weight_g", "parametrizations.weight.original0")
        state[name.replace("weight_v", "parametrizations.weight.original1")] = tensor
    del state[DUMMY_WEIGHT]
    missing, unexpected = other.load_state_dict(state, strict=False)
    assert not unexpected and missing == ["masked_spec_embed"]

    waveforms = torch.randn(2, 1999)
    inputs = as_released(waveforms) if large else waveforms
    output = other(inputs, output_hidden_states=True)
    expected = [*output.hidden_states[1:-1], output.last_hidden_state]
    states = [*model.extract_features(waveforms)[0][1:-1], model(waveforms)[0]]
    for ours, theirs in zip(states, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("units", [(), ("conv", "head", "interm")])
def test_rows_of_a_padded_batch_equal_the_rows_alone(tiny, architecture, units):
    model = tiny(architecture, units)
    lengths = torch.tensor([2400, 1777, 800, 41, 7, 0])  # 800 samples: 0.05 s; 7 and 0: not one frame
    waveforms = torch.randn(6, 2400) * valid_frames(lengths, 2400)
    states, frames = model.extract_features(waveforms, lengths)
    assert torch.equal(frames, model.output_length(lengths)) and frames.tolist()[3:] == [1, 0, 0]
    assert all(state.isfinite().all() for state in states)
    for row, (length, num_frames) in enumerate(zip(lengths[:4], frames)):
        alone, none = model.extract_features(waveforms[row : row + 1, :length])
        assert none is None and alone[0].shape == (1, num_frames, 16)
        for state, reference in zip(states, alone, strict=True):
            torch.testing.assert_close(state[row, :num_frames], reference[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("keep_maps", [False, True])  # through the fused attention, and written out
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_stay_finite_beside_an_empty_row(tiny, architecture, keep_maps):
    model = tiny(architecture, ("conv", "head", "interm")).train()
    waveforms = torch.randn(2, 1000) * torch.tensor([[1.0], [0.0]])
    output, frames = model.run(waveforms, torch.tensor([1000, 0]), PassOptions(keep_maps=keep_maps))
    assert all(state.isfinite().all() for state in output.layers)
    sum(state[0, : frames[0]].square().mean() for state in output.layers).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_frames_of_the_standard_extractor():
    with torch.device("meta"):
        model = wav2vec2_model(**published("hubert_base"))
    for length in (400, 719, 720, 800, 801, 16_000, 15_999, 250_000):
        features, _ = model.feature_extractor(torch.empty(1, length, device="meta"), None, {})
        assert model.output_length(torch.tensor([length])).item() == features.shape[1] == (length - 400) // 320 + 1
    assert model.output_length(torch.tensor([0, 9, 399])).tolist() == [0, 0, 0]


@pytest.mark.parametrize(("setting", "eps"), [(True, 1e-5), (1e-7, 1e-7)], ids=["released", "transformers"])
def test_quiet_audio_is_normalised_as_the_file_says(tiny, setting, eps):
    """Files of DPHuBERT, fairseq and torchaudio say only that it is; those made of transformers name its eps."""
    model, same = tiny("hubert_large", normalize_waveform=setting), tiny("hubert_large", normalize_waveform=False)
    same.load_state_dict(model.state_dict())
    waveform = torch.randn(1600) * 3e-3 + 1e-3  # variance 9e-6, beside which an eps of 1e-5 is as much
    if setting is True:
        expected = torch.nn.functional.layer_norm(waveform, waveform.shape)
    else:
        extractor = Wav2Vec2FeatureExtractor(feature_size=1, sampling_rate=16_000, do_normalize=True)
        expected = torch.tensor(extractor(waveform.numpy(), sampling_rate=16_000).input_values[0])
    padded, lengths = torch.nn.functional.pad(waveform, (0, 400))[None], torch.tensor([1600])
    torch.testing.assert_close(normalize(waveform[None], None, eps)[0], expected, atol=1e-5, rtol=1e-5)
    normalised = normalize(padded, lengths, eps)[0]
    torch.testing.assert_close(normalised[:1600], expected, atol=1e-5, rtol=1e-5)
    assert not normalised[1600:].any()
    reference = same.extract_features(expected[None])[0][-1]
    torch.testing.assert_close(model.extract_features(waveform[None])[0][-1], reference, atol=1e-4, rtol=1e-4)
    number_of_frames = reference.shape[1]
    batched = model.extract_features(padded, lengths)[0][-1][:, :number_of_frames]
    torch.testing.assert_close(batched, reference, atol=1e-4, rtol=1e-4)


def test_stopping_early_gives_the_first_states(tiny):
    model, waveforms = tiny("wavlm_large"), torch.randn(1, 1000)
    states, _ = model.extract_features(waveforms)
    for num_layers in range(4):
        some, _ = model.extract_features(waveforms, num_layers=num_layers)
        assert len(some) == num_layers + 1 and all(torch.equal(a, b) for a, b in zip(some, states))


def test_layer_drop_only_in_training_and_forward(tiny):
    model, waveforms = tiny("hubert_base", encoder_layer_drop=1.0), torch.randn(1, 1000)
    expected = model(waveforms)[0]
    model.train()
    torch.testing.assert_close(model.extract_features(waveforms)[0][-1], expected)
    assert (model(waveforms)[0] - expected).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("rate", ["projection_dropout", "attention_dropout", "ff_interm_dropout", "dropout"])
def test_dropout_only_in_training(tiny, rate):
    waveforms, plain = torch.randn(1, 1000), tiny("wavlm_base")
    expected = plain.extract_features(waveforms)[0][-1]
    model = tiny("wavlm_base", **{f"encoder_{rate}": 0.5})
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model.extract_features(waveforms)[0][-1], expected)
    assert (model.train().extract_features(waveforms)[0][-1] - expected).abs().max() > 0.1


def test_waveforms_of_another_shape_are_refused(tiny):
    with pytest.raises(ValueError, match=r"\[batch, samples\], got shape \(1000,\)"):
        tiny("hubert_base").extract_features(torch.randn(1000))


def published(name: str) -> dict:
    """Flat config of a published model."""
    large, wavlm = name.endswith("large"), name.startswith("wavlm")
    num_layers, width, num_heads = (24, 1024, 16) if large else (12, 768, 12)
    heads = {"encoder_num_heads": [num_heads] * num_layers, "encoder_head_dim": 64}
    if wavlm:
        heads = {
            "encoder_total_num_heads": [num_heads] * num_layers,
            "encoder_remaining_heads": [list(range(num_heads))] * num_layers,
            "encoder_num_buckets": 320,
            "encoder_max_distance": 800,
        }
    return {
        "extractor_mode": "layer_norm" if large else "group_norm",
        "extractor_conv_layer_config": [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2,
        "extractor_conv_bias": False,
        "encoder_embed_dim": width,
        "encoder_projection_dropout": 0.1,
        "encoder_pos_conv_kernel": 128,
        "encoder_pos_conv_groups": 16,
        "encoder_num_layers": num_layers,
        "encoder_use_attention": [True] * num_layers,
        "encoder_use_feed_forward": [True] * num_layers,
        **heads,
        "encoder_attention_dropout": 0.1,
        "encoder_ff_interm_features": [4 * width] * num_layers,
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.1,
        "encoder_layer_norm_first": large,
        "encoder_layer_drop": 0.05,
        "aux_num_out": None,
        "normalize_waveform": large,
    }


@pytest.mark.parametrize(
    "name, num_params", [("hubert_base", 94_370_944), ("wavlm_base", 94_381_168), ("hubert_large", 315_434_112)]
)
def test_published_parameter_counts(name, num_params):
    with torch.device("meta"):
        model = wav2vec2_model(**published(name))
    counted = {name: p.numel() for name, p in model.named_parameters()}
    assert sum(counted.values()) - counted[DUMMY_WEIGHT] == num_params
    assert model.get_num_params().item() == num_params + 512


MODEL_NAMES = """
    feature_extractor.dummy_weight
    feature_extractor.conv_layers.0.conv.weight feature_extractor.conv_layers.0.layer_norm.weight
    feature_extractor.conv_layers.0.layer_norm.bias feature_extractor.conv_layers.0.hard_concrete.log_alpha
    feature_extractor.conv_layers.1.conv.weight feature_extractor.conv_layers.1.hard_concrete.log_alpha
    feature_extractor.conv_layers.2.conv.weight feature_extractor.conv_layers.2.hard_concrete.log_alpha
    encoder.feature_projection.layer_norm.weight encoder.feature_projection.layer_norm.bias
    encoder.feature_projection.projection.weight encoder.feature_projection.projection.bias
    encoder.transformer.pos_conv_embed.conv.weight_g encoder.transformer.pos_conv_embed.conv.weight_v
    encoder.transformer.pos_conv_embed.conv.bias
    encoder.transformer.layer_norm.weight encoder.transformer.layer_norm.bias
"""
LAYER_NAMES = """
    attention.k_proj.weight attention.k_proj.bias attention.v_proj.weight attention.v_proj.bias
    attention.q_proj.weight attention.q_proj.bias attention.out_proj.weight attention.out_proj.bias
    attention.hard_concrete_for_heads.log_alpha attention.hard_concrete_for_layer.log_alpha
    layer_norm.weight layer_norm.bias
    feed_forward.intermediate_dense.weight feed_forward.intermediate_dense.bias
    feed_forward.output_dense.weight feed_forward.output_dense.bias
    feed_forward.hard_concrete_for_intermediate.log_alpha feed_forward.hard_concrete_for_layer.log_alpha
    final_layer_norm.weight final_layer_norm.bias
"""
WAVLM_NAMES = """
    attention.rel_attn_embed.weight attention.gru_rel_pos_const
    attention.gru_rel_pos_linear.weight attention.gru_rel_pos_linear.bias
"""


def test_state_names_and_config_keys_are_a_contract(tiny, tiny_config, flags):
    one_layer = {
        "encoder_num_layers": 1,
        "encoder_use_attention": [True],
        "encoder_use_feed_forward": [True],
        "encoder_ff_interm_features": [24],
    }
    prefix = "encoder.transformer.layers.0."
    hubert = tiny("hubert_base", tuple(flags), **one_layer, encoder_num_heads=[4])
    assert set(hubert.state_dict()) == {*MODEL_NAMES.split(), *(prefix + name for name in LAYER_NAMES.split())}
    heads = {"encoder_total_num_heads": [4], "encoder_remaining_heads": [[0, 1, 2, 3]]}
    model = tiny("wavlm_base", tuple(flags), **one_layer, **heads)
    added = {prefix + name for name in WAVLM_NAMES.split()}
    assert set(model.state_dict()) == set(hubert.state_dict()) | added
    # the published spelling is what SPEC fixes: conftest writes it out
    assert model.config == tiny_config("wavlm_base", tuple(flags), **one_layer, **heads)
    assert hubert.config == tiny_config("hubert_base", tuple(flags), **one_layer, encoder_num_heads=[4])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"encoder_use_attention": [True]}, "encoder_use_attention has 1 entries for 3 layers"),
        ({"extractor_mode": "batch_norm"}, "group_norm or layer_norm, got 'batch_norm'"),
        ({"extractor_conv_layer_config": [(8, 3)]}, "must list .channels, kernel, stride"),
        ({"encoder_pos_conv_groups": 3}, "no positional convolution of width 16, kernel 8 and 3 groups"),
        ({"encoder_dropout": 1.5}, "encoder_dropout must lie between 0 and 1, got 1.5"),
        ({"encoder_total_num_heads": [5] * 3}, "one divisor of the width 16"),
        ({"encoder_remaining_heads": [[0], [4], []]}, "must differ and lie below 4"),
        ({"encoder_num_buckets": 2}, "2 encoder_num_buckets do not go with an encoder_max_distance of 40"),
        ({"encoder_max_distance": None}, "encoder_max_distance: missing"),
    ],
)
def test_impossible_configs_are_refused(tiny_config, change, message):
    with pytest.raises(ValueError, match=message):
        wav2vec2_model(**{**tiny_config("wavlm_base"), **change})
