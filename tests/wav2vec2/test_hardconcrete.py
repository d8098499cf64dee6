"""Hard Concrete masks: statistics, the eval rule by hand, and the one-go drawing against per-mask formulas."""

from __future__ import annotations

import math

import pytest
import torch

from wav2vec2.hardconcrete import (
    EPS,
    Gate,
    HardConcrete,
    alive_probabilities,
    alive_probability,
    draw_gates,
    eval_survivors,
    num_live,
    probability_none,
    sample,
    scale,
    select,
    touch,
)


def make(values: list[float], min_live: int = 0) -> HardConcrete:
    mask = HardConcrete(len(values), 0.5, min_live)
    mask.log_alpha.data = torch.tensor(values)
    return mask


@pytest.mark.parametrize("log_alpha", [-4.0, -1.0, 0.0, 2.0, 4.6])
def test_expected_count_agrees_with_samples(log_alpha):
    alive = (sample(torch.full((100_000,), log_alpha)) > 0).double().mean().item()
    expected = 1 / (1 + math.exp(-(log_alpha - 2 / 3 * math.log(0.1 / 1.1))))  # Louizos et al., eq. 12
    assert alive_probability(torch.tensor(log_alpha)).item() == pytest.approx(expected, abs=1e-6)
    assert abs(alive - expected) < 5 * math.sqrt(expected * (1 - expected) / 100_000)


def test_nobody_is_left_as_often_as_the_product_says():
    alive = torch.tensor([0.9, 0.2, 0.999, 1e-9], dtype=torch.float64, requires_grad=True)
    found, expected = probability_none(alive), (1 - alive).prod()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    (gradient,), (wanted,) = torch.autograd.grad(found, alive), torch.autograd.grad(expected, alive)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=0)
    chosen = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64, requires_grad=True)  # a choice instead of chances
    assert 1 - probability_none(chosen) == 1
    assert torch.autograd.grad(probability_none(chosen), chosen)[0].isfinite().all()
    assert probability_none(torch.zeros(3)) == 1 and probability_none(torch.zeros(0)) == 1


def test_samples_cover_the_closed_interval():
    values = sample(torch.zeros(10_000))
    assert values.min() == 0 and values.max() == 1
    assert ((values > 0) & (values < 1)).double().mean() > 0.3


def test_initial_drop_rate():
    mask = HardConcrete(10_000, 0.01)
    assert mask.log_alpha.mean().item() == pytest.approx(math.log(99), abs=1e-3)
    assert mask.log_alpha.std().item() == pytest.approx(0.01, rel=0.05)
    mask.reset(0.5)
    assert mask.log_alpha.mean().item() == pytest.approx(0.0, abs=1e-3)
    with pytest.raises(ValueError, match="between 0 and 1, got 1"):
        HardConcrete(3, 1)


def test_eval_rule_by_hand():
    # P(alive) = sigmoid(x + 1.5986): 0.9866, 0.0323, 0.9374, 0.4504 -> L0 = 2.41, round(4 - 2.41) = 2 dropped
    mask = make([2.7, -5.0, 1.1, -1.798])
    gate = draw_gates([mask], training=False)[mask]
    assert gate.num_live == 2 and gate.index.tolist() == [0, 2]
    expected = [1 / (1 + math.exp(-1.2 * x)) for x in (2.7, 1.1)]  # 0.8 / (2 / 3) = 1.2
    assert gate.value.tolist() == pytest.approx(expected, abs=1e-6)


def test_nothing_dropped_has_no_index():
    mask = make([6.0, 5.0])
    gate = draw_gates([mask], training=False)[mask]
    assert gate.index is None and gate.num_live == 2 and len(gate.value) == 2


def test_ties_drop_the_first():
    # P(alive) = 0.5 each, so half of them go
    mask = make([2 / 3 * math.log(0.1 / 1.1)] * 6)
    assert eval_survivors(mask.log_alpha).tolist() == [False] * 3 + [True] * 3


def test_survivors_do_not_depend_on_precision():
    log_alpha = torch.randn(1000) * 3
    survivors = eval_survivors(log_alpha)
    assert torch.equal(eval_survivors(log_alpha.double()), survivors)
    mask = HardConcrete(1000, 0.5).to(torch.bfloat16)
    gate = draw_gates([mask], training=False)[mask]
    assert gate.value.dtype == torch.float32 and gate.num_live == eval_survivors(mask.log_alpha).sum()


@pytest.mark.parametrize("training", [True, False])
def test_the_highest_ranked_unit_always_survives(training):
    mask, other = make([-30.0, -20.0, -25.0], min_live=1), make([-30.0, -20.0])
    gates = draw_gates([other, mask, other], training)
    assert gates[mask].index.tolist() == [1] and gates[mask].value.shape == (1,)
    assert gates[other].num_live == 0 and gates[other].value.shape == (0,)
    assert num_live(mask, 3, lambda _: torch.zeros(3)) == 1 and num_live(other, 2, lambda _: torch.zeros(2)) == 0


