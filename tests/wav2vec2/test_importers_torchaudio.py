"""torchaudio's own models, the peer whose names and conventions the model here follows."""

import pytest
import torch
import torchaudio
from torchaudio.models import wav2vec2_model, wavlm_model

from wav2vec2.checkpoint import CheckpointError, model_from_state
from wav2vec2.importers import import_torchaudio
from wav2vec2.importers.torchaudio import DEFAULT_CONV_LAYERS
from wav2vec2.model import wav2vec2_model as our_model

TINY = {
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": [(16, 10, 5), (20, 3, 2), (20, 2, 2)],
    "extractor_conv_bias": False,
    "encoder_embed_dim": 24,
    "encoder_projection_dropout": 0.1,
    "encoder_pos_conv_kernel": 16,
    "encoder_pos_conv_groups": 4,
    "encoder_num_layers": 3,
    "encoder_num_heads": 3,
    "encoder_attention_dropout": 0.1,
    "encoder_ff_interm_features": 36,
    "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.1,
    "encoder_layer_norm_first": False,
    "encoder_layer_drop": 0.05,
    "aux_num_out": None,
}
LARGE = {"extractor_mode": "layer_norm", "extractor_conv_bias": True, "encoder_layer_norm_first": True}
WAVLM = {"encoder_num_buckets": 16, "encoder_max_distance": 30}
KINDS = {
    "base": (wav2vec2_model, {}),
    "large": (wav2vec2_model, LARGE),
    "fine-tuned": (wav2vec2_model, {"aux_num_out": 5}),
    "wavlm base": (wavlm_model, WAVLM),
    "wavlm large": (wavlm_model, WAVLM | LARGE),
}


def tiny(kind: str):
    build, options = KINDS[kind]
    config = TINY | options
    torch.manual_seed(0)
    model = build(**config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + name.endswith("norm.weight"))
    return model, config


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_agrees(kind: str) -> None:
    original, config = tiny(kind)
    found = import_torchaudio(config, original.state_dict(), normalize_waveform=False)
    assert found.dropped == (["aux.weight", "aux.bias"] if kind == "fine-tuned" else [])
    model = model_from_state(found.config, found.state_dict, source="test")
    waveforms = torch.randn(2, 2400)
    with torch.no_grad():
        expected, _ = original.extract_features(waveforms)
        original.aux = None
        last, _ = original(waveforms)
        hidden, _ = model.extract_features(waveforms)
        output, _ = model(waveforms)
        projected, _ = original.encoder._preprocess(original.feature_extractor(waveforms, None)[0])
    for ours, theirs in zip([*hidden, output], [projected, *expected, last], strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_padded_batch_agrees_where_torchaudio_masks_it() -> None:
    original, config = tiny("large")
    found = import_torchaudio(config, original.state_dict(), normalize_waveform=False)
    model = model_from_state(found.config, found.state_dict, source="test")
    lengths = torch.tensor([2400, 1555])
    waveforms = torch.randn(2, 2400)
    waveforms[1, 1555:] = 0
    with torch.no_grad():
        expected, frames = original.extract_features(waveforms, lengths)
        hidden, ours = model.extract_features(waveforms, lengths)
    assert ours.tolist() == frames.tolist()
    for a, b in zip(hidden[1:], expected, strict=True):
        for row, length in enumerate(frames):
            torch.testing.assert_close(a[row, :length], b[row, :length], atol=2e-5, rtol=1e-5)


BUNDLES = {
    "WAV2VEC2_BASE": torchaudio.models.wav2vec2_base,
    "HUBERT_BASE": torchaudio.models.hubert_base,
    "HUBERT_LARGE": torchaudio.models.hubert_large,
    "HUBERT_XLARGE": torchaudio.models.hubert_xlarge,
    "WAV2VEC2_XLSR_1B": torchaudio.models.wav2vec2_xlsr_1b,
    "WAVLM_BASE": torchaudio.models.wavlm_base,
    "WAVLM_LARGE": torchaudio.models.wavlm_large,
}


@pytest.mark.parametrize("name", BUNDLES)
def test_published_sizes_have_the_same_tensors(name: str) -> None:
    bundle = getattr(torchaudio.pipelines, name)
    with torch.device("meta"):
        original = BUNDLES[name]()
        found = import_torchaudio(bundle._params, original.state_dict(), bundle._normalize_waveform)
        expected = our_model(**found.config).state_dict()
    del expected["feature_extractor.dummy_weight"]
    assert {key: t.shape for key, t in found.state_dict.items()} == {key: t.shape for key, t in expected.items()}
    assert sum(t.numel() for t in expected.values()) == sum(p.numel() for p in original.parameters())
    assert found.config["normalize_waveform"] == (
        name in ("HUBERT_LARGE", "HUBERT_XLARGE", "WAVLM_LARGE", "WAV2VEC2_XLSR_1B")
    )


def test_missing_builder_arguments_and_unknown_tensors() -> None:
    original, config = tiny("base")
    default = import_torchaudio(config | {"extractor_conv_layer_config": None}, {}, normalize_waveform=True).config
    assert default["extractor_conv_layer_config"] == DEFAULT_CONV_LAYERS and default["normalize_waveform"]
    with pytest.raises(CheckpointError, match=r"'mask_generator\.mask_embedding'"):
        import_torchaudio(config, {"mask_generator.mask_embedding": torch.ones(1)}, normalize_waveform=False)
    del config["encoder_dropout"]
    with pytest.raises(CheckpointError, match="lacks 'encoder_dropout'"):
        import_torchaudio(config, original.state_dict(), normalize_waveform=False)
