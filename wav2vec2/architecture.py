"""The architecture of a flat config as numbers and as text, and the configs of two published models."""

from dataclasses import dataclass
from typing import Any

HUBERT_BASE: dict[str, Any] = {
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": [(512, 10, 5), *[(512, 3, 2)] * 4, *[(512, 2, 2)] * 2],
    "extractor_conv_bias": False,
    "encoder_embed_dim": 768,
    "encoder_projection_dropout": 0.1,
    "encoder_pos_conv_kernel": 128,
    "encoder_pos_conv_groups": 16,
    "encoder_num_layers": 12,
    "encoder_use_attention": [True] * 12,
    "encoder_use_feed_forward": [True] * 12,
    "encoder_num_heads": [12] * 12,
    "encoder_head_dim": 64,
    "encoder_attention_dropout": 0.1,
    "encoder_ff_interm_features": [3072] * 12,
    "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.1,
    "encoder_layer_norm_first": False,
    "encoder_layer_drop": 0.05,
    "aux_num_out": None,
    "normalize_waveform": False,
}
WAVLM_BASE: dict[str, Any] = {
    **{key: value for key, value in HUBERT_BASE.items() if key not in ("encoder_num_heads", "encoder_head_dim")},
    "encoder_total_num_heads": [12] * 12,
    "encoder_remaining_heads": [list(range(12))] * 12,
    "encoder_num_buckets": 320,
    "encoder_max_distance": 800,
}


@dataclass
class Architecture:
    """Units per layer of a dense model."""

    conv: list[int]  # channels per conv layer
    heads: list[int]  # per Transformer layer, 0 where the block is gone
    interm: list[int]  # FFN units per Transformer layer, 0 where the block is gone
    channels: list[int]  # of queries and of values of all heads, per Transformer layer
    uneven: bool  # heads are not all of one width


def architecture(config: dict[str, Any]) -> Architecture:
    """Units per layer from a flat config."""
    if "encoder_remaining_heads" in config:
        heads = [len(remaining) for remaining in config["encoder_remaining_heads"]]
        totals = [n for n, used in zip(config["encoder_total_num_heads"], config["encoder_use_attention"]) if used]
        width = config["encoder_embed_dim"] // max([1, *totals])
    else:
        heads, width = list(config["encoder_num_heads"]), config["encoder_head_dim"]
    heads = [n if used else 0 for n, used in zip(heads, config["encoder_use_attention"])]
    reuse = config.get("encoder_reuse_attention") or [False] * len(heads)  # these have values alone
    channels = [width * n * (2 - r) for n, r in zip(heads, reuse)]
    if (uneven := config.get("encoder_head_channels")) is not None:
        channels = [sum(map(sum, layer)) for layer in uneven]
    return Architecture(
        conv=[layer[0] for layer in config["extractor_conv_layer_config"]],
        heads=heads,
        interm=[
            n if used else 0
            for n, used in zip(config["encoder_ff_interm_features"], config["encoder_use_feed_forward"])
        ],
        channels=channels,
        uneven=uneven is not None,
    )


def format_architecture(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Table of the units left per layer, out of how many."""
    old, new = architecture(before), architecture(after)
    lines = [f"{'conv layer':>18}" + "".join(f"{i:>7}" for i in range(1, len(new.conv) + 1))]
    lines.append(_row("channels", new.conv, old.conv))
    lines.append(f"{'Transformer layer':>18}" + "".join(f"{i:>7}" for i in range(1, len(new.heads) + 1)))
    lines.append(_row("heads", new.heads, old.heads))
    if new.uneven:
        lines.append(_row("their channels", new.channels, old.channels))
    lines.append(_row("FFN units", new.interm, old.interm))
    return "\n".join(lines)


def _row(name: str, new: list[int], old: list[int]) -> str:
    return f"{name:>18}" + "".join(f"{n:>7}" for n in new) + f"   of {max(old)}"
