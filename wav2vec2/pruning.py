"""Make the smaller dense model that a masked model already is in eval."""

import copy
from typing import Any

import torch
from torch import Tensor

from .hardconcrete import HardConcrete, Pruned, draw_gates, eval_survivors
from .inputs import describe
from .model import Wav2Vec2Model, wav2vec2_model

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

    Raises:
        ValueError: something else than a model, or survivors that are not those of its masks.
    """
    if not isinstance(model, Wav2Vec2Model):
        raise ValueError(f"model must be a Wav2Vec2Model, got {type(model).__name__}: prune what it wraps")
    if survivors is not None:
        _check_survivors(model, survivors)
    gates = draw_gates(model.masks().values(), training=False, survivors=survivors)
    extractor, encoder = model.feature_extractor, model.encoder
    gate_in = gates.get(extractor.conv_layers[-1].hard_concrete)
    parts = {
        "feature_extractor": extractor.pruned(gates),
        "encoder.feature_projection": [Pruned(encoder.feature_projection.live_weights(gate_in))],
        "encoder.transformer": encoder.transformer.pruned(gates),
    }
    state, config = model.state_dict(), copy.deepcopy(model.config)
    config.update({key: False for key in config if "_prune_" in key})
    for name, layers in parts.items():
        for i, left in enumerate(layers):
            state.update({f"{name}.{key}": weight for key, weight in left.weights.items()})
            for key, value in left.config.items():
                config[key][i] = value

    with torch.device("meta"):  # the weights come from the model, with their device and dtype
        pruned = wav2vec2_model(**config)
    # what the config no longer knows of is gone
    pruned.load_state_dict({name: state[name].clone() for name in pruned.state_dict()}, strict=True, assign=True)
    pruned.mask_embedding = None if model.mask_embedding is None else model.mask_embedding.clone()
    return pruned.eval(), pruned.config


def _check_survivors(model: Wav2Vec2Model, survivors: Survivors) -> None:
    for name, mask in model.masks().items():
        kept = survivors.get(mask)
        if kept is None or kept.dtype != torch.bool or kept.shape != (len(mask),):
            raise ValueError(f"survivors of {name} must be bool [{len(mask)}], got {describe(kept)}")


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
