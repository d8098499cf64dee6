"""What only students have: no projection, no norm before it, time reduction, reused maps, masked frames, scaled
gradients."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.latency import costs_of
from wav2vec2 import CheckpointError, load_model, prune, save_model, wav2vec2_model
from wav2vec2.attention import AttentionMap
from wav2vec2.checkpoint import load_checkpoint
from wav2vec2.passes import PassOptions
from wav2vec2.pruning import survivors_for_size

UNITS = ("conv", "head", "interm", "attlayer", "ffnlayer")
THIN = {"extractor_conv_layer_config": [(12, 10, 5), (6, 1, 1), (10, 3, 2), (16, 1, 1), (16, 2, 2)]}
STUDENTS = {
    "no projection": {**THIN, "encoder_use_projection": False},
    "reuse": {"encoder_reuse_attention": [False, True, True]},
    "late reuse": {"encoder_reuse_attention": [False, False, True]},
    "second softmax": {"encoder_reuse_attention": [False, True, True], "encoder_reuse_softmax": True},
    "no norm": {"encoder_projection_layer_norm": False},
    "time reduction": {"encoder_time_reduction": 2},
    "reduced to a third": {"encoder_time_reduction": 3},
    "all": {
        **THIN,
        "encoder_use_projection": False,
        "encoder_projection_layer_norm": False,
        "encoder_time_reduction": 2,
        "encoder_reuse_attention": [False, True, False],
        "encoder_reuse_softmax": True,
    },
}
CASES = [
    pytest.param(architecture, changes, id=f"{architecture}-{name}")
    for architecture in ("hubert_base", "hubert_large", "wavlm_base")
    for name, changes in STUDENTS.items()
]

# where a case takes long: every day all that is special at once, each alone when there is time
LONG_CASES = [
    pytest.param(*case.values, id=case.id, marks=() if case.id.endswith("all") else pytest.mark.slow) for case in CASES
]


@pytest.mark.parametrize(("architecture", "changes"), CASES)
def test_file_round_trip(tiny, tmp_path, architecture, changes):
    model = tiny(architecture, **changes)
    save_model(tmp_path / "student.pth", model)
    loaded = load_model(tmp_path / "student.pth")
    waveforms = torch.randn(2, 400)
    for ours, theirs in zip(model.extract_features(waveforms)[0], loaded.extract_features(waveforms)[0], strict=True):
        assert torch.equal(ours, theirs)
    assert {key: loaded.config[key] for key in changes} == changes


def test_other_models_keep_the_released_keys(tiny):
    new = {key for changes in STUDENTS.values() for key in changes} - THIN.keys()
    assert len(new) == 5 and not new & tiny("hubert_base").config.keys() and not new & tiny("wavlm_base").config.keys()


@pytest.mark.parametrize(("architecture", "changes"), CASES)
def test_padded_rows_equal_the_rows_alone(tiny, architecture, changes):
    model = tiny(architecture, **changes)
    lengths = torch.tensor([700, 633, 402, 115, 35, 20])  # odd and even counts of frames, one frame, none
    waveforms = torch.randn(len(lengths), 700) * (torch.arange(700) < lengths[:, None])
    states, frames = model.extract_features(waveforms, lengths)
    assert frames.tolist() == model.output_length(lengths).tolist() and frames.tolist()[-2:] == [1, 0]
    for row, (length, count) in enumerate(zip(lengths.tolist(), frames.tolist())):
        assert states[-1][row].isfinite().all()
        if count == 0:
            continue
        alone, _ = model.extract_features(waveforms[row : row + 1, :length])
        for state, expected in zip(states, alone, strict=True):
            assert expected.shape[1] == count
            torch.testing.assert_close(state[row, :count], expected[0], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize(("architecture", "changes"), LONG_CASES)
def test_the_masked_model_is_the_pruned_model(tiny, architecture, changes):
    model = tiny(architecture, UNITS, **changes)
    costs = costs_of(model.config)
    waveforms, lengths = torch.randn(2, 500), torch.tensor([500, 333])
    for trial in range(12):
        certain = trial % 2 == 1
        for mask in model.masks().values():
            alive = torch.rand(len(mask)) < (0.2, 0.5, 0.9)[trial % 3]
            mask.log_alpha.data = torch.where(alive, 60.0, -60.0) if certain else 2 * torch.randn(len(mask))
        pruned, config = prune(model)
        for states in zip(*(m.extract_features(waveforms, lengths)[0] for m in (model, pruned)), strict=True):
            torch.testing.assert_close(*states, atol=1e-5, rtol=1e-5)
        assert prune(pruned)[1] == config and wav2vec2_model(**config).config == config
        if certain:
            num_params = sum(p.numel() for p in pruned.parameters())
            assert model.get_num_params().item() == pytest.approx(num_params, abs=1e-6)
            for name, cost in costs.items():
                assert cost(model).item() == pytest.approx(cost(pruned).item(), rel=1e-12), name


@pytest.mark.parametrize(("architecture", "changes"), LONG_CASES)
def test_expected_costs_are_means_over_samples(tiny, architecture, changes):
    model = tiny(architecture, UNITS, **changes)
    masks = list(model.masks().values())
    for mask in masks:
        mask.log_alpha.data -= 2.0
    alive = [torch.sigmoid(mask.log_alpha.detach().double() + 1.6) for mask in masks]
    costs = [costs_of(model.config)[name] for name in ("params", "macs")]

    def found(units: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([cost(model, dict(zip(masks, units)).__getitem__) for cost in costs])

    counts = torch.stack([found([torch.bernoulli(p) for p in alive]) for _ in range(400)])
    assert ((counts.mean(0) - found(alive)).abs() < 4 * counts.std(0) / 400**0.5).all()


@pytest.mark.parametrize(("architecture", "changes"), CASES)
def test_pruning_hits_a_wanted_size(tiny, architecture, changes):
    model = tiny(architecture, ("conv", "head", "interm"), **changes)
    wanted = round(0.6 * sum(p.numel() for p in prune(tiny(architecture, **changes))[0].parameters()))
    pruned, _ = prune(model, survivors_for_size(model, wanted))
    assert sum(p.numel() for p in pruned.parameters()) == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize(("architecture", "changes"), CASES)
def test_every_parameter_has_a_gradient_whatever_the_masks(tiny, architecture, changes):
    model = tiny(architecture, UNITS, **changes).train()
    for mask in model.masks().values():
        mask.log_alpha.data.fill_(-60.0)
    states, _ = model.extract_features(torch.randn(2, 300), torch.tensor([300, 250]))
    sum(state.square().mean() for state in states).backward()
    unused = {"encoder.transformer.upsampler", "encoder.transformer.layer_norm" if "large" in architecture else "-"}
    for name, p in model.named_parameters():
        if not any(name.startswith(module) for module in unused) and not name.endswith(("log_alpha", "dummy_weight")):
            assert p.grad is not None, name


# Reused maps


@pytest.mark.parametrize("form", [{}, {"encoder_reuse_softmax": True}], ids=["map", "softmax"])
@pytest.mark.parametrize("architecture", ["hubert_base", "hubert_large", "wavlm_base"])
def test_reuse_equals_layers_that_are_given_the_same_map(tiny, architecture, form):
    """The reusing layer is built with queries and keys of its own, and its softmax is replaced by the other's map."""
    student = tiny(architecture, encoder_reuse_attention=[False, True, False], **form)
    waveforms, lengths = torch.randn(2, 500), torch.tensor([500, 333])
    full = tiny(architecture)
    full.load_state_dict(student.state_dict(), strict=False)
    first, second = (full.encoder.transformer.layers[i].attention for i in (0, 1))
    kept: list[AttentionMap] = []
    first.keep_map = True
    first.register_forward_hook(lambda module, inputs, output: kept.append(output[1]))

    def with_the_map_of_the_first(module, inputs, output):
        v = module.v_proj(inputs[0]).unflatten(-1, (-1, module.head_dim)).transpose(1, 2)
        weights = kept[-1].weights
        if form:
            valid = torch.arange(weights.shape[-1]) < student.output_length(lengths)[:, None, None, None]
            weights = weights.exp() * valid / (weights.exp() * valid).sum(-1, keepdim=True)
        y = torch.einsum("bhqk,bhke->bqhe", weights, v).flatten(2)
        return torch.nn.functional.linear(y, module.out_proj.weight, module.out_proj.bias), None

    second.register_forward_hook(with_the_map_of_the_first)
    for state, expected in zip(
        student.extract_features(waveforms, lengths)[0], full.extract_features(waveforms, lengths)[0], strict=True
    ):
        torch.testing.assert_close(state, expected, atol=1e-6, rtol=1e-5)
    assert torch.allclose(kept[0].weights.sum(-1), torch.ones(())) and not hasattr(
        student.encoder.transformer.layers[1].attention, "q_proj"
    )


