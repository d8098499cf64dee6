"""Expected parameters, multiply-accumulates and milliseconds against those of the pruned model."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks.steps import Operations
from tests.configs import TINY, first_layers
from tests.latency import costs_of
from wav2vec2 import prune, wav2vec2_model
from wav2vec2.counting import count_params
from wav2vec2.hardconcrete import sample
from wav2vec2.transformer import EncoderLayer

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


def unequal(architecture: str, masks: dict) -> torch.nn.Module:
    """Five layers: the first and the last two are alike, the second has fewer FFN units, the third fewer heads."""
    config = first_layers(TINY, 4)
    five = {
        key: [*value, value[-1]]
        for key, value in config.items()
        if key.startswith("encoder") and isinstance(value, list)
    }
    config |= {**five, "encoder_num_layers": 5, "encoder_ff_interm_features": [40, 30, 40, 40, 40]}
    if architecture == "wavlm":
        del config["encoder_num_heads"], config["encoder_head_dim"]
        remaining = [[0, 1, 2, 3], [0, 1, 2, 3], [1, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
        config |= {"encoder_total_num_heads": [4] * 5, "encoder_remaining_heads": remaining, "encoder_num_buckets": 16,
                   "encoder_max_distance": 40}  # fmt: skip
    else:
        config["encoder_num_heads"] = [4, 4, 2, 4, 4]
    torch.manual_seed(0)
    model = wav2vec2_model(**config, **dict.fromkeys(masks, True))
    for mask in model.masks().values():
        mask.log_alpha.data.normal_(0, 2)
    return model


HEADS, CHANNELS = "encoder_prune_attention_heads", "encoder_prune_attention_head_channels"
OTHERS = ["extractor_prune_conv_channels", "encoder_prune_feed_forward_intermediate", "encoder_prune_attention_layer"]


@pytest.mark.parametrize("masks", [[HEADS, *OTHERS], [CHANNELS, *OTHERS], [HEADS], OTHERS[:1], []])
@pytest.mark.parametrize("architecture", ["hubert", "wavlm"])
def test_layers_alike_are_counted_together(monkeypatch, architecture, masks):
    model = unequal(architecture, masks)
    logits = [mask.log_alpha for mask in model.masks().values()]

    def counted() -> list[torch.Tensor]:
        costs = [model.get_num_params(), model.get_num_macs([9000, 16000])]
        return costs + (
            [g for cost in costs for g in torch.autograd.grad(cost, logits, allow_unused=True)] if logits else []
        )

    groups = [count for *_, count in model.encoder.transformer._alike(lambda mask: mask.log_alpha)]
    assert groups == [3, 1, 1]
    found = counted()
    monkeypatch.setattr(EncoderLayer, "sizes", property(lambda self: (object(),)))
    assert [count for *_, count in model.encoder.transformer._alike(lambda mask: mask.log_alpha)] == [1] * 5
    for ours, alone in zip(found, counted(), strict=True):
        assert (ours is None) == (alone is None)
        if ours is not None:
            torch.testing.assert_close(ours, alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("heads", [HEADS, CHANNELS])
def test_deeper_models_take_no_more_operations_to_count(heads):
    """On a GPU each is a launch for which the host works."""
    counts = []
    for depth in (2, 4):
        model = wav2vec2_model(**first_layers(TINY, depth), **dict.fromkeys([heads, *OTHERS], True))
        with Operations() as operations:
            model.get_num_params().backward()
        counts.append(operations.count)
    assert counts[1] == counts[0]
