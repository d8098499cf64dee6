"""Make the smaller dense model that a masked model already is in eval."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .hardconcrete import Alive, HardConcrete, Pruned, draw_gates, eval_survivors
from .head_channels import head_of
from .inputs import check_index, describe
from .model import Wav2Vec2Model, wav2vec2_model
from .transformer import EncoderLayer

Survivors = dict[HardConcrete, Tensor]


@torch.no_grad()
def prune(model: Wav2Vec2Model, survivors: Survivors | None = None) -> tuple[Wav2Vec2Model, dict[str, Any]]:
    """Dense model of the eval masks: same function, fewer parameters.

    Soft mask values are folded into the weights that follow (those of the last conv layer into ``dummy_weight``);
    blocks without a unit are dropped. The given model is not changed and stays usable.

    Args:
        model: masked, or dense (then a copy is returned).
        survivors: bool [n] per mask; by default the eval rule of the published system, :func:`eval_rule`. See
            :func:`survivors_for_size` and :func:`survivors_for_cost` for an exact size.

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
    if config.pop("encoder_prune_attention_head_channels", None) is not None:
        config.setdefault("encoder_head_channels", [[] for _ in model.encoder.transformer.layers])
    for name, layers in parts.items():
        for i, left in enumerate(layers):
            state.update({f"{name}.{key}": weight for key, weight in left.weights.items()})
            for key, value in left.config.items():
                config[key][i] = value
    _without_whole_heads(config, encoder.transformer.layers)

    with torch.device("meta"):  # the weights come from the model, with their device and dtype
        pruned = wav2vec2_model(**config)
    # what the config no longer knows of is gone
    pruned.load_state_dict({name: state[name].clone() for name in pruned.state_dict()}, strict=True, assign=True)
    pruned.mask_embedding = None if model.mask_embedding is None else model.mask_embedding.clone()
    pruned.vocabulary = copy.copy(model.vocabulary)
    return pruned.eval(), pruned.config


def _without_whole_heads(config: dict[str, Any], layers: Sequence[EncoderLayer]) -> None:
    """Leave out the channels of heads where each has all of them, as in a model whose channels go together."""
    whole = {(block.head_dim, block.head_dim) for layer in layers if (block := layer.attention) is not None}
    if {tuple(pair) for heads in config.get("encoder_head_channels", []) for pair in heads} <= whole:
        config.pop("encoder_head_channels", None)


def _check_survivors(model: Wav2Vec2Model, survivors: Survivors) -> None:
    for name, mask in model.masks().items():
        kept = survivors.get(mask)
        if kept is None or kept.dtype != torch.bool or kept.shape != (len(mask),):
            raise ValueError(f"survivors of {name} must be bool [{len(mask)}], got {describe(kept)}")


def eval_rule(model: Wav2Vec2Model) -> Survivors:
    """Survivors [n] of every mask by the published rule: each mask drops its round(n - L0) lowest units."""
    return {mask: eval_survivors(mask.log_alpha) for mask in model.masks().values()}


def survivors_for_size(model: Wav2Vec2Model, num_params: int, multiple_of: int = 1) -> Survivors:
    """Survivors that give the pruned model ``num_params`` parameters, to within one unit and never more.

    Raises:
        ValueError: as :func:`survivors_for_cost`.
    """
    return survivors_for_cost(model, model.get_num_params, num_params, multiple_of, "{:,.0f} parameters".format)


def is_grouped(name: str) -> bool:
    """Whether the units of a mask may be kept by several: conv channels and FFN units, nothing of attention."""
    return not name.endswith(("_for_heads", "_channels", "_for_layer"))


class Step(NamedTuple):
    """Units that are kept together."""

    rank: float
    mask: int
    units: Tensor
    kind: tuple[int, int]  # all that costs the same: of one mask, and of its channels of heads those of one head


def _heads_of_channels(model: Wav2Vec2Model) -> dict[HardConcrete, Tensor]:
    """The head of each channel [n], by the mask over these."""
    found: dict[HardConcrete, Tensor] = {}
    for layer in model.encoder.transformer.layers:
        block = layer.attention
        if block is not None:
            masks = block.hard_concrete_for_query_channels, block.hard_concrete_for_value_channels
            found |= {mask: head_of(counts) for mask, counts in zip(masks, block.all_channels) if mask is not None}
    return found