def test_masks_differ_with_the_seed_and_from_draw_to_draw():
    mask = HardConcrete(100, 0.5)

    def draw(seed: int) -> list[list[float]]:
        torch.manual_seed(seed)
        return [draw_gates([mask], training=True)[mask].value.tolist() for _ in range(2)]

    first, second = draw(1)
    assert first != second and draw(1) == [first, second] and draw(2)[0] != first


def test_drawing_in_one_go_equals_the_formula_per_mask():
    masks = [make([0.3, -2.0, 1.0]), make([-1.0]), make([2.0, 0.0, -0.5, 0.1], min_live=1), make([])]
    torch.manual_seed(3)
    gates = draw_gates(masks, training=True)
    torch.manual_seed(3)
    for mask, noise in zip(masks, torch.empty(8).uniform_(EPS, 1 - EPS).split([3, 1, 4, 0])):
        soft = torch.sigmoid((torch.log(noise / (1 - noise)) + mask.log_alpha) * 1.5)
        z = (soft * 1.2 - 0.1).clamp(0, 1)
        live = [unit for unit in range(len(mask)) if z[unit] > 0]
        gate = gates[mask]
        assert gate.num_live == len(live)
        assert (list(range(len(mask))) if gate.index is None else gate.index.tolist()) == live
        torch.testing.assert_close(gate.value, z[live], atol=1e-6, rtol=1e-5)
        (expected,) = torch.autograd.grad(z.square().sum(), mask.log_alpha)
        (found,) = torch.autograd.grad(gate.value.square().sum(), mask.log_alpha, retain_graph=True)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_chosen_survivors_replace_the_rule():
    masks = [make([3.0, 3.0, 3.0]), make([-9.0, -9.0])]
    chosen = {masks[0]: torch.tensor([False, True, False]), masks[1]: torch.tensor([True, True])}
    gates = draw_gates(masks, training=False, survivors=chosen)
    assert gates[masks[0]].index.tolist() == [1] and gates[masks[1]].index is None


def test_no_masks_no_gates():
    assert draw_gates([], training=True) == {}
    with pytest.raises(KeyError):
        alive_probabilities([])(make([0.0]))


@pytest.mark.parametrize("training", [True, False])
def test_gates_are_float32_under_autocast(training):
    mask = HardConcrete(1000, 0.5)
    torch.manual_seed(1)
    expected = draw_gates([mask], training)[mask]
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        found = draw_gates([mask], training)[mask]
    assert found.value.dtype == torch.float32
    assert torch.equal(found.value, expected.value) and torch.equal(found.index, expected.index)


@pytest.mark.parametrize("architecture", ["hubert_base", "hubert_large", "wavlm_base", "wavlm_large"])
def test_masks_do_not_change_the_dtypes_under_autocast(tiny, flags, architecture):
    def dtypes(units: tuple[str, ...]) -> list[tuple[str, torch.dtype]]:
        model = tiny(architecture, units).train()
        for mask in model.masks().values():
            mask.log_alpha.data.fill_(9.0)
        found = []
        for name, module in model.named_modules():
            if name.endswith(("attention", "feed_forward", "feature_extractor")) or ".conv_layers." in name:
                module.register_forward_hook(
                    lambda _, __, output, name=name: found.append(
                        (name, (output[0] if isinstance(output, tuple) else output).dtype)
                    )
                )
        with torch.autocast("cpu", torch.bfloat16):
            model.extract_features(torch.randn(2, 1000), torch.tensor([1000, 900]))
        return found

    dense, masked = dtypes(()), dtypes(tuple(flags))
    assert dense == masked
    assert ("encoder.transformer.layers.1.feed_forward", torch.bfloat16) in masked
    if architecture.endswith("base"):  # elsewhere the last conv layer ends with a norm, in float32
        assert ("feature_extractor", torch.bfloat16) in masked


@pytest.mark.parametrize("architecture", ["hubert_base", "hubert_large", "wavlm_base", "wavlm_large"])
@pytest.mark.parametrize("training", [True, False])
def test_masked_models_run_in_bfloat16(tiny, flags, architecture, training):
    model = tiny(architecture, tuple(flags)).to(torch.bfloat16).train(training)
    states, _ = model.extract_features(torch.randn(1, 500, dtype=torch.bfloat16))
    assert {state.dtype for state in states} == {torch.bfloat16}


def test_select_and_scale():
    weight = torch.arange(6.0).view(2, 3)
    gate = Gate(torch.tensor([0, 2]), torch.tensor([2.0, 10.0]), 2)
    assert scale(select(weight, gate, 1), gate, 1).tolist() == [[0.0, 20.0], [6.0, 50.0]]
    assert select(weight, None, 0) is weight and scale(weight, Gate(None, None, 3), 1) is weight


def test_touched_parameters_get_zero_gradients():
    module, frozen = torch.nn.Linear(3, 2), torch.nn.Linear(2, 2).requires_grad_(False)
    x = torch.ones(4, requires_grad=True)
    touched = touch(x, module, None, frozen)
    assert torch.equal(touched, x)
    touched.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in module.parameters())
    assert all(p.grad is None for p in frozen.parameters())
    assert touch(x, frozen, None) is x
    with torch.no_grad():
        assert touch(x, module) is x
