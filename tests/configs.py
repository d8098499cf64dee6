"""The flat config of the tiny HuBERT that most tests run on."""

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