@torch.no_grad()
def survivors_for_cost(
    model: Wav2Vec2Model,
    cost: Callable[[Alive], Tensor],
    budget: float,
    multiple_of: int = 1,
    text: Callable[[float], str] = "{:,.10g}".format,
) -> Survivors:
    """Survivors that give the pruned model the wanted cost, to within one unit, and never a larger one.

    Whole-block masks follow the published rule; all other units are ranked by their probability of being alive, over
    all masks together. The highest are kept; where a large one (a head) would overshoot, smaller ones that rank below
    it fill what is left.

    Args:
        model: masked.
        cost: of a choice of units, scalar; it does not fall when a unit is added, unless that is the last of a mask.
        budget: most that the pruned model may cost.
        multiple_of: conv channels and FFN units are kept by so many, those that rank next to each other in their mask
            together; a mask keeps a multiple of it, or all or none of fewer units.
        text: a cost with its unit, for messages.

    Raises:
        ValueError: no choice of units comes near that cost, the model has no masks, or no such multiple.
    """
    check_index("multiple_of", multiple_of, 1, math.inf, "must be at least 1")
    kept = eval_rule(model)
    masks = {mask: name for name, mask in model.masks().items()}
    blocks = {mask for mask, name in masks.items() if name.endswith("_for_layer")}
    ranked = [mask for mask in kept if mask not in blocks] or list(kept)
    if not ranked:
        raise ValueError("the model has no masks, there is nothing to rank")

    def spent() -> float:
        return cost(lambda mask: kept[mask].to(mask.log_alpha.device, torch.float64)).item()

    steps: list[Step] = []
    heads = _heads_of_channels(model)
    for i, mask in enumerate(ranked):
        together = multiple_of if is_grouped(masks[mask]) else 1
        log_alpha = mask.log_alpha.detach().cpu()  # rises with the probability of being alive
        groups = list(log_alpha.argsort(stable=True, descending=True).split(together))
        if len(groups) > 1 and len(groups[-1]) < together:
            groups = groups[:-1]
        kept[mask] = torch.ones(len(mask), dtype=torch.bool)
        head = heads.get(mask)
        steps += [
            Step(log_alpha[group].double().mean().item(), i, group, (i, 0 if head is None else int(head[group])))
            for group in groups
        ]
    most = spent()
    for mask in ranked:
        kept[mask] = torch.zeros(len(mask), dtype=torch.bool)
    steps.sort(key=lambda step: -step.rank)  # stable
    for i, mask in enumerate(ranked):
        if mask.min_live:
            first = next(at for at, step in enumerate(steps) if step.mask == i)
            kept[mask][steps.pop(first).units] = True
    least = spent()
    if not least <= budget <= most:
        raise ValueError(
            f"no choice of units gives {text(budget)}: pruning everything leaves {text(least)}, nothing {text(most)}"
        )

    def fits(tried: list[Step]) -> bool:
        """Whether all of them can be kept; then they are."""
        for alive in (True, False):
            for step in tried:
                kept[ranked[step.mask]][step.units] = alive
            if alive and spent() <= budget:
                return True
        return False

    while steps:
        # Down the ranking, as many as fit: tried by ever more while they do, by one where they do not.
        settled: set[tuple[int, int]] = set()  # kinds of which no more fits, or all is kept
        at, count, kinds = 0, 1, len({step.kind for step in steps})
        while at < len(steps) and len(settled) < kinds:
            tried = [step for step in steps[at : at + count] if step.kind not in settled]
            if tried and not fits(tried):
                if count > 1:
                    count = max(1, count // 4)
                    continue
                full = tried[0].kind
                fits([step for step in steps[at:] if step.kind == full])  # all units may cost less than a few more
                settled.add(full)
            at, count = at + count, 2 * count
        left = [step for step in steps if not kept[ranked[step.mask]][step.units].all()]
        if len(left) == len(steps):
            break
        steps = left  # a mask that became whole may have made room for others
    return kept
