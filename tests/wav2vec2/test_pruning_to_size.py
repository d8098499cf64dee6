"""Pruning to an exact size: the highest ranked units that fit, to within one."""

from __future__ import annotations

import pytest
import torch

from wav2vec2 import prune
from wav2vec2.counting import count_params
from wav2vec2.hardconcrete import eval_survivors
from wav2vec2.pruning import survivors_for_size


@pytest.mark.parametrize(
    "architecture, units",
    [
        pytest.param("hubert_base", ("conv", "head", "interm"), marks=pytest.mark.slow),
        pytest.param("wavlm_large", ("conv", "head", "interm", "attlayer", "ffnlayer"), marks=pytest.mark.slow),
        ("wavlm_base", ("head",)),
        ("hubert_large", ("attlayer", "ffnlayer")),
    ],
)
def test_survivors_for_size_within_one_unit(tiny, architecture, units):
    model = tiny(architecture, units)
    blocks = {mask for name, mask in model.masks().items() if name.endswith("_for_layer")}
    ranked = [mask for mask in model.masks().values() if mask not in blocks] or list(model.masks().values())
    order = torch.cat([mask.log_alpha.detach() for mask in ranked]).argsort(descending=True)
    sizes = []  # of every choice there is: the k highest ranked units, and one channel per conv layer
    for k in range(len(order) + 1):
        chosen = torch.zeros(len(order), dtype=torch.bool)
        chosen[order[:k]] = True
        parts = dict(zip(ranked, chosen.split([len(mask) for mask in ranked])))
        rest = {mask: eval_survivors(mask.log_alpha) for mask in blocks - parts.keys()}
        sizes.append(count_params(prune(model, {**rest, **parts})[0]))
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1]
    for wanted in torch.linspace(sizes[0], sizes[-1], 5).round().int().tolist():
        survivors = survivors_for_size(model, wanted)
        size = count_params(prune(model, survivors)[0])
        assert max(size for size in sizes if size <= wanted) <= size <= wanted
        for mask in ranked:  # no unit that was dropped would still fit
            for unit in (~survivors[mask]).nonzero().flatten().tolist():
                more = {**survivors, mask: survivors[mask].clone()}
                more[mask][unit] = True
                larger = count_params(prune(model, more)[0])
                assert larger > wanted or larger == size  # equal: a unit of a block that is gone, or a conv's last


def test_impossible_sizes_are_refused(tiny):
    model = tiny("hubert_base", ("head",))
    with pytest.raises(ValueError, match=r"no choice of units gives 10 parameters: pruning everything leaves 4,\d+"):
        survivors_for_size(model, 10)
    with pytest.raises(ValueError, match="no choice of units gives 10,000,000 parameters"):
        survivors_for_size(model, 10_000_000)
    with pytest.raises(ValueError, match="has no masks"):
        survivors_for_size(tiny("hubert_base"), 10)
