"""The flat config of the tiny HuBERT that most tests run on."""

TINY = {
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": [(12, 10, 5), *[(12, 3, 2)] * 4, *[(12, 2, 2)] * 2],
    "extractor_conv_bias": False,
    "encoder_embed_dim": 24,
    "encoder_projection_dropout": 0.1,
    "encoder_pos_conv_kernel": 8,
    "encoder_pos_conv_groups": 4,
    "encoder_num_layers": 4,
    "encoder_use_attention": [True] * 4,
    "encoder_use_feed_forward": [True] * 4,
    "encoder_num_heads": [4] * 4,
    "encoder_head_dim": 6,
    "encoder_attention_dropout": 0.1,
    "encoder_ff_interm_features": [40] * 4,
    "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.1,
    "encoder_layer_norm_first": False,
    "encoder_layer_drop": 0.05,
    "aux_num_out": None,
    "normalize_waveform": False,
}
