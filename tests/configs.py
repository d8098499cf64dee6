"""The flat config of the tiny HuBERT that most tests run on."""

from typing import Any

from wav2vec2.architecture import HUBERT_BASE

TINY = HUBERT_BASE | {
    "extractor_conv_layer_config": [(12, 10, 5), *[(12, 3, 2)] * 4, *[(12, 2, 2)] * 2],
    "encoder_embed_dim": 24,
    "encoder_pos_conv_kernel": 8,
    "encoder_pos_conv_groups": 4,
    "encoder_num_layers": 4,
    "encoder_use_attention": [True] * 4,
    "encoder_use_feed_forward": [True] * 4,
    "encoder_num_heads": [4] * 4,
    "encoder_head_dim": 6,
    "encoder_ff_interm_features": [40] * 4,
}


def first_layers(config: dict[str, Any], count: int) -> dict[str, Any]:
    """The config with its first layers alone."""
    cut = {k: v[:count] for k, v in config.items() if k.startswith("encoder") and isinstance(v, list)}
    return {**config, **cut, "encoder_num_layers": count}