@pytest.mark.parametrize("architecture", ["hubert_base", "wavlm_large"])
def test_explicit_maps_change_nothing(tiny, architecture):
    model = tiny(architecture, ("head",))
    waveforms, lengths = torch.randn(2, 500), torch.tensor([500, 333])
    gates = model.draw_gates()
    fused, frames = model.run(waveforms, lengths, gates=gates)
    explicit, _ = model.run(waveforms, lengths, PassOptions(keep_maps=True), gates)
    assert fused.maps == [] and len(explicit.maps) == model.num_layers
    for states in zip(fused.layers, explicit.layers, strict=True):
        torch.testing.assert_close(*states, atol=1e-5, rtol=1e-5)
    for attention in explicit.maps:
        valid = attention[1, :, : frames[1]]
        torch.testing.assert_close(valid.sum(-1), torch.ones(attention.shape[1]))
        assert (attention[1, :, frames[1] :] == 0).all()


def test_reused_maps_do_not_drop_out(tiny):
    model = tiny("hubert_base", encoder_reuse_attention=[False, True, True], encoder_attention_dropout=0.5)
    x, gates = torch.randn(1, 6, 16), {}
    first, second, _ = (layer.attention.train() for layer in model.encoder.transformer.layers)
    (dropped, source), (again, _) = (first(x, None, None, gates) for _ in range(2))
    assert not torch.equal(dropped, again)
    assert torch.equal(second(x, None, None, gates, source)[0], second(x, None, None, gates, source)[0])


