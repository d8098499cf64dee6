"""Checks of the flat config that describes a model."""

from typing import Any


def check_config(config: dict[str, Any], is_wavlm: bool) -> None:
    """Refuse values that would build a model which cannot run. Makes lists of the per-layer entries.

    Raises:
        ValueError: naming the entry and its value.
    """
    names = ["encoder_use_attention", "encoder_use_feed_forward", "encoder_ff_interm_features"]
    names += ["encoder_total_num_heads", "encoder_remaining_heads"] if is_wavlm else ["encoder_num_heads"]
    needed = ["encoder_num_buckets", "encoder_max_distance"] if is_wavlm else ["encoder_head_dim"]
    if missing := [name for name in (*names, *needed) if config.get(name) is None]:
        raise ValueError(f"{', '.join(missing)}: missing")
    num_layers, width = config["encoder_num_layers"], config["encoder_embed_dim"]
    kernel, groups = config["encoder_pos_conv_kernel"], config["encoder_pos_conv_groups"]
    for name in names:
        config[name] = list(config[name])
        if len(config[name]) != num_layers:
            raise ValueError(f"{name} has {len(config[name])} entries for {num_layers} layers")
    if config["extractor_mode"] not in ("group_norm", "layer_norm"):
        raise ValueError(f"extractor_mode must be group_norm or layer_norm, got {config['extractor_mode']!r}")
    conv_layers = [tuple(layer) for layer in config["extractor_conv_layer_config"]]
    config["extractor_conv_layer_config"] = conv_layers
    if not conv_layers or any(len(layer) != 3 or min(layer) < 1 for layer in conv_layers):
        raise ValueError(f"extractor_conv_layer_config must list (channels, kernel, stride), got {conv_layers}")
    if min(width, kernel, groups) < 1 or width % groups:
        raise ValueError(f"no positional convolution of width {width}, kernel {kernel} and {groups} groups")
    rates = ("projection_dropout", "attention_dropout", "ff_interm_dropout", "dropout", "layer_drop")
    for name in (f"encoder_{rate}" for rate in rates):
        if not 0 <= config[name] <= 1:
            raise ValueError(f"{name} must lie between 0 and 1, got {config[name]}")
    if not isinstance(config["normalize_waveform"], int | float) or not 0 <= config["normalize_waveform"] <= 1:
        raise ValueError(
            f"normalize_waveform must be true, false or a small number, got {config['normalize_waveform']}"
        )
    _check_students(config)
    _check_channels(config)
    if not is_wavlm:
        if min([config["encoder_head_dim"] - 1, *config["encoder_num_heads"]]) < 0:
            raise ValueError("encoder_head_dim must be positive, and encoder_num_heads not negative")
        return
    totals = [n for n, used in zip(config["encoder_total_num_heads"], config["encoder_use_attention"]) if used]
    if len(set(totals)) > 1 or any(total < 1 or width % total for total in totals):
        raise ValueError(f"encoder_total_num_heads must be one divisor of the width {width}, got {totals}")
    for heads in config["encoder_remaining_heads"] if totals else ():
        if len(set(heads)) != len(heads) or not set(heads) <= set(range(totals[0])):
            raise ValueError(f"encoder_remaining_heads must differ and lie below {totals[0]}, got {list(heads)}")
    buckets, distance = config["encoder_num_buckets"], config["encoder_max_distance"]
    if buckets < 4 or distance <= buckets // 4:
        raise ValueError(f"{buckets} encoder_num_buckets do not go with an encoder_max_distance of {distance}")


def _check_channels(config: dict[str, Any]) -> None:
    """Checks of heads of unequal width."""
    if config.get("encoder_head_channels") is None:
        return
    heads = config.get("encoder_remaining_heads")
    numbers = config["encoder_num_heads"] if heads is None else [len(remaining) for remaining in heads]
    channels = [[list(pair) for pair in layer] for layer in config["encoder_head_channels"]]
    config["encoder_head_channels"] = channels
    if len(channels) != config["encoder_num_layers"]:
        raise ValueError(f"encoder_head_channels has {len(channels)} entries for {config['encoder_num_layers']} layers")
    for layer, number, used in zip(channels, numbers, config["encoder_use_attention"]):
        if used and (len(layer) != number or any(len(pair) != 2 or min(pair) < 1 for pair in layer)):
            raise ValueError(
                f"encoder_head_channels must list two numbers from 1 for each of {number} heads, got {layer}"
            )


def _check_students(config: dict[str, Any]) -> None:
    """Checks of the keys that only students have."""
    channels, width = config["extractor_conv_layer_config"][-1][0], config["encoder_embed_dim"]
    if config.get("encoder_use_projection") is False and channels != width:
        raise ValueError(f"without encoder_use_projection {channels} channels cannot feed a width of {width}")
    if config.get("encoder_reuse_softmax") and config.get("encoder_reuse_attention") is None:
        raise ValueError("encoder_reuse_softmax needs encoder_reuse_attention")
    if config.get("encoder_time_reduction", 1) < 1:
        raise ValueError(f"encoder_time_reduction must be at least 1, got {config['encoder_time_reduction']}")
    if config.get("encoder_reuse_attention") is None:
        return
    reuse = config["encoder_reuse_attention"] = list(config["encoder_reuse_attention"])
    if len(reuse) != config["encoder_num_layers"]:
        raise ValueError(f"encoder_reuse_attention has {len(reuse)} entries for {config['encoder_num_layers']} layers")
    if config["encoder_layer_drop"] > 0:
        raise ValueError("encoder_layer_drop must be 0 where attention maps are reused")
    heads = config.get("encoder_remaining_heads") or config["encoder_num_heads"]
    source = None
    for i, (reused, used) in enumerate(zip(reuse, config["encoder_use_attention"])):
        if not used:
            continue
        if not reused:
            source = i
        elif source is None or heads[source] != heads[i]:
            raise ValueError(f"encoder_reuse_attention: layer {i} has no earlier layer with the same heads")
