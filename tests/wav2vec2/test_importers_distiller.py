"""DistilHuBERT in the layout of s3prl: every layer and prediction as its class computes them, and wrong turns."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from distillation.objectives.layer_to_layer import PredictionLayer
from evaluation.s3prl_upstream import entry
from tests.released_students import foreign, importable
from wav2vec2 import CheckpointError, Wav2Vec2Model, wav2vec2_model
from wav2vec2.checkpoint import load_checkpoint, model_from_state, save_model
from wav2vec2.importers import import_distiller, load_pickled, recognise

PUBLISHED = {
    "extractor_mode": "default", "extractor_conv_feature_layers": "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2",
    "extractor_dropout": 0.0, "feature_grad_mult": 0.1, "conv_pos": 128, "conv_pos_groups": 16, "encoder_layers": 2,
    "encoder_embed_dim": 768, "encoder_ffn_embed_dim": 3072, "encoder_attention_heads": 12, "activation_fn": "gelu",
    "layer_norm_first": False, "attention_type": "original", "dropout": 0.1, "attention_dropout": 0.1,
    "activation_dropout": 0.1, "encoder_layerdrop": 0.0, "final_dim": 768, "out_layer_type": "expand-last",
    "n_tasks": 3, "task_emb_type": "expand-last", "loss_type": "l1", "feat_pen_loss": 0.0, "cosine_loss": 1.0,
    "pred_layer_id": [4, 8, 12], "init_teacher_conv_layers": True, "init_teacher_encoder_layers": True,
}  # fmt: skip
CONV_LAYERS = [(8, 10, 5), *[(8, 3, 2)] * 4, *[(12, 2, 2)] * 2]
TINY = PUBLISHED | {
    "extractor_conv_feature_layers": "[(8,10,5)] + [(8,3,2)] * 4 + [(12,2,2)] * 2", "conv_pos": 16,
    "conv_pos_groups": 4, "encoder_embed_dim": 16, "encoder_ffn_embed_dim": 24, "encoder_attention_heads": 4,
    "final_dim": 20,
}  # fmt: skip
NO_PROJECTION = {"extractor_conv_feature_layers": "[(8,10,5)] + [(8,3,2)] * 4 + [(16,2,2)] * 2"}


def shapes(settings: dict[str, Any], conv_layers: list[tuple[int, int, int]]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the file by its name there."""
    width, ffn, out = settings["encoder_embed_dim"], settings["encoder_ffn_embed_dim"], settings["final_dim"]
    kernel, groups, count = settings["conv_pos"], settings["conv_pos_groups"], settings["n_tasks"]
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        found.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    channels = 1
    for i, (outputs, size, _) in enumerate(conv_layers):
        found[f"feature_extractor.conv_layers.{i}.0.weight"] = (outputs, channels, size)
        channels = outputs
    found |= {f"feature_extractor.conv_layers.0.2.{kind}": (conv_layers[0][0],) for kind in ("weight", "bias")}
    if channels != width:
        linear("post_extract_proj", channels, width)
    found |= {"encoder.pos_conv.0.bias": (width,), "encoder.pos_conv.0.weight_g": (1, 1, kernel)}
    found["encoder.pos_conv.0.weight_v"] = (width, width // groups, kernel)
    norms = ["encoder.layer_norm"]
    for i in range(settings["encoder_layers"]):
        layer = f"encoder.layers.{i}"
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            linear(f"{layer}.self_attn.{projection}", width, width)
        linear(f"{layer}.fc1", width, ffn)
        linear(f"{layer}.fc2", ffn, width)
        norms += [f"{layer}.self_attn_layer_norm", f"{layer}.final_layer_norm"]
    found |= {f"{norm}.{kind}": (width,) for norm in norms for kind in ("weight", "bias")}
    if settings["out_layer_type"] == "expand-last":
        linear("output_layer.0", width, width * count)
        if count == 1:
            linear("output_layer.2.layer", width, out)
        else:
            found |= {"output_layer.2.weight": (count, width, out), "output_layer.2.bias": (1, 1, count, out)}
    return found


def state_of(settings: dict[str, Any], conv_layers: list[tuple[int, int, int]]) -> dict[str, Tensor]:
    """Random tensors, none of them at its start value."""
    torch.manual_seed(0)
    return {
        name: torch.randn(shape) * 0.3 + ("norm.weight" in name or name.endswith("0.2.weight"))
        for name, shape in shapes(settings, conv_layers).items()
    }


def distiller(state: dict[str, Any], settings: dict[str, Any] | None = None, **others: Any) -> dict[str, Any]:
    """What s3prl writes around the tensors."""
    sections = {"teacher": {"model": "hubert_base", "n_layers": 12}, "task": {"sequence_length": 250000}}
    return {"Config": {"distiller": settings or TINY, **sections}, "Distiller": state, "Step": 200000, **others}


@torch.no_grad()
def forward(
    tensors: dict[str, Tensor], settings: dict[str, Any], conv_layers: list[tuple[int, int, int]], waveform: Tensor
) -> tuple[list[Tensor], list[Tensor]]:
    """Of one waveform [N], one formula a line.

    Returns:
        The Transformer's input and the layers, each [T, D]; the predictions, each [T, E].
    """

    def affine(name: str, x: Tensor) -> Tensor:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    x = waveform[None]
    for i, (_, kernel, stride) in enumerate(conv_layers):
        windows = x.unfold(1, kernel, stride)  # [c, T, k]
        x = torch.einsum("ctk,dck->dt", windows, tensors[f"feature_extractor.conv_layers.{i}.0.weight"])
        if i == 0:  # one group per channel: over time
            x = (x - x.mean(1, keepdim=True)) / (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
            weight, bias = (tensors[f"feature_extractor.conv_layers.0.2.{kind}"] for kind in ("weight", "bias"))
            x = x * weight[:, None] + bias[:, None]
        x = F.gelu(x)
    x = x.T
    if "post_extract_proj.weight" in tensors:
        x = affine("post_extract_proj", x)
    states = [x]
    kernel, v = settings["conv_pos"], tensors["encoder.pos_conv.0.weight_v"]
    weight = tensors["encoder.pos_conv.0.weight_g"] * v / v.square().sum((0, 1), keepdim=True).sqrt()
    padded, size = F.pad(x.T, (kernel // 2, kernel // 2 - 1)), v.shape[1]
    groups = [
        torch.einsum("ctk,dck->dt", inputs.unfold(1, kernel, 1), weights)
        for inputs, weights in zip(padded.split(size), weight.split(size), strict=True)
    ]
    position = torch.cat(groups) + tensors["encoder.pos_conv.0.bias"][:, None]
    x = norm("encoder.layer_norm", x + F.gelu(position).T)
    heads, size = settings["encoder_attention_heads"], x.shape[1] // settings["encoder_attention_heads"]
    for i in range(settings["encoder_layers"]):
        layer = f"encoder.layers.{i}"
        q, k, u = (affine(f"{layer}.self_attn.{name}_proj", x).split(size, 1) for name in "qkv")
        mixed = [(q[h] @ k[h].T / math.sqrt(size)).softmax(1) @ u[h] for h in range(heads)]
        x = norm(f"{layer}.self_attn_layer_norm", x + affine(f"{layer}.self_attn.out_proj", torch.cat(mixed, 1)))
        x = norm(f"{layer}.final_layer_norm", x + affine(f"{layer}.fc2", F.gelu(affine(f"{layer}.fc1", x))))
        states.append(x)
    if settings["out_layer_type"] == "none":
        return states, []
    hidden = F.gelu(affine("output_layer.0", x)).split(x.shape[1], 1)
    if len(hidden) == 1:
        return states, [affine("output_layer.2.layer", hidden[0])]
    weights, biases = tensors["output_layer.2.weight"], tensors["output_layer.2.bias"][0, 0]
    return states, [part @ w + b for part, w, b in zip(hidden, weights, biases, strict=True)]


@pytest.mark.parametrize("num_frames", [10, 11])
@pytest.mark.parametrize(
    ("changes", "channels"),
    [
        ({}, 12),
        (NO_PROJECTION, 16),
        ({"n_tasks": 1, "pred_layer_id": [12]}, 12),
        ({"out_layer_type": "none", "task_emb_type": "none"}, 12),
    ],
    ids=["published", "without projection", "one layer", "no heads"],
)
def test_every_layer_and_prediction_agrees(
    changes: dict, channels: int, num_frames: int, tmp_path: Path, teacher: Wav2Vec2Model
) -> None:
    settings, conv_layers = TINY | changes, [*CONV_LAYERS[:-2], *[(channels, 2, 2)] * 2]
    tensors, waveform = state_of(settings, conv_layers), torch.randn(400 + 320 * (num_frames - 1))
    found = import_distiller(distiller(tensors, settings))
    assert not found.dropped and found.mask_embedding is None and found.config["normalize_waveform"] is False
    save_model(tmp_path / "d.pth", model_from_state(found.config, found.state_dict, "test"), found.heads)
    loaded = load_checkpoint(tmp_path / "d.pth")
    states, predictions = forward(tensors, settings, conv_layers, waveform)
    with torch.no_grad():
        output = loaded.model.extract_features(waveform[None])[0]
    assert len(output) == len(states) == 3 and output[0].shape[1] == num_frames
    for ours, theirs in zip(output, states, strict=True):
        torch.testing.assert_close(ours[0], theirs, atol=1e-4, rtol=1e-4)

    layers = settings["pred_layer_id"] if predictions else []
    assert len(loaded.heads) == 4 * len(layers)
    if not layers:
        return
    config = PredictionLayer.Config(layers=[1] * len(layers), heads="two_linear")
    objective = PredictionLayer(config, loaded.model, teacher)
    objective.heads.load_state_dict(loaded.heads, strict=True)
    with torch.no_grad():
        for head, prediction in zip(objective.heads, predictions, strict=True):
            torch.testing.assert_close(head(output[-1])[0], prediction, atol=1e-4, rtol=1e-4)
        given = entry("distiller", str(tmp_path / "d.pth"))([waveform])["hidden_states"]
    for ours, theirs in zip(given, [*states, *predictions], strict=True):  # as s3prl's own expert
        torch.testing.assert_close(ours[0], theirs, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def teacher(tiny_config: Any) -> Wav2Vec2Model:
    """As wide as what is predicted."""
    return wav2vec2_model(**tiny_config("hubert_base", encoder_embed_dim=20, encoder_head_dim=5))


def test_published_size() -> None:
    conv_layers = [(512, 10, 5), *[(512, 3, 2)] * 4, *[(512, 2, 2)] * 2]
    state = {name: torch.empty(shape) for name, shape in shapes(PUBLISHED, conv_layers).items()}
    found = import_distiller(distiller(state, PUBLISHED))
    assert sum(tensor.numel() for tensor in found.state_dict.values()) == 23_491_200
    assert sum(tensor.numel() for tensor in found.heads.values()) == 3_543_552
    assert {name: list(tensor.shape) for name, tensor in found.heads.items() if name.startswith("2.")} == {
        "2.0.weight": [768, 768], "2.0.bias": [768], "2.2.weight": [768, 768], "2.2.bias": [768],
    }  # fmt: skip
    model_from_state(found.config, found.state_dict, "test")
    names = ("projection_dropout", "attention_dropout", "ff_interm_dropout", "dropout", "layer_drop")
    assert [found.config[f"encoder_{name}"] for name in names] == [0.0, 0.1, 0.1, 0.1, 0.0]
    assert found.config["encoder_projection_layer_norm"] is False


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("module", ["optimizers", "s3prl.optimizers"])
def test_a_file_that_holds_the_schedule(module: str, zipped: bool, tmp_path: Path) -> None:
    """Of a class that cannot be imported; older files name it without its package."""
    schedule = foreign(f"{module}.WarmupLinearSchedule")()
    vars(schedule).update(warmup=0.07, t_total=200000.0)
    optimizer = {"state": {0: {"step": 7}}, "param_groups": [{"lr": 2e-4, "schedule": schedule}]}
    content = distiller(state_of(TINY, CONV_LAYERS), Optimizer=optimizer, Args=argparse.Namespace(seed=1337))
    with importable():
        torch.save(content, tmp_path / "states.ckpt", _use_new_zipfile_serialization=zipped)
    assert module not in sys.modules
    read = load_pickled(tmp_path / "states.ckpt")
    layout = recognise(read)
    assert layout.name == "DistilHuBERT of s3prl" and not layout.has_settings
    found = layout.read(read, None, True)
    assert found.config["normalize_waveform"] is True
    assert torch.equal(found.heads["1.2.weight"], content["Distiller"]["output_layer.2.weight"][1].T)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_type": "sparse"}, "distiller.attention_type is 'sparse': only 'original' is supported"),
        ({"task_emb_type": "add"}, "distiller.task_emb_type is 'add': only 'expand-last' or 'none' is supported"),
        ({"task_emb_type": "concat-last"}, "distiller.task_emb_type is 'concat-last': only"),
        (
            {"task_emb_type": "none"},
            "distiller.task_emb_type is 'none': with an out_layer_type it must be 'expand-last'",
        ),
        ({"out_layer_type": "self-hidden"}, "distiller.out_layer_type is 'self-hidden': only"),
        ({"extractor_mode": "layer_norm"}, "distiller.extractor_mode is 'layer_norm': only 'default' is supported"),
        ({"layer_norm_first": True}, "distiller.layer_norm_first is 'True': only False is supported"),
        ({"activation_fn": "relu"}, "distiller.activation_fn is 'relu': only 'gelu' is supported"),
        ({"encoder_layers": 0}, "distiller.encoder_layers is 0, of a model with 52 tensors"),
        ({"n_tasks": 10**9}, "distiller.n_tasks is 1000000000, of a model with 52 tensors"),
        ({"encoder_layers": "2"}, "distiller.encoder_layers is '2': it must be of type int"),
        ({"dropout": None}, "distiller.dropout is 'None': it must be of type float"),
        ({"extractor_conv_feature_layers": "exit()"}, "conv_feature_layers 'exit()' is not a list of (channels"),
        ({"encoder_layers": 3}, "missing (encoder.transformer.layers.2"),
        ({"encoder_attention_heads": 3}, "3 attention heads do not divide the width 16"),
        ({"n_tasks": 2}, "output_layer.0.weight is no tensor of shape [32, 16]"),
        ({"n_tasks": 1}, "its heads do not fit the settings: missing output_layer.2.layer.bias"),
        ({"final_dim": 30}, "output_layer.2.weight is no tensor of shape [3, 16, 30]"),
        ({"out_layer_inter_dim": 8}, "output_layer.0.weight is no tensor of shape [24, 16]"),
    ],
)
def test_settings_that_do_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        found = import_distiller(distiller(state_of(TINY, CONV_LAYERS), TINY | changes))
        model_from_state(found.config, found.state_dict, "test")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"output_layer.3.bias": torch.ones(1)}, "its heads do not fit the settings: left over output_layer.3.bias"),
        (
            {"output_layer.0.bias": torch.ones(1).expand(48)},
            "output_layer.0.bias is no dense tensor with all of its 48",
        ),
        ({"output_layer.0.bias": 3}, "output_layer.0.bias is no tensor of shape [48]"),
        (
            {"encoder.layers.0.adapter.weight": torch.ones(1)},
            "'encoder.layers.0.adapter.weight' belongs to no known part",
        ),
        ({"layer_norm.weight": torch.ones(12)}, "1 unexpected (encoder.feature_projection.layer_norm.weight)"),
        ({"encoder.layer_norm.bias": "text"}, "'encoder.layer_norm.bias' is not a floating-point tensor"),
    ],
)
def test_tensors_left_over_or_broken(tensors: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        found = import_distiller(distiller(state_of(TINY, CONV_LAYERS) | tensors))
        model_from_state(found.config, found.state_dict, "test")
    assert message in str(error.value)


def test_what_is_dropped() -> None:
    """Another part of training, and heads of a file whose settings know of none."""
    extra = {"decoder.weight": torch.ones(1), "task_embedding.weight": torch.ones(3)}
    found = import_distiller(distiller(state_of(TINY, CONV_LAYERS) | extra))
    assert found.dropped == list(extra)
    settings = TINY | {"out_layer_type": "none"}
    found = import_distiller(distiller(state_of(TINY, CONV_LAYERS), settings))
    assert not found.heads and len(found.dropped) == 4


@pytest.mark.parametrize("content", [[], {"Config": {}}, {"Config": [], "Distiller": {}}, {"Distiller": {}}])
def test_files_of_another_kind(content: Any) -> None:
    with pytest.raises(CheckpointError, match="it has no 'Config' and 'Distiller': not a DistilHuBERT of s3prl"):
        import_distiller(content)
    with pytest.raises(CheckpointError, match="its Config has no section 'distiller'"):
        import_distiller({"Config": {"distiller": None}, "Distiller": {}})
