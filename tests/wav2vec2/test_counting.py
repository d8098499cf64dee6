"""Expected parameters, multiply-accumulates and milliseconds against those of the pruned model."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.latency import costs_of
from wav2vec2 import prune
from wav2vec2.counting import count_params
from wav2vec2.hardconcrete import sample

ARCHITECTURES = ["hubert_base", "hubert_large", "wavlm_base", "wavlm_large"]
UNITS = ["conv", "head", "interm", "attlayer", "ffnlayer"]
COMBINATIONS = [c for n in range(6) for c in itertools.combinations(UNITS, n)]


def set_certain(mask, alive: torch.Tensor) -> None:
    """Make units certain to live or to be dropped."""
    mask.log_alpha.data = torch.where(alive, 60.0, -60.0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_dense_model_counts_its_parameters(tiny, architecture):
    model = tiny(architecture, aux_num_out=7)
    assert model.get_num_params().item() == sum(p.numel() for p in model.parameters())
    assert model.get_num_params().dtype == torch.float64


@pytest.mark.parametrize("units", COMBINATIONS, ids="-".join)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_certain_masks_cost_what_pruning_leaves(tiny, architecture, units):
    model = tiny(architecture, units)
    costs = costs_of(model.config)
    for density in (0.0, 0.1, 0.5, 1.0):
        for mask in model.masks().values():
            set_certain(mask, torch.rand(len(mask)) < density)
        pruned, _ = prune(model)
        assert costs["params"](model).item() == pytest.approx(count_params(pruned), abs=1e-6)
        for name, cost in costs.items():
            assert cost(model).item() == pytest.approx(cost(pruned).item(), rel=1e-12), name


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["wavlm_base", "hubert_base"])
def test_any_subset_of_heads_may_go(tiny, architecture):
    model = tiny(architecture, ("head",))
    waveforms = torch.randn(1, 300)
    masks = list(model.masks().values())
    some = [[0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0], [1, 0, 0, 1]]
    for subset in itertools.product([0, 1], repeat=4):  # of layer 0, with the layers above as in ``some``
        for i, upper in enumerate(some):
            for mask, heads in zip(masks, [subset, upper, some[i - 1]], strict=True):
                set_certain(mask, torch.tensor(heads, dtype=torch.bool))
            pruned, _ = prune(model)
            assert model.get_num_params().item() == sum(p.numel() for p in pruned.parameters())
            with torch.no_grad():
                states, pruned_states = (m.extract_features(waveforms)[0] for m in (model, pruned))
            torch.testing.assert_close(states[-1], pruned_states[-1], atol=1e-5, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["hubert_base", "wavlm_large"])
def test_expectation_is_the_mean_over_samples(tiny, flags, architecture):
    """Of parameters and multiply-accumulates: milliseconds of an expected size are no mean over sizes."""
    model = tiny(architecture, tuple(flags))
    for mask in model.masks().values():
        mask.log_alpha.data -= 3.0  # so that blocks and conv layers often die
    masks = list(model.masks().values())
    costs = [costs_of(model.config)[name] for name in ("params", "macs")]
    with torch.no_grad():
        flat = torch.cat([mask.log_alpha for mask in masks])
        found = []
        for _ in range(600):
            drawn = (sample(flat) > 0).double().split([len(mask) for mask in masks])
            found.append(torch.stack([cost(model, dict(zip(masks, drawn)).__getitem__) for cost in costs]))
        counts, expected = torch.stack(found), torch.stack([cost(model) for cost in costs])
        errors = (counts.mean(0) - expected) / (counts.std(0) / 600**0.5)
    assert (errors.abs() < 4).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_matches_finite_differences(tiny, flags, architecture):
    model = tiny(architecture, tuple(flags)).double()
    for cost in costs_of(model.config).values():
        model.zero_grad()
        cost(model).backward()
        for name, mask in model.masks().items():
            assert (mask.log_alpha.grad > 0).all(), (cost.name, name)
            for unit in {0, len(mask) - 1}:
                value, values = mask.log_alpha.data[unit].item(), []
                for step in (1e-4, -1e-4):
                    mask.log_alpha.data[unit] = value + step
                    values.append(cost(model).item())
                mask.log_alpha.data[unit] = value
                difference = (values[0] - values[1]) / 2e-4
                found = mask.log_alpha.grad[unit].item()
                assert found == pytest.approx(difference, rel=1e-4, abs=1e-5), (cost.name, name)


def test_gradient_of_certain_masks_is_finite(tiny, flags):
    model = tiny("wavlm_base", tuple(flags))
    for mask in model.masks().values():
        set_certain(mask, torch.arange(len(mask)) % 2 == 0)
    for cost in costs_of(model.config).values():
        model.zero_grad()
        cost(model).backward()
        assert all(mask.log_alpha.grad.isfinite().all() for mask in model.masks().values()), cost.name


@pytest.mark.parametrize("architecture", ["hubert_base", "wavlm_base"])
def test_blocks_with_nothing_left_cost_nothing(tiny, architecture):
    """Whichever of their masks empties them."""
    model = tiny(architecture, ("head", "interm", "attlayer", "ffnlayer"))
    bare = tiny(architecture, encoder_use_attention=[False] * 3, encoder_use_feed_forward=[False] * 3)
    for cost in costs_of(model.config).values():
        for gone in (("for_heads", "for_intermediate"), ("for_layer",)):
            for name, mask in model.masks().items():
                set_certain(mask, torch.full([len(mask)], not name.endswith(gone)))
            assert cost(model).item() == pytest.approx(cost(bare).item(), rel=1e-12), (cost.name, gone)
