"""Import torchaudio's wav2vec 2.0, HuBERT and WavLM models: builder arguments and state dict in, torch alone needed."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from wav2vec2.checkpoint import CheckpointError

from .mapping import ImportedModel, Rule, flat_config, import_tensors

_SIZES = ("embed_dim", "num_layers", "num_heads", "ff_interm_features")
_SETTINGS = (
    "extractor_mode", "extractor_conv_bias", "encoder_projection_dropout", "encoder_pos_conv_kernel",
    "encoder_pos_conv_groups", "encoder_attention_dropout", "encoder_ff_interm_dropout", "encoder_dropout",
    "encoder_layer_norm_first", "encoder_layer_drop",
)  # fmt: skip
DEFAULT_CONV_LAYERS = [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2

_POS_CONV = "encoder.transformer.pos_conv_embed.conv"
_RULES: list[Rule] = [
    (r"(feature_extractor\.conv_layers\.\d+\.(conv|layer_norm)\.(weight|bias))", r"\1"),
    (r"(encoder\.feature_projection\.(layer_norm|projection)\.(weight|bias))", r"\1"),
    (rf"({_POS_CONV}\.(weight_g|weight_v|bias))", r"\1"),
    (r"(encoder\.transformer\.layer_norm\.(weight|bias))", r"\1"),
    (
        r"(encoder\.transformer\.layers\.\d+\.(attention\.[qkv]_proj|attention\.out_proj|layer_norm|final_layer_norm"
        r"|feed_forward\.intermediate_dense|feed_forward\.output_dense)\.(weight|bias))",
        r"\1",
    ),
    (
        r"(encoder\.transformer\.layers\.\d+\.attention\.(rel_attn_embed\.weight|gru_rel_pos_const"
        r"|gru_rel_pos_linear\.(weight|bias)))",
        r"\1",
    ),
    # torchaudio's WavLM wraps torch.nn.MultiheadAttention; its packed input weights are split before these rules.
    (r"(encoder\.transformer\.layers\.\d+\.attention)\.attention\.(out_proj\.(weight|bias))", r"\1.\2"),
    (r"aux\.(weight|bias)", None),
]


def import_torchaudio(
    config: Mapping[str, Any], state_dict: Mapping[str, Tensor], normalize_waveform: bool
) -> ImportedModel:
    """Import a model of torchaudio, its pipelines included (``aux``, the CTC layer, is dropped).

    Args:
        config: the arguments of ``torchaudio.models.wav2vec2_model`` or ``wavlm_model`` that it was built with.
        state_dict: its tensors, in either spelling of weight norm.
        normalize_waveform: the bundle's waveform normalisation; the state does not say.

    Raises:
        CheckpointError: an argument that is missing, or a tensor of unknown name.
    """
    try:
        flat = flat_config(
            conv_layers=config["extractor_conv_layer_config"] or DEFAULT_CONV_LAYERS,
            buckets=(config["encoder_num_buckets"], config["encoder_max_distance"])
            if "encoder_num_buckets" in config
            else None,
            normalize_waveform=normalize_waveform,
            **{size: config[f"encoder_{size}"] for size in _SIZES},
            **{name: config[name] for name in _SETTINGS},
        )
    except KeyError as error:
        raise CheckpointError(f"torchaudio's config lacks {error.args[0]!r}") from error
    return import_tensors(_unpack(state_dict), _RULES, flat)


def _unpack(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Split the packed [3 D, D] input projections of torch.nn.MultiheadAttention into q, k and v."""
    unpacked: dict[str, Tensor] = {}
    for name, tensor in state_dict.items():
        stem, packed, kind = name.rpartition(".attention.in_proj_")
        if not packed:
            unpacked[name] = tensor
            continue
        for projection, part in zip("qkv", tensor.chunk(3), strict=True):
            unpacked[f"{stem}.{projection}_proj.{kind}"] = part.contiguous()
    return unpacked
