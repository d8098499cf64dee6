"""Hard Concrete masks (Louizos et al., ICLR 2018, https://arxiv.org/abs/1712.01312) and the live units they leave.

A unit whose gate is exactly 0 does not exist, in training and in eval: masked layers run on their live units only.

    mask = HardConcrete(n=3072, drop_rate=0.5)
    gate = draw_gates([mask], training=True)[mask]
    y = linear(x, weight.index_select(0, gate.index))[..., :] * gate.value    # what a masked layer does

Shapes: n units in a group, m of them live.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

BETA = 2 / 3  # temperature; this and the stretch limits as in Louizos et al., section 4
LIMIT_LOW, LIMIT_HIGH = -0.1, 1.1
EPS = 1e-6  # uniform noise stays this far from 0 and 1
GPU_MULTIPLE = 8  # tensor cores multiply bfloat16 and float16 in tiles of so many
EVAL_SHARPNESS = 0.8  # eval value sigmoid(log_alpha / beta * 0.8): "magical number" of Wang et al., EMNLP 2020 (flop)
INIT_STD = 0.01


@dataclass
class Gate:
    """The live units of one group."""

    index: Tensor | None  # [m] int64, ascending; None when all n units are live
    value: Tensor | None  # [m] what each live unit is multiplied by; None for 1
    num_live: int  # m
    alive: Tensor | None = None  # [n] bool on the host: which units the index names; None when all n are live


@dataclass(frozen=True)
class Prunable:
    """What masks may drop of an attention or feed-forward block."""

    units: bool = False  # its heads or FFN units, one by one
    block: bool = False  # the whole of it
    channels: bool = False  # those of its heads, one by one


@dataclass
class Pruned:
    """What pruning leaves of a layer or block."""

    weights: dict[str, Tensor] = field(default_factory=dict)  # live parts of what gates slice or scale, by local name
    config: dict[str, Any] = field(default_factory=dict)  # what the lists of the flat config say of this layer

    def add(self, name: str, part: Pruned) -> None:
        """Take in what is left of the part with this name."""
        self.weights |= {f"{name}.{key}": weight for key, weight in part.weights.items()}
        self.config |= part.config


class HardConcrete(nn.Module):
    """One gate per prunable unit, with the learned parameter ``log_alpha`` [n].

    Args:
        n: number of units.
        drop_rate: initial probability that a unit is dropped; ``log_alpha ~ N(log((1 - p) / p), 0.01)``.
        min_live: 1 if the highest ranked unit always survives (a conv layer without channels is no network), else 0.
        paddable: no norm sees the units, so that on a GPU some with gate 0 may take part to round a size up: what
            they give is multiplied by 0, and so is every gradient.
    """

    def __init__(self, n: int, drop_rate: float, min_live: int = 0, paddable: bool = False) -> None:
        super().__init__()
        if not 0 < drop_rate < 1:
            raise ValueError(f"the initial drop rate of a mask must lie between 0 and 1, got {drop_rate}")
        self.min_live, self.paddable = min_live, paddable
        self.log_alpha = nn.Parameter(torch.empty(n))
        self.reset(drop_rate)

    def reset(self, drop_rate: float) -> None:
        """Start again at an initial probability of being dropped."""
        nn.init.normal_(self.log_alpha, math.log((1 - drop_rate) / drop_rate), INIT_STD)

    def __len__(self) -> int:
        return self.log_alpha.numel()

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        return f"n={len(self)}"


# Maps a mask to the probability [n] (or the 0/1 choice) that each of its units exists; or the first of several masks
# alike to that of all of them, [k, n], of which what is counted is [k].
Alive = Callable[[HardConcrete], Tensor]
Gates = dict[HardConcrete | None, Gate]


def alive_probability(log_alpha: Tensor) -> Tensor:
    """P(gate > 0) per unit; its sum is the expected number of live units (L0, eq. 12 of the paper)."""
    return torch.sigmoid(log_alpha - BETA * math.log(-LIMIT_LOW / LIMIT_HIGH))


def alive_probabilities(masks: Iterable[HardConcrete]) -> Alive:
    """P(gate > 0) of every unit of ``masks`` in float64, so that counts of 10^8 parameters are exact to the unit."""
    by_mask: dict[HardConcrete, Tensor] = {}
    masks = list(masks)
    if masks:
        flat = alive_probability(torch.cat([mask.log_alpha for mask in masks]).double())
        by_mask = dict(zip(masks, flat.split([len(mask) for mask in masks])))
    return by_mask.__getitem__


def probability_none(alive: Tensor) -> Tensor:
    """P(no unit of a group exists) = prod(1 - p) of the last dimension; 1 for a group without units.

    As a sum of logarithms, since a GPU waits for the host in the backward pass of ``prod``, which looks for zeros.
    """
    return (1 - alive).clamp(min=torch.finfo(alive.dtype).tiny).log().sum(-1).exp()


def num_live(mask: HardConcrete | None, num_units: int, alive: Alive) -> Tensor | int:
    """Expected number of live units: one that always survives included, all ``num_units`` without a mask."""
    if mask is None:
        return num_units
    units = alive(mask)
    return units.sum(-1) + probability_none(units) if mask.min_live else units.sum(-1)


def each_num_live(masks: Sequence[HardConcrete | None], sizes: Sequence[int], alive: Alive) -> list[Tensor | int]:
    """:func:`num_live` of each mask, those that are alike together."""
    alike: dict[object, list[int]] = {}
    for i, mask in enumerate(masks):
        alike.setdefault(i if mask is None else (len(mask), mask.min_live), []).append(i)
    found: dict[int, Tensor | int] = {}
    for group in alike.values():
        each = num_live(masks[group[0]], sizes[group[0]], together(alive, [masks[i] for i in group]))
        found |= zip(group, each.unbind() if isinstance(each, Tensor) and len(group) > 1 else [each])
    return [found[i] for i in range(len(masks))]


def together(alive: Alive, *alike: Sequence[HardConcrete | None]) -> Alive:
    """For the first of each sequence of masks alike: all of them side by side.

    On a GPU, and on a CPU beside a small model, an operation on a few numbers takes as long as one on many.
    """
    by_first = {masks[0]: masks for masks in alike}

    def stacked(mask: HardConcrete) -> Tensor:
        masks = by_first.get(mask, ())
        return torch.stack([alive(one) for one in masks if one is not None]) if len(masks) > 1 else alive(mask)

    return stacked


def live_units(mask: HardConcrete | None, num_units: int, alive: Alive) -> tuple[Tensor | int, Tensor | int]:
    """Expected number of live units of a block that may lose all of them, and the probability that any lives."""
    if mask is None:
        return num_units, int(num_units > 0)
    units = alive(mask)
    return units.sum(-1), 1 - probability_none(units)


def sample(log_alpha: Tensor) -> Tensor:
    """One training sample of the gates [n] in [0, 1], exactly 0 with probability 1 - P(gate > 0)."""
    noise = torch.empty_like(log_alpha).uniform_(EPS, 1 - EPS)
    soft = torch.sigmoid((torch.logit(noise) + log_alpha) / BETA)
    return (soft * (LIMIT_HIGH - LIMIT_LOW) + LIMIT_LOW).clamp(0, 1)


def eval_values(log_alpha: Tensor) -> Tensor:
    """The deterministic value [n] that a unit has in eval, if it survives."""
    return torch.sigmoid(log_alpha / BETA * EVAL_SHARPNESS)


@torch.no_grad()
def eval_survivors(log_alpha: Tensor) -> Tensor:
    """Which units [n] (bool, on the CPU) survive in eval: the round(n - L0) lowest ones do not."""
    log_alpha = log_alpha.cpu().double()  # the same survivors on every device and in every precision
    num_dropped = round(log_alpha.numel() - alive_probability(log_alpha).sum().item())
    survives = torch.ones_like(log_alpha, dtype=torch.bool)
    # a stable sort, so that ties are broken the same way on every machine
    survives[log_alpha.argsort(stable=True)[:num_dropped]] = False
    return survives


def draw_gates(
    masks: Collection[HardConcrete],
    training: bool,
    survivors: dict[HardConcrete, Tensor] | None = None,
    multiple: int | None = None,
) -> Gates:
    """Draw the gates of all masks at once: samples in training, the deterministic ones in eval.

    Everything is drawn on the masks' device from its default random generator; one transfer brings the live/dead bits
    to the host, one takes the indices back.

    Args:
        masks: the groups of units.
        training: sample, or take the eval values.
        survivors: bool [n] per mask, instead of the eval rule of the published system (pruning to an exact size).
        multiple: in training, of the sizes of paddable groups; 8 on a GPU and 1 elsewhere by default.
    """
    masks = list(masks)
    if not masks:
        return {}
    sizes = [len(mask) for mask in masks]
    log_alpha = torch.cat([mask.log_alpha for mask in masks])
    if log_alpha.dtype in (torch.float16, torch.bfloat16):
        log_alpha = log_alpha.float()
    host_log_alpha = None
    if training:
        value = sample(log_alpha)
        alive = (value > 0).cpu()
    else:
        value = eval_values(log_alpha)
        host_log_alpha = log_alpha.detach().cpu()
        chosen = [
            eval_survivors(part) if survivors is None else survivors[mask].cpu()
            for mask, part in zip(masks, host_log_alpha.split(sizes))
        ]
        alive = torch.cat(chosen)

    if multiple is None:
        multiple = GPU_MULTIPLE if log_alpha.is_cuda else 1
    counts = []
    for position, (mask, part) in enumerate(zip(masks, alive.split(sizes))):  # views: writing to part writes to alive
        count = int(part.sum())
        if count < mask.min_live:
            if host_log_alpha is None:
                host_log_alpha = log_alpha.detach().cpu()
            ranked = host_log_alpha.split(sizes)[position].argsort(stable=True, descending=True)
            part[ranked[: mask.min_live]] = True
            count = int(part.sum())
        if training and mask.paddable and count and count % multiple:
            part[(~part).nonzero()[: -count % multiple, 0]] = True
            count = int(part.sum())
        counts.append(count)
    live = alive.nonzero().squeeze(1)
    starts = torch.tensor([0, *sizes[:-1]]).cumsum(0)
    offsets = torch.repeat_interleave(starts, torch.tensor(counts), output_size=len(live))
    flat, local = torch.stack([live, live - offsets]).to(log_alpha.device, non_blocking=True).unbind()
    values = value.index_select(0, flat).split(counts)
    return {
        mask: Gate(index, gate_value, count, part) if count < size else Gate(None, gate_value, count)
        for mask, size, count, index, gate_value, part in zip(
            masks, sizes, counts, local.split(counts), values, alive.split(sizes)
        )
    }


def touch(x: Tensor, *modules: nn.Module | None) -> Tensor:
    """Return ``x``, with every trainable parameter of the modules in its graph and a gradient of exactly zero.

    A block without live units must still give its parameters gradients: ranks draw different masks, and DDP waits for
    the same parameters on all of them.
    """
    if not torch.is_grad_enabled():
        return x
    empty = torch.empty(0, dtype=torch.int64, device=x.device)
    parameters = [p for module in modules if module is not None for p in module.parameters() if p.requires_grad]
    if not parameters:
        return x
    return x + torch.stack([p.index_select(0, empty).sum() for p in parameters]).sum().to(x.dtype)


def select(weight: Tensor, gate: Gate | None, dim: int) -> Tensor:
    """The live slices of ``weight`` along ``dim``; the weight itself when all are live."""
    return weight if gate is None or gate.index is None else weight.index_select(dim, gate.index)


def scale(weight: Tensor, gate: Gate | None, dim: int) -> Tensor:
    """Fold the gate's values into the live slices of a weight that follows the gated units."""
    if gate is None or gate.value is None:
        return weight
    shape = [1] * weight.dim()
    shape[dim] = -1
    return weight * gate.value.to(weight.dtype).view(shape)
