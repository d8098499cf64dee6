"""Pruning to an exact cost: the highest ranked units that fit, to within one, or to within one group of them."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from distillation.budget import Milliseconds
from distillation.latency import LatencyTable
from tests.latency import costs_of, latency_content
from wav2vec2 import prune
from wav2vec2.architecture import architecture as architecture_of
from wav2vec2.pruning import eval_rule, survivors_for_cost, survivors_for_size

UNITS = ("conv", "head", "interm")
ALL = (*UNITS, "attlayer", "ffnlayer")


def groups_of(name: str, mask, multiple_of: int) -> list[torch.Tensor]:
    """Units that are kept together, the highest ranked first; what is left over of the multiples never is."""
    order = mask.log_alpha.detach().argsort(descending=True)
    if name.endswith(("_for_heads", "_for_layer")):
        return list(order.split(1))
    return list(order.split(multiple_of))[: max(1, len(mask) // multiple_of)]


@pytest.mark.parametrize("multiple_of", [1, 5, 8])  # of 12, 10 and 8 channels and 24 FFN units: multiples or not
@pytest.mark.parametrize("cost", ["params", "macs", "milliseconds"])
@pytest.mark.parametrize(
    ("architecture", "units"),
    [
        ("hubert_base", UNITS),
        ("wavlm_large", ALL),
        ("wavlm_base", ("head",)),
        ("hubert_large", ("attlayer", "ffnlayer")),
    ],
)
def test_the_highest_ranked_units_that_fit(tiny, architecture, units, cost, multiple_of):
    model = tiny(architecture, units)
    cost = partial(costs_of(model.config)[cost], model)
    names = {mask: name for name, mask in model.masks().items()}
    ranked = [mask for mask, name in names.items() if not name.endswith("_for_layer")] or list(names)
    rest = {mask: kept for mask, kept in eval_rule(model).items() if mask not in ranked}
    groups = [(mask, group) for mask in ranked for group in groups_of(names[mask], mask, multiple_of)]
    groups.sort(key=lambda pair: -pair[0].log_alpha.detach()[pair[1]].double().mean())

    def spent(chosen: list[tuple]) -> float:
        """Of these groups, and of the first of what always keeps one."""
        kept = {mask: torch.zeros(len(mask), dtype=torch.float64) for mask in ranked}
        for mask, group in chosen:
            kept[mask][group] = 1
        for mask in ranked:
            if mask.min_live:
                kept[mask][groups_of(names[mask], mask, multiple_of)[0]] = 1
        return cost(lambda mask: kept.get(mask, rest.get(mask)).double()).item()

    sizes = [spent(groups[:k]) for k in range(len(groups) + 1)]  # the highest ranked alone, all there are
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    for budget in torch.linspace(sizes[0], sizes[-1], 5, dtype=torch.float64).tolist():
        survivors = survivors_for_cost(model, cost, budget, multiple_of)
        chosen = [(mask, group) for mask, group in groups if survivors[mask][group].all()]
        size = spent(chosen)
        assert max(size for size in sizes if size <= budget) <= size <= budget
        assert size == pytest.approx(cost.func(prune(model, survivors)[0]).item(), rel=1e-12)
        for mask in ranked:  # nothing but whole groups is kept, and the highest ranked of each mask
            own = groups_of(names[mask], mask, multiple_of)
            count = sum(bool(survivors[mask][group].all()) for group in own)
            assert survivors[mask].nonzero().flatten().tolist() == sorted(
                torch.cat([*own[:count], own[0][:0]]).tolist()
            )
            if count < len(own):  # the next one would no longer fit; equal: one of a block that is gone
                larger = spent([*chosen, (mask, own[count])])
                assert larger > budget or larger == size


@pytest.mark.parametrize("factor", [0.5, 0.9])
def test_blocks_that_are_faster_with_all_of_their_units(tiny, factor):
    """The budget is kept, and met as closely as another unit of each mask allows."""
    model = tiny("hubert_base", UNITS)
    content = latency_content(model.config)
    for entry in content["feed_forward"]:
        *_, last = entry["ms"]
        entry["units"].insert(-1, entry["units"][-1] - 1)
        entry["ms"] = [*entry["ms"][:-1], last, factor * last]
    cost = partial(Milliseconds(LatencyTable(content, "x")), model)
    whole, none = (cost(lambda mask, n=n: torch.full([len(mask)], n, dtype=torch.float64)).item() for n in (1.0, 0.0))
    for budget in torch.linspace(none + 0.5, whole, 40, dtype=torch.float64).tolist():
        survivors = {mask: kept.double() for mask, kept in survivors_for_cost(model, cost, budget).items()}
        size = cost(survivors.__getitem__).item()
        assert size <= budget
        for mask, kept in list(survivors.items()):
            gone = [i for i in mask.log_alpha.argsort(descending=True).tolist() if not kept[i]]
            for more in (gone[:1], gone) if gone else ():
                survivors[mask] = kept.index_fill(0, torch.tensor(more), 1.0)
                larger = cost(survivors.__getitem__).item()
                assert larger > budget or larger == size
            survivors[mask] = kept


def test_a_size_is_one_of_parameters(tiny):
    model = tiny("wavlm_base", UNITS)
    wanted = round(0.6 * model.get_num_params(lambda mask: torch.ones(len(mask), dtype=torch.float64)).item())
    by_cost = survivors_for_cost(model, model.get_num_params, wanted, 8)
    assert all(torch.equal(kept, by_cost[mask]) for mask, kept in survivors_for_size(model, wanted, 8).items())
    found = architecture_of(prune(model, by_cost)[1])
    assert all(n % 8 == 0 for n in [*found.conv, *found.interm]) and any(n % 8 for n in found.heads)


def test_all_units_of_a_mask_that_is_smaller_than_the_multiple(tiny):
    model = tiny("hubert_base", UNITS)
    costs = [model.get_num_params(lambda mask, n=n: torch.full([len(mask)], n).double()).item() for n in (0, 1)]
    survivors = survivors_for_size(model, round((costs[0] + 2 * costs[1]) / 3), 64)
    found = architecture_of(prune(model, survivors)[1])
    assert found.conv == [12, 10, 8] and set(found.interm) == {0, 24}


def test_impossible_sizes_are_refused(tiny):
    model = tiny("hubert_base", ("head",))
    with pytest.raises(ValueError, match=r"no choice of units gives 10 parameters: pruning everything leaves 4,\d+"):
        survivors_for_size(model, 10)
    with pytest.raises(ValueError, match="no choice of units gives 10,000,000 parameters"):
        survivors_for_size(model, 10_000_000)
    with pytest.raises(ValueError, match="has no masks"):
        survivors_for_size(tiny("hubert_base"), 10)
    cost = costs_of(model.config)["milliseconds"]
    with pytest.raises(ValueError, match=r"gives 0\.01 ms: pruning everything leaves [\d.]+ ms, nothing [\d.]+ ms"):
        survivors_for_cost(model, partial(cost, model), 0.01, text=cost.text)
    for multiple_of in (0, -8, 1.5):
        with pytest.raises(ValueError, match=r"multiple_of .*must be"):
            survivors_for_size(model, 10, multiple_of)
    with pytest.raises(ValueError, match="no choice of units gives nan"):
        survivors_for_cost(model, partial(cost, model), math.nan)
