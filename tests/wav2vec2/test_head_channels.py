"""Channels of heads that go one by one: the model written out, masked and pruned, counted, in files and in pieces."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.configs import TINY
from wav2vec2 import Wav2Vec2Model, load_model, prune, save_model, wav2vec2_model
from wav2vec2.architecture import architecture as units_left
from wav2vec2.architecture import format_architecture
from wav2vec2.attention import SelfAttention
from wav2vec2.checkpoint import add_masks
from wav2vec2.counting import count_params
from wav2vec2.feature_extractor import valid_frames
from wav2vec2.hardconcrete import sample
from wav2vec2.head_channels import HeadChannels, side_by_side, without_gaps
from wav2vec2.long_audio import long_states, statistics_of
from wav2vec2.pruning import survivors_for_size
from wav2vec2.windows import Window

ARCHITECTURES = ["hubert_base", "hubert_large", "wavlm_base", "wavlm_large"]
OTHERS = [(), ("conv", "interm"), ("interm", "attlayer", "ffnlayer")]
KINDS = ("query", "value")


class States(nn.Module):
    """All states of a model as its forward pass."""

    def __init__(self, model: Wav2Vec2Model) -> None:
        super().__init__()
        self.model = model

    def forward(self, waveforms: Tensor, lengths: Tensor | None) -> list[Tensor]:
        return self.model.extract_features(waveforms, lengths)[0]


def written_out(model: Wav2Vec2Model, waveforms: Tensor, lengths: Tensor | None, seed: int) -> list[Tensor]:
    """States of the network without masks whose weights are multiplied by the masks' samples."""
    masks = model.masks()
    torch.manual_seed(seed)
    values = sample(torch.cat([mask.log_alpha for mask in masks.values()]))
    z = dict(zip(masks, values.split([len(mask) for mask in masks.values()])))
    weights = {f"model.{name}": p for name, p in model.named_parameters() if not name.endswith("log_alpha")}
    for i, layer in enumerate(model.encoder.transformer.layers):
        prefix = f"encoder.transformer.layers.{i}.attention."
        of = {kind: z[f"{prefix}hard_concrete_for_{kind}_channels"].view(4, 4) for kind in KINDS}
        exists = ((of["query"] > 0).any(1) & (of["value"] > 0).any(1)).to(waveforms.dtype)
        query, value = ((gate * exists[:, None]).flatten() for gate in of.values())
        for name, gate in (("q_proj", query), ("k_proj", (query > 0).to(query)), ("v_proj", (value > 0).to(value))):
            for kind, weight in getattr(layer.attention, name).named_parameters():
                weights[f"model.{prefix}{name}.{kind}"] = weight * gate.view(-1, *[1] * (weight.dim() - 1))
        out = layer.attention.out_proj
        weights[f"model.{prefix}out_proj.weight"] = out.weight * value
        weights[f"model.{prefix}out_proj.bias"] = out.bias * exists.max()
    dense = wav2vec2_model(**{k: v for k, v in model.config.items() if "_prune_" not in k}).to(waveforms.dtype).train()
    return functional_call(States(dense), weights, (waveforms, lengths))


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_is_the_network_written_out(tiny, architecture, seed):
    model = tiny(architecture, ("head_channel",)).double().train()
    for mask in model.masks().values():
        mask.log_alpha.data -= 1.5  # many heads lack channels of one kind
    masks = model.masks()
    masks["encoder.transformer.layers.1.attention.hard_concrete_for_value_channels"].log_alpha.data.fill_(-20.0)
    lengths = torch.tensor([500, 380])
    waveforms = (torch.randn(2, 500) * valid_frames(lengths, 500)).double()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for valid in (None, lengths):
        expected = written_out(model, waveforms, valid, seed)
        torch.manual_seed(seed)
        states, _ = model.extract_features(waveforms, valid)
        for state, reference in zip(states, expected, strict=True):
            torch.testing.assert_close(state, reference, atol=1e-9, rtol=1e-9)
        grads = [
            torch.autograd.grad(
                sum((state.sin() * (i + 1)).sum() for i, state in enumerate(found)), parameters.values(),
                materialize_grads=True,
            )
            for found in (states, expected)
        ]  # fmt: skip
        for name, grad, reference in zip(parameters, *grads, strict=True):
            torch.testing.assert_close(grad, reference, atol=1e-8, rtol=1e-7, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("others", OTHERS, ids="-".join)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_masked_is_pruned_and_costs_what_is_expected(tiny, architecture, others):
    waveforms, lengths = torch.randn(2, 900), torch.tensor([900, 523])
    waveforms *= valid_frames(lengths, 900)
    for shift in (-2.0, 0.0, 3.0):
        model = tiny(architecture, ("head_channel", *others))
        for mask in model.masks().values():
            mask.log_alpha.data += shift if len(mask) > 1 else 0.0
        pruned, config = prune(model)
        assert not pruned.masks() and "encoder_prune_attention_head_channels" not in config
        with torch.no_grad():
            for arguments in ((waveforms,), (waveforms, lengths)):
                for state, other in zip(*(m.extract_features(*arguments)[0] for m in (model, pruned)), strict=True):
                    torch.testing.assert_close(state, other, atol=1e-5, rtol=0)
        for mask in model.masks().values():  # the same units for certain
            mask.log_alpha.data = torch.where(torch.rand(len(mask)) < 0.6, 60.0, -60.0)
        pruned, _ = prune(model)
        assert model.get_num_params().item() == pytest.approx(count_params(pruned), abs=1e-6)
        assert model.get_num_macs([900, 523]).item() == pytest.approx(pruned.get_num_macs([900, 523]).item(), rel=1e-12)


@pytest.mark.parametrize("architecture", ["hubert_base", "wavlm_large"])
def test_expectation_is_the_mean_over_samples(tiny, architecture):
    model = tiny(architecture, ("head_channel", "attlayer"))
    masks = list(model.masks().values())
    for mask in masks:
        mask.log_alpha.data -= 3.0
    with torch.no_grad():
        flat, sizes = torch.cat([mask.log_alpha for mask in masks]), [len(mask) for mask in masks]
        costs = (model.get_num_params, lambda alive=None: model.get_num_macs(900, alive))
        found = []
        for _ in range(400):
            drawn = dict(zip(masks, (sample(flat) > 0).double().split(sizes)))
            found.append(torch.stack([cost(drawn.__getitem__) for cost in costs]))
        counts, expected = torch.stack(found), torch.stack([cost() for cost in costs])
    assert ((counts.mean(0) - expected).abs() / (counts.std(0) / 400**0.5)).max() < 4


@pytest.mark.parametrize("seed", range(6))
def test_a_size_is_met_to_one_channel(tiny, seed):
    """No channel fits any more; scores of a head go together, and those of queries lie lower."""
    torch.manual_seed(seed)
    model = tiny("hubert_base", ("head_channel",))
    for name, mask in model.masks().items():
        heads = torch.randn(4, 1).repeat(1, 4).flatten() * 1.5 - 3.0 * name.endswith("query_channels")
        mask.log_alpha.data = heads + torch.randn(16)
    least = model.get_num_params(lambda mask: torch.zeros(len(mask))).item()
    most = model.get_num_params(lambda mask: torch.ones(len(mask))).item()
    for share in (0.1, 0.3, 0.5, 0.7, 0.9):
        wanted = round(least + share * (most - least))
        survivors = survivors_for_size(model, wanted)
        size = count_params(prune(model, survivors)[0])
        assert size <= wanted
        for mask, kept in survivors.items():
            for unit in (~kept).nonzero()[:, 0].tolist():
                more = {**survivors, mask: kept.clone()}
                more[mask][unit] = True
                with_it = model.get_num_params(lambda m, more=more: more[m].double()).item()
                assert with_it > wanted or with_it == size  # of a head without channels of the other kind


def ragged(architecture: str, tiny) -> Wav2Vec2Model:
    model, config = prune(tiny(architecture, ("head_channel",)))
    channels = config["encoder_head_channels"]
    assert len({tuple(pair) for layer in channels for pair in layer}) > 2, "heads differ"
    return model


@pytest.mark.parametrize("architecture", ["hubert_base", "wavlm_large"])
def test_files_pieces_graphs_and_further_pruning(tiny, architecture, tmp_path):
    model = ragged(architecture, tiny)
    waveforms = torch.randn(1, 16_000)
    with torch.no_grad():
        states, _ = model.extract_features(waveforms)
    save_model(tmp_path / "model.pth", model)
    again = load_model(tmp_path / "model.pth")
    with torch.no_grad():
        assert again.config == model.config and torch.equal(again.extract_features(waveforms)[0][-1], states[-1])

    graph = torch.export.export(States(model), (waveforms, None), strict=False).module()
    torch.testing.assert_close(graph(waveforms, None)[-1], states[-1], atol=1e-5, rtol=0)

    for flag in ("encoder_prune_attention_head_channels", "encoder_prune_feed_forward_intermediate"):
        masked = add_masks(model, **{flag: True}).eval()
        for mask in masked.masks().values():
            nn.init.normal_(mask.log_alpha, 1.0, 2.0)
        smaller, _ = prune(masked)
        pair = [m.extract_features(waveforms)[0][-1] for m in (masked, smaller)]
        torch.testing.assert_close(*pair, atol=1e-5, rtol=0)
        assert count_params(smaller) < count_params(model)
    with pytest.raises(ValueError, match="heads of unequal channels go neither with gates over whole heads"):
        add_masks(model, encoder_prune_attention_heads=True)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_long_audio(tiny, architecture):
    """In pieces, masked and pruned, with heads that are gone."""
    masked = tiny(architecture, ("head_channel",), normalize_waveform=False)
    for mask in masked.masks().values():
        mask.log_alpha.data -= 1.0
        mask.log_alpha.data[:4] = -20.0
    waveforms = torch.randn(1, 16_000)

    def read(begin: int, end: int) -> Tensor:
        return waveforms[0, begin:end]

    for model in (masked, prune(masked)[0]):
        with torch.no_grad():
            states, _ = model.extract_features(waveforms)
        num_frames = states[0].shape[1]
        found = [torch.zeros(num_frames, 16) for _ in states]
        window, statistics = Window(0, 16_000, 0, num_frames), statistics_of(model, read, 16_000, 1.0)
        for layer, first, values in long_states(model, read, window, range(len(states)), statistics, 1.0):
            found[layer][first : first + len(values)] = values
        for state, other in zip(found, states, strict=True):
            torch.testing.assert_close(state, other[0], atol=1e-4, rtol=1e-4)


def test_whole_heads_are_whole_heads(tiny):
    """Nothing in the file tells of channels where none is gone, or all are."""
    for log_alpha, heads in ((60.0, [4, 4, 4]), (-60.0, [0, 0, 0])):
        model = tiny("hubert_base", ("head_channel",))
        for mask in model.masks().values():
            mask.log_alpha.data.fill_(log_alpha)
        _, config = prune(model)
        assert "encoder_head_channels" not in config and config["encoder_num_heads"] == heads


def test_masks_change_nothing_before_they_drop_anything(tiny):
    model = tiny("wavlm_base", ())
    masked = add_masks(model, encoder_prune_attention_head_channels=True).eval()
    for mask in masked.masks().values():
        mask.log_alpha.data.fill_(60.0)
    waveforms = torch.randn(2, 900)
    torch.testing.assert_close(masked(waveforms)[0], model(waveforms)[0], atol=1e-5, rtol=0)
    assert masked.get_num_params().item() == pytest.approx(count_params(model))
    assert "encoder_head_channels" not in model.config and "encoder_prune_attention_head_channels" not in model.config


def test_every_mask_gets_a_gradient_whatever_is_drawn(tiny):
    """DDP waits for the same parameters on all ranks."""
    for shift in (-30.0, 0.0, 30.0):
        model = tiny("hubert_base", ("head_channel",)).train()
        for mask in model.masks().values():
            mask.log_alpha.data += shift
        model.extract_features(torch.randn(1, 900))[0][-1].sum().backward()
        trained = [p for name, p in model.named_parameters() if "attention" in name]
        assert all(p.grad is not None for p in trained)


def test_side_by_side_and_back():
    x = torch.randn(2, 5, 9)
    for counts in ((3, 3, 3), (4, 1, 4), (1, 2, 6)):
        width = max(counts)
        heads = side_by_side(x, counts, width)
        for head, part in enumerate(x.split(counts, -1)):
            assert torch.equal(heads[:, head, :, : counts[head]], part)
            assert not heads[:, head, :, counts[head] :].any()
        assert torch.equal(without_gaps(heads.transpose(1, 2).flatten(-2), counts, width), x)
    assert HeadChannels.read([[1, 2], [3, 4]]) == HeadChannels((1, 3), (2, 4))
    assert HeadChannels((1, 3), (2, 4)).config == [[1, 2], [3, 4]] and HeadChannels((1, 3), (2, 4)).width == 4


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"encoder_head_channels": [[[1, 1]] * 4] * 3}, "encoder_head_channels has 3 entries for 4 layers"),
        ({"encoder_head_channels": [[[1, 1]] * 3] * 4}, "two numbers from 1 for each of 4 heads"),
        ({"encoder_head_channels": [[[1, 0]] * 4] * 4}, "two numbers from 1 for each of 4 heads"),
        (
            {"encoder_prune_attention_heads": True, "encoder_prune_attention_head_channels": True},
            "go neither with gates over heads",
        ),
        (
            {"encoder_reuse_attention": [False, True] * 2, "encoder_layer_drop": 0.0,
             "encoder_prune_attention_head_channels": True},
            "nor with reused maps",
        ),
    ],
)  # fmt: skip
def test_refusals(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        wav2vec2_model(**copy.deepcopy(TINY | changes))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_the_table_of_units_says(tiny, architecture):
    model = tiny(architecture, ("head_channel",))
    pruned, config = prune(model)
    found = units_left(config)
    counted = [0 if block is None else sum(map(sum, block.all_channels)) for block in attention_of(pruned)]
    assert found.uneven and found.channels == counted and not units_left(model.config).uneven
    assert units_left(model.config).channels == [32] * 3
    reusing = {"encoder_reuse_attention": [False, True] * 2, "encoder_layer_drop": 0.0}
    assert units_left(wav2vec2_model(**TINY | reusing).config).channels == [48, 24, 48, 24]
    text = format_architecture(model.config, config)
    assert f"{'their channels':>18}" + "".join(f"{n:>7}" for n in found.channels) + "   of 32" in text.splitlines()


def attention_of(model: Wav2Vec2Model) -> list[SelfAttention | None]:
    return [layer.attention for layer in model.encoder.transformer.layers]
