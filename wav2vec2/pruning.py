"""Make the smaller dense model that a masked model already is in eval."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from .attention import SelfAttention, WavLMSelfAttention
from .hardconcrete import Gates, HardConcrete, draw_gates, eval_survivors, scale, select
from .model import Wav2Vec2Model, wav2vec2_model
from .transformer import FeedForward

Survivors = dict[HardConcrete, Tensor]


@torch.no_grad()
def prune(model: Wav2Vec2Model, survivors: Survivors | None = None) -> tuple[Wav2Vec2Model, dict[str, Any]]:
    """Dense model of the eval masks: same function, fewer parameters.

    Soft mask values are folded into the weights that follow (those of the last conv layer into ``dummy_weight``);
    blocks without a unit are dropped. The given model is not changed and stays usable.

    Args:
        model: masked, or dense (then a copy is returned).
        survivors: bool [n] per mask; by default the eval rule of the published system, :func:`eval_rule`. See
            :func:`survivors_for_size` for an exact size.

    Returns:
        The dense model in eval mode, and its flat config.
    """
    gates = draw_gates(model.masks().values(), training=False, survivors=survivors)
    config = copy.deepcopy(model.config)
    config.update({key: False for key in config if "_prune_" in key})
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("log_alpha")}

    gate_in = None
    conv_config = []
    for i, conv in enumerate(model.feature_extractor.conv_layers):
        gate = gates.get(conv.hard_concrete)
        prefix = f"feature_extractor.conv_layers.{i}"
        weight = state[f"{prefix}.conv.weight"]
        state[f"{prefix}.conv.weight"] = scale(select(select(weight, gate, 0), gate_in, 1), gate_in, 1)
        for name in ("conv.bias", "layer_norm.weight", "layer_norm.bias"):
            if f"{prefix}.{name}" in state:
                state[f"{prefix}.{name}"] = select(state[f"{prefix}.{name}"], gate, 0)
        num_out = conv.conv.out_channels if gate is None else gate.num_live
        conv_config.append((num_out, conv.conv.kernel_size[0], conv.conv.stride[0]))
        gate_in = gate
    config["extractor_conv_layer_config"] = conv_config
    dummy = "feature_extractor.dummy_weight"
    state[dummy] = scale(select(state[dummy], gate_in, 0), gate_in, 0)
    projection = "encoder.feature_projection"
    for name, dim in (("layer_norm.weight", 0), ("layer_norm.bias", 0), ("projection.weight", 1)):
        if f"{projection}.{name}" in state:
            state[f"{projection}.{name}"] = select(state[f"{projection}.{name}"], gate_in, dim)

    layers = model.encoder.transformer.layers
    sources = model.encoder.transformer.attention_sources()
    any_attention = any(source is not None and source.is_alive(gates) for source in sources)
    for i, (layer, source) in enumerate(zip(layers, sources)):
        prefix = f"encoder.transformer.layers.{i}"
        if layer.attention is not None and source is not None:
            _prune_attention(layer.attention, source, f"{prefix}.attention.", i, gates, state, config, any_attention)
        if layer.feed_forward is not None:
            _prune_feed_forward(layer.feed_forward, f"{prefix}.feed_forward.", i, gates, state, config)

    with torch.device("meta"):  # the weights come from the model, with their device and dtype
        pruned = wav2vec2_model(**config)
    pruned.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, strict=True, assign=True)
    return pruned.eval(), pruned.config


def _prune_attention(
    block: SelfAttention,
    source: SelfAttention,
    prefix: str,
    i: int,
    gates: Gates,
    state: dict[str, Tensor],
    config: dict[str, Any],
    any_attention: bool,
) -> None:
    heads, layer = gates.get(source.hard_concrete_for_heads), gates.get(block.hard_concrete_for_layer)
    if not (block.is_alive(gates) and source.is_alive(gates)):
        # WavLM's position bias lives in layer 0 and serves the layers above: it outlives the heads beside it
        keeps_bias = isinstance(block, WavLMSelfAttention) and block.rel_attn_embed is not None and any_attention
        for name in [name for name in state if name.startswith(prefix)]:
            if not (keeps_bias and name == f"{prefix}rel_attn_embed.weight"):
                del state[name]
        config["encoder_use_attention"][i] = keeps_bias
        if block.reuse:
            config["encoder_reuse_attention"][i] = False
        _set_heads([], i, config)
        return
    for name in ("v_proj",) if block.reuse else ("q_proj", "k_proj", "v_proj"):
        weight, bias = state[f"{prefix}{name}.weight"], state[f"{prefix}{name}.bias"]
        by_head = (block.num_heads, block.head_dim)
        state[f"{prefix}{name}.weight"] = select(weight.unflatten(0, by_head), heads, 0).flatten(0, 1)
        state[f"{prefix}{name}.bias"] = select(bias.unflatten(0, by_head), heads, 0).flatten()
    weight = state[f"{prefix}out_proj.weight"].unflatten(1, (block.num_heads, block.head_dim))
    weight = scale(select(weight, heads, 1), heads, 1).flatten(1)
    state[f"{prefix}out_proj.weight"] = scale(weight, layer, 0)
    state[f"{prefix}out_proj.bias"] = scale(state[f"{prefix}out_proj.bias"], layer, 0)
    live = list(range(block.num_heads)) if heads is None or heads.index is None else heads.index.tolist()
    _set_heads(live, i, config)


def _set_heads(live: list[int], i: int, config: dict[str, Any]) -> None:
    if "encoder_remaining_heads" in config:
        remaining = config["encoder_remaining_heads"]
        remaining[i] = [remaining[i][head] for head in live]
    else:
        config["encoder_num_heads"][i] = len(live)


def _prune_feed_forward(
    block: FeedForward, prefix: str, i: int, gates: Gates, state: dict[str, Tensor], config: dict[str, Any]
) -> None:
    units, layer = gates.get(block.hard_concrete_for_intermediate), gates.get(block.hard_concrete_for_layer)
    if not block.is_alive(gates):
        for name in [name for name in state if name.startswith(prefix)]:
            del state[name]
        config["encoder_use_feed_forward"][i] = False
        config["encoder_ff_interm_features"][i] = 0
        return
    first, second = f"{prefix}intermediate_dense", f"{prefix}output_dense"
    state[f"{first}.weight"] = select(state[f"{first}.weight"], units, 0)
    state[f"{first}.bias"] = select(state[f"{first}.bias"], units, 0)
    weight = scale(select(state[f"{second}.weight"], units, 1), units, 1)
    state[f"{second}.weight"] = scale(weight, layer, 0)
    state[f"{second}.bias"] = scale(state[f"{second}.bias"], layer, 0)
    config["encoder_ff_interm_features"][i] = len(state[f"{first}.bias"])


def eval_rule(model: Wav2Vec2Model) -> Survivors:
    """Survivors [n] of every mask by the published rule: each mask drops its round(n - L0) lowest units."""
    return {mask: eval_survivors(mask.log_alpha) for mask in model.masks().values()}


@torch.no_grad()
def survivors_for_size(model: Wav2Vec2Model, num_params: int) -> Survivors:
    """Survivors that give the pruned model the wanted size, to within one unit, and never a larger one.

    Whole-block masks follow the published rule; all other units are ranked by their probability of being alive, over
    all masks together. The highest are kept; where a large one (a head) would overshoot, smaller ones that rank below
    it fill what is left.

    Args:
        model: masked.
        num_params: wanted parameters of the pruned model.

    Raises:
        ValueError: no choice of units comes near that size, or the model has no masks.
    """
    survivors = eval_rule(model)
    blocks = {mask for name, mask in model.masks().items() if name.endswith("_for_layer")}
    units = [mask for mask in survivors if mask not in blocks] or list(survivors)
    if not units:
        raise ValueError("the model has no masks, there is nothing to rank")
    rank = torch.cat([mask.log_alpha for mask in units]).cpu()  # rises with the probability of being alive
    order = rank.argsort(stable=True, descending=True)
    sizes = [len(mask) for mask in units]

    def choose(chosen: Tensor) -> Survivors:
        return {**survivors, **dict(zip(units, chosen.split(sizes)))}

    def size(chosen: Tensor) -> int:
        choice = choose(chosen)
        return int(model.get_num_params(lambda mask: choice[mask].to(mask.log_alpha.device, torch.float64)).item())

    def first(count: int) -> Tensor:
        chosen = torch.zeros(len(rank), dtype=torch.bool)
        chosen[order[:count]] = True
        return chosen

    low, high = 0, len(rank)
    if not size(first(low)) <= num_params <= size(first(high)):
        raise ValueError(
            f"no choice of units gives {num_params:,} parameters: pruning everything leaves {size(first(low)):,}, "
            f"nothing {size(first(high)):,}"
        )
    while low < high:  # the largest count that does not exceed the size
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size(first(middle)) <= num_params else (low, middle - 1)
    chosen = first(low)
    group = torch.repeat_interleave(torch.arange(len(units)), torch.tensor(sizes))
    too_large: set[int] = set()  # masks whose units no longer fit
    for unit in order[low:].tolist():
        mask = int(group[unit])
        if mask in too_large:
            continue
        chosen[unit] = True
        if size(chosen) > num_params:
            chosen[unit] = False
            too_large.add(mask)
            if len(too_large) == len(units):
                break
    return choose(chosen)