def test_a_layer_above_reuses_the_map_that_was_computed(tiny):
    """Not what the layer between has made of it; what each applies is what maps show."""
    model = tiny("hubert_base", encoder_reuse_attention=[False, True, True], encoder_reuse_softmax=True)
    first, second, third = model.run(torch.randn(1, 500), None, PassOptions(keep_maps=True))[0].maps
    assert torch.equal(second, third) and not torch.allclose(first, second, atol=1e-3)


def test_a_block_without_its_source_does_not_exist(tiny):
    model = tiny("hubert_base", ("head", "attlayer"), encoder_reuse_attention=[False, True, True])
    masks = model.masks()
    assert sum("heads" in name for name in masks) == 1 and sum("layer" in name.split(".")[-1] for name in masks) == 3
    for name, mask in masks.items():
        dies = name == "encoder.transformer.layers.0.attention.hard_concrete_for_layer"
        mask.log_alpha.data.fill_(-60.0 if dies else 60.0)
    pruned, config = prune(model)
    assert config["encoder_use_attention"] == [False] * 3 and config["encoder_reuse_attention"] == [False] * 3
    assert model.get_num_params().item() == sum(p.numel() for p in pruned.parameters())


# Time reduction


@pytest.mark.parametrize("num_samples", [115, 130, 135, 300, 301, 310, 325])
def test_frame_counts_are_those_of_the_full_rate(tiny, num_samples):
    model, full = tiny("hubert_base", encoder_time_reduction=2), tiny("hubert_base")
    waveforms = torch.randn(2, num_samples)
    expected = full.extract_features(waveforms)[0][0].shape[1]
    states, _ = model.extract_features(waveforms)
    assert {state.shape[1] for state in states} == {expected} and model(waveforms)[0].shape[1] == expected
    output, _ = model.run(waveforms)
    assert {state.shape[1] for state in output.layers} == {max(1, expected // 2)}
    held = [output.layers[0][:, min(t // 2, expected // 2 - 1)] for t in range(expected)]  # an odd last frame as before
    assert torch.equal(states[1], torch.stack(held, 1))
    whole = max(1, expected // 2 * 2)
    assert model.encoder.transformer.upsample(output.layers[0], whole).shape == states[1][:, :whole].shape


def test_reduced_frames_are_the_strided_convolution(tiny):
    model = tiny("hubert_base", encoder_time_reduction=2)
    transformer = model.encoder.transformer
    features = torch.randn(1, 7, 16)
    output = transformer.hidden_states(features, None, {})
    x = transformer.layer_norm(features + transformer.pos_conv_embed(features))[0]
    weight, bias = transformer.time_reduction.weight, transformer.time_reduction.bias
    expected = [weight[:, :, 0] @ x[2 * t] + weight[:, :, 1] @ x[2 * t + 1] + bias for t in range(3)]
    torch.testing.assert_close(output.layer_input[0], torch.stack(expected), atol=1e-5, rtol=1e-5)


# Masked frames and scaled gradients


def test_masked_frames_hide_their_features(tiny):
    model = tiny("hubert_base")
    waveforms = torch.randn(2, 500)
    num_frames = model.extract_features(waveforms)[0][0].shape[1]
    masked = torch.rand(2, num_frames) < 0.5
    embedding = torch.randn(16)
    features = model.run(waveforms, None, PassOptions(masked=masked, mask_embedding=embedding))[0].features
    assert torch.equal(features[masked], embedding.expand(int(masked.sum()), -1))
    assert torch.equal(features[~masked], model.extract_features(waveforms)[0][0][~masked])
    with pytest.raises(ValueError, match="no mask embedding"):
        model.run(waveforms, None, PassOptions(masked=masked))


def test_the_mask_embedding_of_a_file_is_the_models_own(tiny, tmp_path):
    model, embedding = tiny("hubert_base"), torch.randn(16)
    save_model(tmp_path / "teacher.pth", model, mask_embedding=embedding)
    checkpoint = load_checkpoint(tmp_path / "teacher.pth")
    assert torch.equal(checkpoint.extra["mask_embedding"], embedding)
    assert torch.equal(checkpoint.model.mask_embedding, embedding)
    assert checkpoint.model.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(copy.deepcopy(checkpoint.model).half().mask_embedding, embedding.half())
    save_model(tmp_path / "bad.pth", model, mask_embedding=torch.randn(15))
    with pytest.raises(CheckpointError, match="is not a vector of the model's width 16"):
        load_model(tmp_path / "bad.pth")


@pytest.mark.parametrize("form", ["paper", "released", None])
def test_scaled_gradients_are_products_of_factors(tiny, form):
    """Three losses with gradients a, b, c at the output of their layer: what reaches the input of layer 1 of each."""
    model = tiny("hubert_base")
    layers = model.encoder.transformer.layers
    for layer in layers:  # every layer the identity, so that gradients pass unchanged
        layer.forward = lambda x, *args, source=None: (x, None)
    losses, features = (2.0, 3.0, 7.0), torch.randn(1, 5, 16)
    factors = {
        None: (1, 1, 1),
        "paper": (1 / 3, 1 / 3, 1 / 3),  # own: 1/3, 1/2, 1; from above: 2/3, 1/2: a mean over the layers, not a sum
        # i counts from 0: trunk 3/4, 2/3, 1/2, of which the branch to the loss gets 1/4, 1/3, 1/2 besides
        "released": (3 / 4 * 1 / 4, 3 / 4 * 2 / 3 * 1 / 3, 3 / 4 * 2 / 3 * 1 / 2 * 1 / 2),
    }[form]
    output = model.encoder.transformer.hidden_states(features, None, {}, PassOptions(scale_gradients=form))
    for loss, state, factor in zip(losses, output.layers, factors, strict=True):
        (grad,) = torch.autograd.grad(loss * state.sum(), output.layer_input, retain_graph=True)
        torch.testing.assert_close(grad, torch.full_like(grad, loss * factor))


@pytest.mark.parametrize("units", [(), ("conv",)])
def test_the_extractors_gradient_is_scaled_alone(tiny, units):
    model = tiny("hubert_base", units)
    waveforms, gates, grads = torch.randn(2, 500), model.draw_gates(), []
    for factor in (1.0, 0.1, 0.0):
        output, _ = model.run(waveforms, None, PassOptions(extractor_gradient=factor), gates)
        parts = (model.feature_extractor.conv_layers[0].conv.weight, model.encoder.feature_projection.projection.weight)
        grads.append(torch.autograd.grad(output.layers[-1].square().sum(), parts))
    for (conv, projection), factor in zip(grads, (1.0, 0.1, 0.0)):
        torch.testing.assert_close(conv, factor * grads[0][0])
        torch.testing.assert_close(projection, grads[0][1])


# Configs


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_use_projection": False}, "8 channels cannot feed a width of 16"),
        ({"encoder_time_reduction": 0}, "encoder_time_reduction must be at least 1, got 0"),
        ({"encoder_reuse_softmax": True}, "encoder_reuse_softmax needs encoder_reuse_attention"),
        ({"normalize_waveform": 2.5}, "normalize_waveform must be true, false or a small number, got 2.5"),
        ({"encoder_reuse_attention": [False, True]}, "has 2 entries for 3 layers"),
        ({"encoder_reuse_attention": [True, False, False]}, "layer 0 has no earlier layer with the same heads"),
        (
            {"encoder_reuse_attention": [False, True, False], "encoder_num_heads": [4, 3, 4]},
            "layer 1 has no earlier layer with the same heads",
        ),
        ({"encoder_reuse_attention": [False, True, False], "encoder_layer_drop": 0.1}, "encoder_layer_drop must be 0"),
    ],
)
def test_configs_that_cannot_run_are_refused(tiny, changes, message):
    with pytest.raises(ValueError, match=message):
        tiny("hubert_base", **changes)
