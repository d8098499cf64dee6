"""The masked network is the pruned network, in eval and in training, and a dense network times its masks."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from wav2vec2 import Wav2Vec2Model, prune, pruning
from wav2vec2.attention import WavLMSelfAttention
from wav2vec2.checkpoint import add_masks
from wav2vec2.feature_extractor import valid_frames
from wav2vec2.hardconcrete import Gate, draw_gates, sample
from wav2vec2.model import normalize

ARCHITECTURES = ["hubert_base", "hubert_large", "wavlm_base", "wavlm_large"]
UNITS = ["conv", "head", "interm", "attlayer", "ffnlayer"]
COMBINATIONS = [c for n in range(6) for c in itertools.combinations(UNITS, n)]
DEAD = -20.0


def kill(model: Wav2Vec2Model, *names: str) -> None:
    """Drop every unit of these masks."""
    masks = model.masks()
    for name in names:
        masks[f"encoder.transformer.layers.{name}"].log_alpha.data.fill_(DEAD)


def heads(i: int) -> str:
    return f"{i}.attention.hard_concrete_for_heads"


def interm(i: int) -> str:
    return f"{i}.feed_forward.hard_concrete_for_intermediate"


def num_params(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@torch.no_grad()
def assert_same_function(model: Wav2Vec2Model, pruned: Wav2Vec2Model) -> None:
    """On every layer, padded and unpadded."""
    assert not model.training and not pruned.training and not pruned.masks()
    lengths = torch.tensor([900, 523])
    waveforms = torch.randn(2, 900) * valid_frames(lengths, 900)
    for arguments in ((waveforms,), (waveforms, lengths)):
        states, frames = model.extract_features(*arguments)
        pruned_states, pruned_frames = pruned.extract_features(*arguments)
        assert frames is pruned_frames is None or torch.equal(frames, pruned_frames)
        for state, pruned_state in zip(states, pruned_states, strict=True):
            assert (state - pruned_state).abs().max() < 1e-5
        assert (model(*arguments)[0] - pruned(*arguments)[0]).abs().max() < 1e-5


@pytest.mark.parametrize("units", COMBINATIONS, ids="-".join)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_masked_equals_pruned(tiny, architecture, units):
    model = tiny(architecture, units)
    pruned, config = prune(model)
    assert_same_function(model, pruned)
    assert num_params(pruned) < num_params(model) or not units or set(units) <= {"attlayer", "ffnlayer"}
    assert config is pruned.config and not any(value is True for key, value in config.items() if "_prune_" in key)


CASUALTIES = {
    "heads of layer 0": [heads(0)],
    "heads of layers 1 and 2": [heads(1), heads(2)],
    "all heads": [heads(0), heads(1), heads(2)],
    "FFN units of layer 1": [interm(1)],
    "all FFN units": [interm(0), interm(1), interm(2)],
    "attention of layer 0": ["0.attention.hard_concrete_for_layer"],
    "attention and FFN of layer 1": ["1.attention.hard_concrete_for_layer", "1.feed_forward.hard_concrete_for_layer"],
    "everything": [f(i) for f in (heads, interm) for i in range(3)],
}


@pytest.mark.parametrize("casualties", CASUALTIES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_masked_equals_pruned_with_blocks_gone(tiny, flags, architecture, casualties):
    model = tiny(architecture, tuple(flags))
    kill(model, *CASUALTIES[casualties])
    pruned, config = prune(model)
    assert_same_function(model, pruned)
    for i in range(3):
        gone = heads(i) in CASUALTIES[casualties] or f"{i}.attention.hard_concrete_for_layer" in CASUALTIES[casualties]
        keeps_bias = gone and architecture.startswith("wavlm") and i == 0 and "all" not in casualties
        keeps_bias = keeps_bias and casualties != "everything"
        assert config["encoder_use_attention"][i] == (not gone or keeps_bias)
        gone = interm(i) in CASUALTIES[casualties] or (i == 1 and casualties == "attention and FFN of layer 1")
        assert config["encoder_use_feed_forward"][i] == (not gone)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_conv_layers_keep_one_channel(tiny, architecture):
    model = tiny(architecture, ("conv",))
    for mask in model.masks().values():
        mask.log_alpha.data.sub_(30.0)
    pruned, config = prune(model)
    assert [channels for channels, _, _ in config["extractor_conv_layer_config"]] == [1, 1, 1]
    assert_same_function(model, pruned)


# --- training: the slices against a dense network times its masks ---


class Dense:
    """The same network written densely: every unit is computed and multiplied by its gate z [n], zeros included.

    Norms over the channels take their statistics from the living ones.
    """

    def __init__(self, model: Wav2Vec2Model, seed: int) -> None:
        masks = list(model.masks().values())
        torch.manual_seed(seed)
        values = sample(torch.cat([mask.log_alpha for mask in masks]))
        self.z = dict(zip(masks, values.split([len(mask) for mask in masks])))
        self.model = model

    def gate(self, mask, num_units: int) -> Tensor:
        return self.model.feature_extractor.dummy_weight.new_ones(num_units) if mask is None else self.z[mask]

    def layer_norm(self, x: Tensor, norm, alive: Tensor) -> Tensor:
        mean = (x * alive).sum(-1, keepdim=True) / alive.sum()
        variance = ((x - mean).square() * alive).sum(-1, keepdim=True) / alive.sum()
        return ((x - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias) * alive

    def attention(self, block, x: Tensor, position_bias: Tensor | None) -> Tensor:
        z, layer = self.gate(block.hard_concrete_for_heads, 4), self.gate(block.hard_concrete_for_layer, 1)
        q, k, v = (p(x).unflatten(-1, (4, 4)).transpose(1, 2) for p in (block.q_proj, block.k_proj, block.v_proj))
        scores = q @ k.transpose(-1, -2) / math.sqrt(4)
        if isinstance(block, WavLMSelfAttention):
            a, b = block.gru_rel_pos_linear(x.unflatten(-1, (4, 4))).unflatten(-1, (2, 4)).sum(-1).sigmoid().unbind(-1)
            const = block.gru_rel_pos_const.flatten()
            scores = scores + (a * (b * const - 1) + 2).transpose(1, 2)[..., None] * position_bias
        heads = (scores.softmax(-1) @ v) * z[:, None, None]
        exists = (z > 0).any().to(x.dtype)
        return block.out_proj(heads.transpose(1, 2).flatten(2)) * exists * layer

    def feed_forward(self, block, x: Tensor) -> Tensor:
        z, layer = self.gate(block.hard_concrete_for_intermediate, 24), self.gate(block.hard_concrete_for_layer, 1)
        exists = (z > 0).any().to(x.dtype)
        return block.output_dense(F.gelu(block.intermediate_dense(x)) * z) * exists * layer

    def states(self, x: Tensor) -> list[Tensor]:
        model, transformer = self.model, self.model.encoder.transformer
        x = (normalize(x, None, model.normalize_eps) if model.normalize_waveform else x)[:, None]
        z = x.new_ones(1)
        for layer in model.feature_extractor.conv_layers:
            x = F.conv1d(x * z[:, None], layer.conv.weight, layer.conv.bias, layer.conv.stride)
            z = self.gate(layer.hard_concrete, layer.conv.out_channels)
            if isinstance(layer.layer_norm, torch.nn.LayerNorm):
                x = self.layer_norm(x.mT, layer.layer_norm, (z > 0).to(x.dtype)).mT
            elif layer.layer_norm is not None:
                x = layer.layer_norm(x)
            x = F.gelu(x)
        projection = model.encoder.feature_projection
        x = x.mT * z * model.feature_extractor.dummy_weight
        x = projection.projection(self.layer_norm(x, projection.layer_norm, (z > 0).to(x.dtype)))
        states = [x]
        x = x + transformer.pos_conv_embed(x)
        first = transformer.layer_norm_first
        x = x if first else transformer.layer_norm(x)
        source = transformer.position_block()
        bias = None if source is None else source.position_bias(x.shape[1])
        for layer in transformer.layers:
            x = x + self.attention(layer.attention, layer.layer_norm(x) if first else x, bias)
            x = x if first else layer.layer_norm(x)
            x = x + self.feed_forward(layer.feed_forward, layer.final_layer_norm(x) if first else x)
            x = x if first else layer.final_layer_norm(x)
            states.append(x)
        return states


def training_model(tiny, flags, architecture: str) -> Wav2Vec2Model:
    """Half of the units die in a draw, among them all of some blocks."""
    model = tiny(architecture, tuple(flags)).double().train()
    kill(model, heads(1), interm(0), "2.feed_forward.hard_concrete_for_layer")
    return model


def loss_of(states: list[Tensor]) -> Tensor:
    """Depends on every element of every state."""
    generator = torch.Generator().manual_seed(5)
    return sum((state * torch.randn(state.shape, generator=generator, dtype=state.dtype)).sum() for state in states)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_equals_a_dense_network_times_its_masks(tiny, flags, architecture, seed):
    model = training_model(tiny, flags, architecture)
    waveforms = torch.randn(2, 500, dtype=torch.float64)
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = Dense(model, seed).states(waveforms)
    expected_grads = torch.autograd.grad(loss_of(expected), parameters.values(), materialize_grads=True)
    torch.manual_seed(seed)
    states, _ = model.extract_features(waveforms)
    grads = torch.autograd.grad(loss_of(states), parameters.values(), materialize_grads=True)
    for state, reference in zip(states, expected, strict=True):
        torch.testing.assert_close(state, reference, atol=1e-9, rtol=1e-9)
    for name, grad, reference in zip(parameters, grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, reference, atol=1e-8, rtol=1e-7, msg=lambda text, name=name: f"{name}: {text}")
    log_alpha_grads = [grad for name, grad in zip(parameters, grads) if name.endswith("log_alpha")]
    assert any(grad.any() for grad in log_alpha_grads)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rounded_sizes_change_nothing(tiny, flags, architecture):
    """As on a GPU: units with gate 0 that round the size up, where no norm sees them, give and get nothing."""
    model = training_model(tiny, flags, architecture)
    waveforms = torch.randn(2, 500, dtype=torch.float64)
    masks = model.masks()
    runs, drawn = [], []
    for multiple in (1, 8):
        torch.manual_seed(1)
        gates = draw_gates(masks.values(), training=True, multiple=multiple)
        states, _ = model.extract_features(waveforms, gates=gates)
        parameters = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss_of(states), parameters, materialize_grads=True)
        runs.append((states, grads))
        drawn.append({name: gates[mask].num_live for name, mask in masks.items()})
    for name, mask in masks.items():
        exact, rounded = drawn[0][name], drawn[1][name]
        no_norm = [f"conv_layers.{i}." for i in range(len(model.feature_extractor.conv_layers) - 1)]
        paddable = ["hard_concrete_for_intermediate", *(no_norm if architecture.endswith("base") else [])]
        wanted = min(len(mask), -(-exact // 8) * 8) if any(part in name for part in paddable) else exact
        assert rounded == wanted, name
    assert drawn[0] != drawn[1]
    for left, right in zip(runs[0][0], runs[1][0], strict=True):
        torch.testing.assert_close(left, right, atol=1e-12, rtol=1e-12)
    for left, right in zip(runs[0][1], runs[1][1], strict=True):
        torch.testing.assert_close(left, right, atol=1e-11, rtol=1e-9)
    evaluated = draw_gates(masks.values(), training=False, multiple=8)
    assert all(evaluated[m].num_live == g.num_live for m, g in draw_gates(masks.values(), training=False).items())


def prune_with(model: Wav2Vec2Model, gates, monkeypatch) -> Wav2Vec2Model:
    """The dense model of these gates instead of the eval ones."""
    monkeypatch.setattr(pruning, "draw_gates", lambda *_, **__: gates)
    return prune(model)[0]


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_equals_the_pruned_network(tiny, flags, architecture, seed, monkeypatch):
    model = training_model(tiny, flags, architecture)
    waveforms = torch.randn(2, 500, dtype=torch.float64)
    lengths = torch.tensor([500, 300])
    torch.manual_seed(seed)
    gates = model.draw_gates()
    states, _ = model.extract_features(waveforms, lengths, gates=gates)
    loss_of(states).backward()
    pruned = prune_with(model, gates, monkeypatch).train()
    pruned_states, _ = pruned.extract_features(waveforms, lengths)
    loss_of(pruned_states).backward()
    for state, pruned_state in zip(states, pruned_states, strict=True):
        torch.testing.assert_close(state, pruned_state, atol=1e-10, rtol=1e-10)

    # where each pruned element comes from, and by what it was multiplied: prune numbers, then ones
    numbered, ones = copy.deepcopy(model), model
    without_values = {
        copied: Gate(gates[mask].index, None, gates[mask].num_live)
        for mask, copied in zip(model.masks().values(), numbered.masks().values())
    }
    for p in numbered.parameters():
        p.data = torch.arange(p.numel(), dtype=torch.float64).view(p.shape)
    origin = dict(prune_with(numbered, without_values, monkeypatch).named_parameters())
    for p in ones.parameters():
        p.data = torch.ones_like(p)
    factor = dict(prune_with(ones, gates, monkeypatch).named_parameters())
    pruned_grads = {name: p.grad for name, p in pruned.named_parameters()}
    for name, p in model.named_parameters():
        if name.endswith(("log_alpha", "dummy_weight")) or p.grad is None:
            continue
        expected = torch.zeros_like(p).flatten()
        if name in origin:
            expected[origin[name].long().flatten()] = (pruned_grads[name] * factor[name]).flatten()
        torch.testing.assert_close(p.grad.flatten(), expected, atol=1e-9, rtol=1e-8, msg=lambda t, n=name: f"{n}: {t}")
        assert not p.grad.flatten()[expected == 0].any(), f"{name}: dead units have a gradient"


STUDENT = {"encoder_time_reduction": 2, "encoder_reuse_attention": [False, True, True]}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("changes", [{}, STUDENT], ids=["", "student"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dead_units_are_never_read(tiny, flags, architecture, changes, training, monkeypatch):
    """Whatever has a gate of 0 may be NaN: neither states nor gradients show it."""
    model = tiny(architecture, tuple(flags), **changes).double().train(training)
    kill(model, heads(0) if not changes else interm(1), interm(0))
    waveforms, lengths = torch.randn(2, 500, dtype=torch.float64), torch.tensor([500, 300])
    gates = model.draw_gates()
    learned = [p for p in model.parameters() if p.requires_grad]

    def run() -> tuple[Tensor, ...]:
        states, _ = model.extract_features(waveforms, lengths, gates=gates)
        grads = torch.autograd.grad(loss_of(states), learned, retain_graph=True, materialize_grads=True)
        return (*states, *grads)

    expected = run()
    numbered = copy.deepcopy(model)
    for p in numbered.parameters():
        p.data = torch.arange(p.numel(), dtype=torch.float64).view(p.shape)
    plain = {
        copied: Gate(gates[mask].index, None, gates[mask].num_live)
        for mask, copied in zip(model.masks().values(), numbered.masks().values())
    }
    lives = dict(prune_with(numbered, plain, monkeypatch).named_parameters())
    dead = 0
    for name, p in model.named_parameters():
        if not name.endswith("log_alpha"):
            kept = torch.zeros(p.numel(), dtype=torch.bool)
            kept[lives[name].long().flatten() if name in lives else []] = True
            p.data.flatten()[~kept] = torch.nan
            dead += int((~kept).sum())
    assert dead > num_params(model) / 10
    assert all(torch.equal(found, wanted) for found, wanted in zip(run(), expected, strict=True))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_gets_a_gradient_with_everything_dead(tiny, flags, architecture):
    """Ranks draw different masks, and DDP waits for the same gradients on all of them."""
    model = tiny(architecture, tuple(flags)).train()
    kill(model, *CASUALTIES["everything"])
    unused = {"encoder.transformer.layer_norm.weight", "encoder.transformer.layer_norm.bias"}  # in hidden states

    def without_gradient(network: Wav2Vec2Model) -> set[str]:
        found = {name for name, p in network.named_parameters() if p.requires_grad and p.grad is None}
        network.zero_grad()
        return found

    waveforms = torch.randn(2, 500)
    model.extract_features(waveforms)[0][-1].sum().backward()
    assert without_gradient(model) == (unused if architecture.endswith("large") else set())
    model(waveforms)[0].sum().backward()
    assert without_gradient(model) == set()
    pruned = prune(model)[0].train()  # the norms before missing blocks are still there
    pruned(waveforms)[0].sum().backward()
    assert without_gradient(pruned) == set()
    model.encoder.transformer.layer_drop = 1.0
    model(waveforms)[0].sum().backward()
    assert without_gradient(model) == set()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_in_eval_mode(tiny, flags, architecture):
    model = tiny(architecture, tuple(flags))
    model.extract_features(torch.randn(1, 500))[0][-1].square().sum().backward()
    assert any(mask.log_alpha.grad.any() for mask in model.masks().values())


# --- prune() ---


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_in_memory_stays_as_it_was(tiny, flags, architecture):
    model, waveforms = tiny(architecture, tuple(flags)), torch.randn(1, 500)
    state, config = copy.deepcopy(model.state_dict()), copy.deepcopy(model.config)
    pruned, _ = prune(model)
    for p in pruned.parameters():
        p.data.zero_()
    assert model.config == config
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    model.train().extract_features(waveforms)[0][-1].sum().backward()
    assert {name: p.requires_grad for name, p in pruned.named_parameters() if not p.requires_grad} == {
        "feature_extractor.dummy_weight": False
    }


def test_the_mask_embedding_outlives_pruning(tiny):
    model = tiny("hubert_base", ("head",))
    assert prune(model)[0].mask_embedding is None
    model.mask_embedding = torch.randn(16)
    assert torch.equal(prune(model)[0].mask_embedding, model.mask_embedding)


def test_training_after_inference_mode(tiny):
    """What a validation leaves behind in the layers must not be tensors that gradients refuse."""
    model = prune(tiny("wavlm_base", ("head",)))[0]
    assert any(0 < layer.attention.num_heads < 4 for layer in model.encoder.transformer.layers)
    with torch.inference_mode():
        model(torch.randn(1, 400))
    model.train()(torch.randn(1, 400))[0].sum().backward()
    copy.deepcopy(model)


def test_pruning_draws_no_random_numbers_and_keeps_the_dtype(tiny, flags):
    model = tiny("wavlm_base", tuple(flags)).double()
    before = torch.get_rng_state()
    pruned, _ = prune(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert {p.dtype for p in pruned.parameters()} == {torch.float64}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pruning_twice(tiny, flags, architecture):
    model = tiny(architecture, tuple(flags))
    kill(model, heads(0), interm(2))
    once, _ = prune(model)
    masked = add_masks(once, **dict.fromkeys(flags.values(), True)).eval()
    for mask in masked.masks().values():
        torch.nn.init.normal_(mask.log_alpha, 0.0, 2.0)
    kill(masked, heads(2))
    twice, config = prune(masked)
    assert num_params(twice) < num_params(once)
    assert_same_function(masked, twice)
    if architecture.startswith("wavlm"):
        first, second = once.config["encoder_remaining_heads"], config["encoder_remaining_heads"]
        assert all(set(after) <= set(before) for before, after in zip(first, second))
        assert second[0] == second[2] == []
    again, config_again = prune(twice)  # nothing left to prune: a copy
    assert config_again == config
    assert_same_function(twice, again)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_adding_masks_keeps_the_network(tiny, flags, architecture):
    model = tiny(architecture)
    masked = add_masks(model, **dict.fromkeys(flags.values(), True)).eval()
    assert len(masked.masks()) == 3 + 3 * 4
    for mask in masked.masks().values():
        mask.log_alpha.data.fill_(60.0)
    assert_same_function(masked, model)
    only_heads = add_masks(model, encoder_prune_attention_heads=True)
    assert [name.rsplit(".", 1)[1] for name in only_heads.masks()] == ["hard_concrete_for_heads"] * 3
    assert all(torch.equal(t, only_heads.state_dict()[n]) for n, t in model.state_dict().items())


def test_removed_heads_of_layer_0_leave_the_position_bias(tiny):
    """In the released system the layers above lose it."""
    model = tiny("wavlm_base", ("head",))
    kill(model, heads(0))
    pruned, config = prune(model)
    assert config["encoder_remaining_heads"][0] == []
    assert [name for name in pruned.state_dict() if "layers.0.attention" in name] == [
        "encoder.transformer.layers.0.attention.rel_attn_embed.weight"
    ]
    assert_same_function(model, pruned)
    waveforms = torch.randn(1, 500)
    with torch.no_grad():
        before = pruned.extract_features(waveforms)[0][-1]
        pruned.encoder.transformer.layers[0].attention.rel_attn_embed.weight.zero_()
        assert (pruned.extract_features(waveforms)[0][-1] - before).abs().max() > 1e-3
