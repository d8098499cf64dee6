"""Import HuBERT, wav2vec 2.0, WavLM, UniSpeech and UniSpeech-SAT from transformers.

Plain config and state dicts in, nothing but torch needed.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from wav2vec2.checkpoint import CheckpointError

from .mapping import (
    DATA2VEC_POSITIONS,
    MASK_EMBEDDING,
    ImportedModel,
    Rule,
    flat_config,
    heads_rule,
    import_tensors,
    require_architecture,
)

MODEL_TYPES = ("hubert", "unispeech", "unispeech-sat", "wav2vec2", "wavlm")
REFUSED = {  # model_type and reason
    "compressed_speech": "a model of this toolkit, which needs no conversion",
    "data2vec-audio": DATA2VEC_POSITIONS,
    "mimi": "a codec of 24 kHz audio",
    "moonshine": "rotary positions, and a decoder",
    "sew": "frames squeezed before the Transformer and spread after it",
    "sew-d": "frames squeezed before the Transformer, and attention as in DeBERTa",
    "speech-encoder-decoder": "a decoder too; save its encoder alone (model.encoder.save_pretrained) and convert that",
    "wav2vec2-bert": "conformer layers on filter banks",
    "wav2vec2-conformer": "conformer layers",
    "whisper": "spectrograms as input, and a decoder",
}
EXTRACTOR_MODES = {"group": "group_norm", "layer": "layer_norm"}
NORMALIZE_EPS = 1e-7  # added to the variance of a waveform by transformers' feature extractor

_TRANSFORMER = "encoder.transformer"
_RULES: list[Rule] = [
    (r"masked_spec_embed", MASK_EMBEDDING),
    (r"(feature_extractor\.conv_layers\.\d+\.(conv|layer_norm)\.(weight|bias))", r"\1"),
    (r"(feature_projection\.(layer_norm|projection)\.(weight|bias))", r"encoder.\1"),
    (r"encoder\.pos_conv_embed\.conv\.(weight_g|weight_v|bias)", rf"{_TRANSFORMER}.pos_conv_embed.conv.\1"),
    (r"encoder\.(layer_norm\.(weight|bias))", rf"{_TRANSFORMER}.\1"),
    (
        r"encoder\.(layers\.\d+\.(attention\.[qkv]_proj|attention\.out_proj|layer_norm|final_layer_norm"
        r"|feed_forward\.intermediate_dense|feed_forward\.output_dense)\.(weight|bias))",
        rf"{_TRANSFORMER}.\1",
    ),
    (
        r"encoder\.(layers\.\d+\.attention\.(rel_attn_embed\.weight|gru_rel_pos_const|gru_rel_pos_linear\.(weight|bias)))",
        rf"{_TRANSFORMER}.\1",
    ),
    heads_rule("feature_extractor", "feature_projection", "masked_spec_embed", "encoder"),
]

SETTINGS = {
    "embed_dim": "hidden_size", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
    "ff_interm_features": "intermediate_size", "extractor_conv_bias": "conv_bias",
    "encoder_projection_dropout": "feat_proj_dropout", "encoder_pos_conv_kernel": "num_conv_pos_embeddings",
    "encoder_pos_conv_groups": "num_conv_pos_embedding_groups", "encoder_attention_dropout": "attention_dropout",
    "encoder_ff_interm_dropout": "activation_dropout", "encoder_dropout": "hidden_dropout",
    "encoder_layer_norm_first": "do_stable_layer_norm", "encoder_layer_drop": "layerdrop",
}  # fmt: skip
# The published config of hubert-base-ls960 and the dropouts of its released conversion, which training builds on.
_HUBERT_BASE = {
    "model_type": "hubert",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "feat_proj_dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "hidden_dropout": 0.1,
    "layerdrop": 0.1,
}
_HUBERT_BASE_RELEASED = {"encoder_ff_interm_dropout": 0.0, "encoder_layer_drop": 0.05}


def check_model_type(config: Mapping[str, Any]) -> str:
    """The ``model_type`` of a transformers config.

    Raises:
        CheckpointError: an architecture that is not of this family; lists the valid ones.
    """
    model_type = config.get("model_type")
    require_architecture("model_type", model_type, MODEL_TYPES, REFUSED)
    return str(model_type)


def import_huggingface(
    config: Mapping[str, Any], state_dict: Mapping[str, Tensor], normalize_waveform: bool | None = None
) -> ImportedModel:
    """Import a model of transformers, fine-tuned ones too (their heads are dropped).

    Args:
        config: all keys of its config (``config.to_dict()``).
        state_dict: its tensors, with or without the prefix of a fine-tuned model, either spelling of weight norm.
        normalize_waveform: None for what fairseq trained with: only models with a layer-norm extractor have it. The
            constant in it is that of transformers.

    Raises:
        CheckpointError: another architecture, an option that changes the function, or a tensor of unknown name inside
            the backbone.
    """
    model_type = check_model_type(config)
    _refuse_options(config)
    extractor = str(_get(config, "feat_extract_norm"))
    if extractor not in EXTRACTOR_MODES:
        raise CheckpointError(f"feat_extract_norm {extractor!r} is not supported; valid: {', '.join(EXTRACTOR_MODES)}")
    if normalize_waveform is None:
        normalize_waveform = extractor == "layer"
    flat = flat_config(
        conv_layers=zip(*(_get(config, f"conv_{size}") for size in ("dim", "kernel", "stride")), strict=True),
        buckets=(_get(config, "num_buckets"), _get(config, "max_bucket_distance")) if model_type == "wavlm" else None,
        extractor_mode=EXTRACTOR_MODES[extractor],
        normalize_waveform=NORMALIZE_EPS if normalize_waveform else False,
        **{ours: _get(config, theirs) for ours, theirs in SETTINGS.items()},
    )
    if all(config.get(key) == value for key, value in _HUBERT_BASE.items()):
        flat |= _HUBERT_BASE_RELEASED
    if model_type == "hubert" and config.get("feat_proj_layer_norm") is False:  # the other classes do not look at it
        flat["encoder_projection_layer_norm"] = False
    backbone, heads = _split_heads(state_dict, f"{model_type.replace('-', '_')}.")
    return import_tensors(backbone, _RULES, flat, heads)


def _split_heads(state_dict: Mapping[str, Tensor], prefix: str) -> tuple[dict[str, Tensor], list[str]]:
    """In a model with a head the backbone has a prefix, and what has none is the head."""
    state_dict = {str(name): tensor for name, tensor in state_dict.items()}
    if not any(name.startswith(prefix) for name in state_dict):
        return state_dict, []
    backbone = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
    return backbone, [name for name in state_dict if not name.startswith(prefix)]


def _refuse_options(config: Mapping[str, Any]) -> None:
    """Refuse the options of transformers that change the function and that no model here has."""
    only = {
        "hidden_act": "gelu",
        "feat_extract_activation": "gelu",
        "layer_norm_eps": 1e-5,
        "conv_pos_batch_norm": False,
        "adapter_attn_dim": None,
    }
    for key, value in only.items():
        if config.get(key, value) != value:
            raise CheckpointError(f"{key}={config[key]!r} in its config is not supported; only {value!r} is")


def _get(config: Mapping[str, Any], key: str) -> Any:
    if key not in config:
        raise CheckpointError(f"its config has no {key!r}")
    return config[key]
