"""The released students' files: same function, every tensor used once, published sizes, misfits refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.released_students import (
    FULL_SIZE,
    TINY,
    lightning,
    released_states,
    settings_file,
    student_shapes,
    student_state,
)
from wav2vec2 import CheckpointError, load_model, save_model
from wav2vec2.checkpoint import load_checkpoint, model_from_state
from wav2vec2.importers.students import import_student


@pytest.mark.parametrize("num_frames", [1, 2, 12, 13])
@pytest.mark.parametrize("name", TINY)
def test_the_imported_student_computes_the_same(name: str, num_frames: int, tmp_path) -> None:
    """Alone, and as the shortest row of a padded batch of three."""
    if name == "fithubert" and num_frames == 1:
        return  # the released class cannot run it
    settings = TINY[name]
    tensors = student_state(settings)
    found = import_student(lightning(tensors), settings_file(settings))
    save_model(tmp_path / "student.pth", model_from_state(found.config, found.state_dict, "x"), found.heads)
    model = load_model(tmp_path / "student.pth")
    lengths = torch.tensor([400 + 320 * (num_frames - 1), 6000, 7300])
    padded = torch.randn(3, 7300) * (torch.arange(7300) < lengths[:, None])
    waveforms = padded[:1, : lengths[0]]
    exact = {key: tensor.double() for key, tensor in tensors.items()}
    expected = released_states(exact, settings, waveforms.double())
    with torch.no_grad():
        alone, _ = model.run(waveforms)
        batched, _ = model.run(padded, lengths)
    ours, rows = ([output.features, *output.layers] for output in (alone, batched))
    for state, row, theirs in zip(ours, rows, expected, strict=True):
        torch.testing.assert_close(state.double(), theirs, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(row[0, : theirs.shape[1]].double(), theirs[0], atol=2e-5, rtol=1e-5)
    assert expected[-1].shape[1] == (num_frames // 2 if name == "fithubert" else num_frames)


@pytest.mark.parametrize("name", TINY)
def test_every_tensor_is_used_once_or_named(name: str) -> None:
    tensors = student_state(TINY[name])
    final_proj = {"student_model.final_proj.weight": torch.ones(2, 16)} if name == "starhubert" else {}
    final_proj["metric.total"] = torch.ones(1)  # of no model
    found = import_student(lightning(tensors, **final_proj), settings_file(TINY[name]))
    dropped = {"teacher_model.model.mask_emb", "teacher_model.model.final_proj.weight"}
    assert set(found.dropped) == dropped | {key.removeprefix("student_model.") for key in final_proj}
    used = [*found.state_dict.values(), *found.heads.values()]
    assert sorted(t.data_ptr() for t in used) == sorted(t.data_ptr() for t in tensors.values())
    assert found.mask_embedding is None and found.config["normalize_waveform"] is False
    assert found.config["encoder_projection_dropout"] == 0.05


@pytest.mark.parametrize("name", TINY)
def test_heads_have_the_names_of_our_objectives(name: str) -> None:
    tensors = student_state(TINY[name])
    heads = import_student(lightning(tensors), settings_file(TINY[name])).heads
    renamed = {}
    for key, tensor in tensors.items():
        if key.startswith("proj_head."):
            renamed[key.removeprefix("proj_head.").replace("lin_proj", "linear")] = tensor
        if key == "mask_emb":
            renamed["mask_embedding"] = tensor
    assert heads.keys() == renamed.keys() and all(torch.equal(heads[key], renamed[key]) for key in heads)
    assert bool(heads) == (name != "starhubert")


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("fithubert", 31_629_632),
        ("maskhubert", 26_635_840),
        ("armhubert", 26_448_448),
        ("armhubert_s", 22_394_080),
        ("armwavlm_s", 22_394_080),
        ("starhubert", 22_308_592),
        ("starhubert_l", 26_630_752),
    ],
)
def test_published_sizes(name: str, total: int) -> None:
    settings = FULL_SIZE[name]
    shapes = student_shapes(settings)
    assert sum(map(math.prod, shapes.values())) == total
    tensors = {key: torch.empty(shape) for key, shape in shapes.items()}  # memory that is never touched
    found = import_student(lightning(tensors), settings_file(settings))
    model = model_from_state(found.config, found.state_dict, "x")
    backbone = sum(p.numel() for p in model.parameters()) - model.feature_extractor.dummy_weight.numel()
    assert backbone + sum(head.numel() for head in found.heads.values()) == total


def test_the_head_that_is_left_when_training_deletes_the_others() -> None:
    settings = FULL_SIZE["fithubert"]
    shapes = {
        key.replace("proj_head.11.", "final_proj."): shape
        for key, shape in student_shapes(settings).items()
        if not key.startswith("proj_head.") or key.startswith("proj_head.11.")
    }
    assert sum(map(math.prod, shapes.values())) == 22_492_064
    found = import_student(lightning({k: torch.empty(s) for k, s in shapes.items()}), settings_file(settings))
    assert found.heads.keys() == {f"0.{part}.{kind}" for part in ("upsampler", "linear") for kind in ("weight", "bias")}


def test_settings_that_a_file_leaves_out() -> None:
    settings = {k: v for k, v in TINY["starhubert"].items() if k.startswith(("conv_", "encoder_"))}
    found = import_student(lightning(student_state(settings)), settings_file(settings))
    assert found.config == import_student(
        lightning(student_state(TINY["starhubert"])), settings_file(TINY["starhubert"])
    ).config | {"encoder_projection_dropout": 0.0, "encoder_ff_interm_dropout": 0.0}


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("maskhubert", {"encoder_layers": None}, "'distiller' has no encoder_layers"),
        ("maskhubert", {"encoder_embed_dim": "16"}, "distiller.encoder_embed_dim is '16': it must be of type int"),
        ("maskhubert", {"encoder_layers": True}, "distiller.encoder_layers is 'True': it must be of type int"),
        ("maskhubert", {"dropout": [0.1]}, "distiller.dropout is '[0.1]': it must be of type float"),
        ("maskhubert", {"conv_feature_layers": "__import__('os').system('true')"}, "is not a list of (channels"),
        ("maskhubert", {"encoder_layers": 10**9}, "1000000000 layers in distiller"),
        ("maskhubert", {"encoder_layers": 2}, "left over proj_head.2.lin_proj.bias, proj_head.2.lin_proj.weight"),
        ("maskhubert", {"encoder_layers": 4}, "missing proj_head.3.lin_proj.bias, proj_head.3.lin_proj.weight"),
        ("maskhubert", {"pred_head_final_dim": 30}, "proj_head.0.lin_proj.weight is no tensor of shape [30, 16]"),
        ("maskhubert", {"enable_tr_layer": True}, "missing proj_head.0.upsampler.bias"),
        ("maskhubert", {"layer_type": "conformer"}, "layer_type='conformer' is not supported"),
        ("maskhubert", {"pos_conv_depth": 5}, "pos_conv_depth=5 is not supported"),
        ("maskhubert", {"n_mels": 80}, "distiller.n_mels is 80: only 0 is supported"),
        ("maskhubert", {"crop_seq_to_multiple": 2}, "distiller.crop_seq_to_multiple is 2: only 1 is supported"),
        ("maskhubert", {"reuse_pattern": "[True, False]"}, "reuse_pattern is '[True, False]': it must list"),
        ("maskhubert", {"reuse_pattern": "print(1)"}, "reuse_pattern is 'print(1)': it must list"),
        ("maskhubert", {"reuse_pattern": "[True, False, True]"}, "4 unexpected"),
        ("armhubert", {"reuse_pattern": "None"}, "5 missing (encoder.transformer.layers.1.attention.k_proj.bias"),
        ("armhubert", {"reuse_pattern": "[False, True, True]"}, "encoder_reuse_attention"),
        ("fithubert", {"tr_layer_type": "fc1"}, "distiller.tr_layer_type is 'fc1': only 'conv1d' is supported"),
        ("fithubert", {"tr_layer_index": 1}, "distiller.tr_layer_index is 1: only 0 is supported"),
        ("fithubert", {"tr_reduce_factor": 1}, "distiller.tr_reduce_factor is 1: it must be at least 2"),
        ("fithubert", {"enable_tr_layer": False}, "left over proj_head.0.upsampler.bias"),
        ("fithubert", {"encoder_ffn_embed_dim": 24}, "its config wants float [24"),
        ("starhubert", {"enable_tr_layer": True}, "'encoder.layers.0.self_attn.k_proj.weight' belongs"),
        ("starhubert", {"encoder_attention_heads": 3}, "3 attention heads do not divide the width 16"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit(name: str, changes: dict, message: str) -> None:
    tensors = student_state(TINY[name])
    with pytest.raises(CheckpointError) as error:
        found = import_student(lightning(tensors), settings_file(TINY[name] | changes))
        model_from_state(found.config, found.state_dict, "x")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_two_spellings_of_a_layer_are_not_taken_for_one() -> None:
    tensors = student_state(TINY["fithubert"]) | {"encoder.layers.01.fc1.bias": torch.ones(16)}
    with pytest.raises(CheckpointError, match=r"encoder\.transformer\.layers\.01\.feed_forward"):
        found = import_student(lightning(tensors), settings_file(TINY["fithubert"]))
        model_from_state(found.config, found.state_dict, "x")


def without(name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in student_state(TINY["maskhubert"]).items() if key != name}


def plus(**tensors: Tensor) -> dict[str, Tensor]:
    return student_state(TINY["maskhubert"]) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (without("encoder.layers.1.fc1.bias"), "missing (encoder.transformer.layers.1.feed_forward.intermediate"),
        (without("proj_head.1.lin_proj.bias"), "missing proj_head.1.lin_proj.bias"),
        (plus(encoder__adapter__weight=torch.ones(1)), "'encoder.adapter.weight' belongs to no known part"),
        (plus(encoder__layers__7__fc1__bias=torch.ones(1)), "1 unexpected (encoder.transformer.layers.7"),
        (plus(proj_head__0__extra=torch.ones(1)), "left over proj_head.0.extra"),
        (plus(mask_emb=torch.ones(3)), "mask embedding is no vector of the width 16"),
        (plus(proj_head__0__lin_proj__bias=torch.ones(20).to_sparse()), "is no dense tensor"),
        (plus(proj_head__0__lin_proj__bias=torch.ones(1).expand(20)), "is no dense tensor"),
        (plus(proj_head__0__lin_proj__bias=3), "proj_head.0.lin_proj.bias is no tensor of shape [20]"),  # type: ignore
        (plus() | {"encoder.layers.1.fc1.bias": "text"}, "is not a floating-point tensor"),
    ],
)  # fmt: skip
def test_tensors_missing_left_over_or_broken(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        found = import_student(lightning(tensors), settings_file(TINY["maskhubert"]))
        model_from_state(found.config, found.state_dict, "x")
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("checkpoint", "settings", "message"),
    [
        ([], {"distiller": {}}, "no 'state_dict'"),
        ({"state_dict": {"student.weight": torch.ones(1)}}, {"distiller": {}}, "no tensor is named student_model.*"),
        (lightning({}, other=torch.ones(1)) | {"epoch": 1}, {"distiller": {}}, "no tensor is named student_model.*"),
        (lightning({"a": torch.ones(1)}), {"student": {"thin": {}}}, "no section 'distiller'"),
        (lightning({"a": torch.ones(1)}), None, "no section 'distiller'"),
    ],
)
def test_files_of_another_kind(checkpoint: Any, settings: Any, message: str) -> None:
    with pytest.raises(CheckpointError) as error:
        import_student(checkpoint, settings)
    assert message in str(error.value)


def test_another_kind_of_head_is_dropped_by_name(tmp_path) -> None:
    """DistilHuBERT's, which the same code offers: one for all predicted layers; and what nobody knows."""
    settings = TINY["starhubert"] | {"layerwise_proj": False, "pred_layer_id": "[2]"}
    names = [
        "classifier.weight",
        "proj_head.0.weight",
        "proj_head.0.bias",
        "proj_head.2.layer.weight",
        "cnn_proj_head.1.weight",
    ]
    found = import_student(
        lightning(student_state(settings) | {name: torch.ones(1) for name in names}), settings_file(settings)
    )
    assert set(names) < set(found.dropped) and not found.heads
    save_model(tmp_path / "student.pth", model_from_state(found.config, found.state_dict, "x"), found.heads)
    assert load_checkpoint(tmp_path / "student.pth").heads == {}
