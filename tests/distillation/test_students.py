"""Students by config: what they are made of, what they weigh, and what is refused."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from distillation.build import starting_student
from distillation.config import parse_recipe
from distillation.errors import UserError
from distillation.sparsity import PruningConfig, make_prunable
from distillation.students import (
    CopiedLayers,
    StudentConfig,
    ThinStudent,
    UniformSlice,
    backbone_params,
    build_student,
    check_frame_rate,
)
from wav2vec2 import load_model, prune, save_model, wav2vec2_model
from wav2vec2.architecture import architecture


@pytest.fixture
def wavlm(tiny_config):
    config = {key: value for key, value in tiny_config.items() if key not in ("encoder_num_heads", "encoder_head_dim")}
    config |= {
        "encoder_total_num_heads": [4] * 4,
        "encoder_remaining_heads": [[0, 1, 2, 3], [0, 2, 3], [1, 2, 3], [0, 1, 2, 3]],
        "encoder_num_buckets": 16,
        "encoder_max_distance": 40,
    }
    return wav2vec2_model(**config).double().eval()


def params(model) -> int:
    return sum(p.numel() for p in model.parameters())


def states(model, seed: int = 0):
    torch.manual_seed(seed)
    return model.eval().extract_features(torch.randn(2, 3000, dtype=torch.float64))[0]


def test_by_default_a_student_is_a_copy(teacher):
    student = build_student(StudentConfig(), teacher.requires_grad_(False))
    for ours, theirs in zip(states(student), states(teacher), strict=True):
        assert torch.equal(ours, theirs)
    shared = {p.data_ptr() for p in teacher.parameters()} & {p.data_ptr() for p in student.parameters()}
    assert not shared and all(p.requires_grad for p in student.encoder.parameters())


# Thin


def test_thin_students_follow_their_config(teacher):
    sizes = {"num_layers": 3, "heads": 4, "ffn": 20, "channels": [6, 8, 12], "pos_conv_kernel": 8, "pos_conv_groups": 4}
    thin = ThinStudent(width=32, time_reduction=2, reuse_attention="released", **sizes)
    student = build_student(StudentConfig(thin=thin), teacher)
    found = architecture(student.config)
    assert (found.conv, found.heads, found.interm) == ([6, 8, 8, 8, 8, 8, 12, 12, 12], [4] * 3, [20] * 3)
    assert student.embed_dim == 32 and student.encoder.feature_projection.projection is not None
    assert [layer.attention.reuse for layer in student.encoder.transformer.layers] == [None, "softmax", None]
    paper = build_student(StudentConfig(thin=ThinStudent(width=32, reuse_attention="paper", **sizes)), teacher)
    assert [layer.attention.reuse for layer in paper.encoder.transformer.layers] == [None, "map", None]
    assert student.encoder.transformer.reduction == 2
    check_frame_rate(student, teacher, "student")
    same_width = build_student(StudentConfig(thin=ThinStudent(width=12, **sizes)), teacher)
    assert same_width.encoder.feature_projection.projection is None


def test_thin_students_start_as_published(teacher):
    torch.manual_seed(0)
    student = build_student(StudentConfig(thin=ThinStudent(num_layers=2)), teacher)
    for layer in student.encoder.transformer.layers:
        for linear in (m for m in layer.modules() if isinstance(m, torch.nn.Linear)):
            assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02) and not linear.bias.any()
    for block in student.feature_extractor.conv_layers:
        weight = block.conv.weight
        expected = (2 / (weight.shape[1] * weight.shape[2])) ** 0.5
        assert weight.std().item() == pytest.approx(expected, rel=0.1)
    position = student.encoder.transformer.pos_conv_embed.conv
    assert position.weight_v.std().item() == pytest.approx((4 / (128 * 480)) ** 0.5, rel=0.02)
    torch.manual_seed(0)
    again = build_student(StudentConfig(thin=ThinStudent(num_layers=2)), teacher)
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), again.parameters()))


def test_the_dummy_weight_counts_once_it_is_used(teacher):
    channels = teacher.feature_extractor.dummy_weight.numel()
    assert backbone_params(teacher) == params(teacher) - channels
    teacher.feature_extractor.dummy_weight.data[0] = 0.9
    assert backbone_params(teacher) == params(teacher)


# Copied layers


@pytest.mark.parametrize("chosen", [[1, 2], [2, 4], [4]])
@pytest.mark.parametrize("kind", ["hubert", "wavlm"])
def test_copied_layers_are_the_teachers(teacher, wavlm, kind, chosen):
    teacher = teacher if kind == "hubert" else wavlm
    student = build_student(StudentConfig(layers=CopiedLayers(chosen)), teacher)
    student.double()
    assert student.num_layers == len(chosen)
    features, layers = states(student)[0], student.encoder.transformer.layers
    assert torch.equal(features, states(teacher)[0])
    for ours, layer in zip(layers, chosen):
        theirs = dict(teacher.encoder.transformer.layers[layer - 1].named_parameters())
        for name, p in ours.named_parameters():
            if "rel_attn_embed" not in name:
                assert torch.equal(p, theirs[name].to(p.dtype))
    if kind == "wavlm":
        embedding = layers[0].attention.rel_attn_embed.weight
        assert torch.equal(embedding, teacher.encoder.transformer.layers[0].attention.rel_attn_embed.weight)
        assert student.config["encoder_remaining_heads"] == [
            teacher.config["encoder_remaining_heads"][layer - 1] for layer in chosen
        ]
    if chosen == [1, 2]:
        assert torch.allclose(states(student)[2], states(teacher)[2], atol=1e-6)


@pytest.mark.parametrize("kind", ["hubert", "wavlm"])
def test_copied_layers_between_the_norms_of_the_released_distilhubert(teacher, wavlm, kind):
    teacher = teacher if kind == "hubert" else wavlm
    config = CopiedLayers([1, 2], norms="released", ffn_dropout=0.3, input_dropout=0.2)
    student = build_student(StudentConfig(layers=config), teacher).double()
    assert (student.config["encoder_ff_interm_dropout"], student.config["encoder_projection_dropout"]) == (0.3, 0.2)
    ours, theirs = student.state_dict(), teacher.state_dict()
    fresh = {f"encoder.transformer.layer_norm.{kind}" for kind in ("weight", "bias")}
    gone = {f"encoder.feature_projection.layer_norm.{kind}" for kind in ("weight", "bias")}
    assert not gone & ours.keys() and all(torch.equal(ours[n], theirs[n].double()) for n in ours.keys() - fresh)
    norm = student.encoder.transformer.layer_norm
    assert (norm.weight == 1).all() and not norm.bias.any()
    waveforms = torch.randn(2, 3000, dtype=torch.float64)
    conv, _ = teacher.double().feature_extractor(waveforms, None, {})
    projection = teacher.encoder.feature_projection.projection
    torch.testing.assert_close(student.eval().extract_features(waveforms)[0][0], projection(conv))


@pytest.mark.parametrize("layers", [[], [0], [5], [2, 1], [1, 1]])
def test_layers_that_cannot_be_copied(teacher, layers):
    with pytest.raises(UserError, match=r"student.layers.layers is .*: name teacher layers in ascending order, 1 to 4"):
        build_student(StudentConfig(layers=CopiedLayers(layers)), teacher)


# Slices


@pytest.mark.parametrize("share", [0.25, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("kind", ["hubert", "wavlm"])
def test_slices_are_uniform_and_have_the_wanted_size(teacher, wavlm, kind, share):
    teacher = teacher if kind == "hubert" else wavlm
    wanted = round(share * params(teacher))
    student = build_student(StudentConfig(slice=UniformSlice(wanted)), teacher)
    unit = 2 * teacher.embed_dim + 1
    assert 0 <= wanted - params(student) <= unit
    found, full = architecture(student.config), architecture(teacher.config)
    kept = [[n / m for n, m in zip(getattr(found, name), getattr(full, name))] for name in ("conv", "heads", "interm")]
    assert max(kept[0]) - min(kept[0]) < 0.1 and max(found.interm) - min(found.interm) <= 1
    if kind == "hubert":
        assert len(set(found.heads)) == 1
    if share == 1.0:
        student.double()
        for ours, theirs in zip(states(student), states(teacher), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "config",
    [StudentConfig(), StudentConfig(layers=CopiedLayers([2])), StudentConfig(slice=UniformSlice(15_000))],
    ids=["copy", "layers", "slice"],
)
def test_dropout_is_the_students_own_and_travels_with_it(teacher, config, tmp_path):
    plain = build_student(config, teacher).double()
    student = build_student(replace(config, dropout=0.0), teacher).double()
    for ours, theirs in zip(states(student), states(plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    masked = make_prunable(student, PruningConfig())
    save_model(tmp_path / "pruned.pth", prune(masked)[0])
    for model in (student, masked, load_model(tmp_path / "pruned.pth")):
        rates = {key: rate for key, rate in model.config.items() if key.endswith("_dropout")}
        assert len(rates) == 4 and not any(rates.values())
        model.float().train()
        first, second = (model.run(torch.ones(1, 3000), None, gates={})[0].layers[-1] for _ in range(2))
        assert torch.equal(first, second)
    assert any(rate for key, rate in plain.config.items() if key.endswith("_dropout"))
    save_model(tmp_path / "whole.pth", plain)
    flags = ["--student_ckpt", str(tmp_path / "whole.pth"), "--student.dropout", "0.2"]
    started = starting_student(parse_recipe(flags)[0], teacher)
    assert {rate for key, rate in started.config.items() if key.endswith("_dropout")} == {0.2}
    with pytest.raises(UserError, match=r"student\.dropout is 1\.0: it must lie in \[0, 1\)"):
        StudentConfig(dropout=1.0)


def test_a_slice_keeps_weights_of_the_teacher(teacher):
    student = build_student(StudentConfig(slice=UniformSlice(params(teacher) // 2)), teacher)
    first = teacher.feature_extractor.conv_layers[0].conv.weight
    kept = student.feature_extractor.conv_layers[0].conv.weight
    rows = [next(i for i, row in enumerate(first) if torch.equal(row, mine.to(row.dtype))) for mine in kept]
    assert rows == sorted(rows) and max(b - a for a, b in itertools.pairwise(rows)) <= 2  # evenly spaced
    assert student.training and (student.feature_extractor.dummy_weight == 1).all()


@pytest.mark.parametrize("wanted", [10, 10**9])
def test_slices_that_cannot_be(teacher, wanted):
    with pytest.raises(UserError, match=f"no uniform slice has {wanted:,} parameters: those of this teacher have"):
        build_student(StudentConfig(slice=UniformSlice(wanted)), teacher)


# All of them


STUDENTS = {
    "copy": StudentConfig(),
    "thin": StudentConfig(thin=ThinStudent(width=12, heads=4, ffn=20, channels=[6, 8, 12], pos_conv_groups=4)),
    "reduced": StudentConfig(thin=ThinStudent(num_layers=4, width=16, heads=2, channels=[6, 8, 12], time_reduction=2)),
    "reusing": StudentConfig(
        thin=ThinStudent(num_layers=4, width=16, heads=2, channels=[6, 8, 12], reuse_attention="released")
    ),
    "layers": StudentConfig(layers=CopiedLayers([2, 4])),
    "layers without a norm": StudentConfig(layers=CopiedLayers([1, 2], norms="released")),
    "slice": StudentConfig(slice=UniformSlice(20_000)),
}


@pytest.mark.parametrize("name", STUDENTS)
@pytest.mark.parametrize("kind", ["hubert", "wavlm"])
def test_every_student_can_be_pruned(teacher, wavlm, kind, name):
    teacher = teacher if kind == "hubert" else wavlm
    units = ["conv", "head", "interm", "attlayer", "ffnlayer"]
    student = make_prunable(build_student(STUDENTS[name], teacher), PruningConfig(units=units)).double().eval()
    check_frame_rate(student, teacher, "student")
    for mask in student.masks().values():
        torch.nn.init.normal_(mask.log_alpha, 0.0, 2.0)
    pruned, _ = prune(student)
    assert params(pruned) < params(student) - sum(map(len, student.masks().values()))
    for ours, theirs in zip(states(student), states(pruned), strict=True):
        torch.testing.assert_close(ours, theirs)


# Mistakes


def test_only_one_kind_at_a_time():
    with pytest.raises(UserError, match="student: thin and slice are set, a student can be only one of them"):
        StudentConfig(thin=ThinStudent(), slice=UniformSlice(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": [1, 2]}, "student.thin.channels is .*: it must be three numbers"),
        ({"heads": 7}, "student.thin.heads is 7: it must divide the width 480"),
        ({"num_layers": 0}, "student.thin.num_layers is 0: it must be at least 1"),
        ({"pos_conv_groups": 7}, "student: no positional convolution of width 480, kernel 128 and 7 groups"),
        ({"dropout": 1.5}, "student: encoder_attention_dropout must lie between 0 and 1"),
    ],
)
def test_thin_students_that_cannot_be(teacher, changes, message):
    with pytest.raises(UserError, match=message):
        build_student(StudentConfig(thin=ThinStudent(**changes)), teacher)


def test_another_frame_rate_is_refused(teacher, tiny_config):
    other = wav2vec2_model(**{**tiny_config, "extractor_conv_layer_config": [(12, 10, 5), *[(12, 3, 2)] * 5]})
    with pytest.raises(UserError, match=r"x.pth: its extractor gives other frames than the teacher's"):
        check_frame_rate(other, teacher, "x.pth")
