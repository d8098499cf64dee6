"""The architecture that pruning found, as numbers and as text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass
class Architecture:
    """Units per layer of a dense model."""

    conv: list[int]  # channels per conv layer
    heads: list[int]  # per Transformer layer, 0 where the block is gone
    interm: list[int]  # FFN units per Transformer layer, 0 where the block is gone


def architecture(config: dict[str, Any]) -> Architecture:
    """Units per layer from a flat config."""
    if "encoder_remaining_heads" in config:
        heads = [len(remaining) for remaining in config["encoder_remaining_heads"]]
    else:
        heads = list(config["encoder_num_heads"])
    return Architecture(
        conv=[layer[0] for layer in config["extractor_conv_layer_config"]],
        heads=[n if used else 0 for n, used in zip(heads, config["encoder_use_attention"])],
        interm=[
            n if used else 0
            for n, used in zip(config["encoder_ff_interm_features"], config["encoder_use_feed_forward"])
        ],
    )


def format_architecture(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Table of the units left per layer, out of how many."""
    old, new = architecture(before), architecture(after)
    lines = [f"{'conv layer':>18}" + "".join(f"{i:>7}" for i in range(1, len(new.conv) + 1))]
    lines.append(_row("channels", new.conv, old.conv))
    lines.append(f"{'Transformer layer':>18}" + "".join(f"{i:>7}" for i in range(1, len(new.heads) + 1)))
    lines.append(_row("heads", new.heads, old.heads))
    lines.append(_row("FFN units", new.interm, old.interm))
    return "\n".join(lines)


def _row(name: str, new: list[int], old: list[int]) -> str:
    return f"{name:>18}" + "".join(f"{n:>7}" for n in new) + f"   of {max(old)}"
