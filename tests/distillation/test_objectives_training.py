"""What training relies on: gradients, 16-bit types, memory, weights, several objectives at once, heads in files."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from distillation.errors import UserError
from distillation.objectives import OBJECTIVES, ObjectiveConfig, Objectives, Teacher
from distillation.objectives.ctc import CTC
from distillation.objectives.gram import gram_distance, gram_square
from distillation.objectives.hint import Hint
from distillation.objectives.layer_to_layer import LayerToLayer, PredictionLayer
from distillation.objectives.masking import Masking
from distillation.objectives.spans import SpanConfig, draw_spans
from distillation.objectives.temporal_relation import TemporalRelation
from distillation.recognition.labels import Speller
from wav2vec2.checkpoint import add_masks, with_output_layer

CONFIGS = {
    "layer_to_layer": LayerToLayer.Config(layers=[[0], [2, 4]]),
    "prediction_layer": PredictionLayer.Config(layers=[2, 4]),
    "hint": Hint.Config(),
    "masking": Masking.Config(span=2, probability=0.5),
    "temporal_relation": TemporalRelation.Config(attention=1.0),
    "ctc": CTC.Config(distill=0.5),
}
SYMBOLS = ["<pad>", "|", "A", "B"]


def config_of(*names, **extra):
    return ObjectiveConfig(**{name: CONFIGS[name] for name in names}, **extra)


def test_every_objective_is_tested_here():
    assert CONFIGS.keys() == OBJECTIVES.keys()


# Any objective, any student, pruned or not


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("kind", ["thin", "reuse", "reduced", "copy"])
@pytest.mark.parametrize("name", CONFIGS)
def test_any_objective_trains_any_student(make_student, teacher, batch, name, kind, pruned):
    """Every trainable parameter gets a gradient, as DDP demands; the loss is the weighted sum of its terms."""
    if kind == "reduced" and name == "temporal_relation":
        config = ObjectiveConfig(temporal_relation=TemporalRelation.Config())
    else:
        config = config_of(name)
    changes = {"reuse": {"reuse_attention": "released"}, "reduced": {"time_reduction": 2}}.get(kind, {})
    if name == "ctc":
        teacher = with_output_layer(teacher, SYMBOLS).double().eval()
    student = copy.deepcopy(teacher) if kind == "copy" else make_student(**changes)
    if name == "ctc" and kind != "copy":
        student = with_output_layer(student, SYMBOLS).double()
    if pruned:
        flags = {key: True for key in ("extractor_prune_conv_channels", "encoder_prune_attention_heads",
                                       "encoder_prune_feed_forward_intermediate")}  # fmt: skip
        student = add_masks(student, **flags).double()
    student.train().requires_grad_(True)
    student.feature_extractor.dummy_weight.requires_grad_(False)
    objectives = Objectives(config, student, teacher).double().train()
    labels = Speller(SYMBOLS)(["A"] * len(batch[0])) if name == "ctc" else None
    loss = objectives(Teacher(teacher), student, *batch, labels=labels)
    weights = objectives.parts[name].weights
    assert loss.terms.keys() == weights.keys()
    total = sum(weights[term] * value for term, value in loss.terms.items())
    torch.testing.assert_close(loss.total.detach(), total)
    loss.total.backward()
    for part, module in (("student", student), ("objective", objectives)):
        for parameter, p in module.named_parameters():
            assert not p.requires_grad or p.grad is not None, f"{part} {parameter}"
    if batch[0].shape[1] > 400:
        assert any(
            (p.grad != 0).any() for p in student.encoder.transformer.layers[0].parameters() if p.grad is not None
        )


LOGGED = {
    "hint last": ObjectiveConfig(hint=Hint.Config(last=0.0)),
    "hint": ObjectiveConfig(hint=Hint.Config(hint=0.0)),
    "masking": ObjectiveConfig(masking=Masking.Config(span=2, probability=0.5, last=0.0)),
    "relation": ObjectiveConfig(temporal_relation=TemporalRelation.Config(layer=0.0, intra=0.0, attention=1.0)),
    "one of two": ObjectiveConfig(
        layer_to_layer=LayerToLayer.Config(layers=[[1]]),
        prediction_layer=PredictionLayer.Config(layers=[2, 4], l1=0.0, cos=0.0),
    ),
}


@pytest.mark.parametrize("name", LOGGED)
def test_terms_that_are_only_logged_leave_no_parameter_out(make_student, teacher, batch, name):
    student = make_student().train().requires_grad_(True)
    student.feature_extractor.dummy_weight.requires_grad_(False)
    objectives = Objectives(LOGGED[name], student, teacher).double().train()
    objectives(Teacher(teacher), student, *batch).total.backward()
    for module in (student, objectives):
        assert not [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]


def test_a_loss_without_weights_is_refused(make_student, teacher):
    settings = ObjectiveConfig(layer_to_layer=LayerToLayer.Config(l1=0.0, cos=0.0, layers=[[1]]))
    with pytest.raises(UserError, match="every weight of the objective is 0"):
        Objectives(settings, make_student(), teacher)


def test_objectives_add_up_and_share_passes(make_student, teacher, batch):
    student = make_student()
    both = Objectives(config_of("hint", "temporal_relation"), student, teacher).double().eval()
    loss = both(Teacher(teacher), student, *batch)
    assert {"hint/last", "hint/hint", "temporal_relation/layer"} < loss.terms.keys()
    alone = [Objectives(config_of(name), student, teacher).double().eval() for name in ("hint", "temporal_relation")]
    alone[0].parts["hint"].load_state_dict(both.parts["hint"].state_dict())
    calls = []
    student.encoder.register_forward_pre_hook(lambda *args: calls.append(1))
    total = sum(objectives(Teacher(teacher), student, *batch).total for objectives in alone)
    torch.testing.assert_close(loss.total, total)


def test_each_pass_is_run_once(make_student, teacher, batch, monkeypatch):
    student, calls = make_student(), {"student": 0, "teacher": 0}
    for who, model in (("student", student), ("teacher", teacher)):
        run = model.run
        monkeypatch.setattr(
            model, "run", lambda *args, who=who, run=run: (calls.update({who: calls[who] + 1}), run(*args))[1]
        )
    Objectives(config_of("hint", "layer_to_layer", "temporal_relation"), student, teacher).double()(
        Teacher(teacher), student, *batch
    )
    assert calls == {"student": 1, "teacher": 1}
    Objectives(config_of("masking"), student, teacher).double()(Teacher(teacher), student, *batch)
    assert calls == {"student": 2, "teacher": 3}


@pytest.mark.parametrize(
    ("config", "silent"),
    [
        (ObjectiveConfig(hint=Hint.Config(last=1, hint=0)), {"hint"}),
        (ObjectiveConfig(masking=Masking.Config(last=0, span=2)), {"last_masked", "last_unmasked"}),
        (ObjectiveConfig(temporal_relation=TemporalRelation.Config(intra=0, attention=0)), {"intra", "attention"}),
        (ObjectiveConfig(layer_to_layer=LayerToLayer.Config(layers=[[1]], l1=0)), {"l1", "l2"}),
    ],
)
def test_weight_zero_only_logs(make_student, teacher, batch, config, silent):
    student = make_student()
    objectives = Objectives(config, student, teacher).double().eval()
    loss = objectives(Teacher(teacher), student, *batch)
    assert silent <= loss.terms.keys()
    weights = next(iter(objectives.parts.values())).weights
    torch.testing.assert_close(
        loss.total.detach(), sum(weights[term] * value for term, value in loss.terms.items() if term not in silent)
    )
    loss.total.backward()
    assert all(p.grad is not None for p in objectives.parameters() if p.requires_grad)


def test_no_objective_is_an_error(make_student, teacher):
    with pytest.raises(UserError, match=r"sets no objective: set one of layer_to_layer, .*temporal_relation"):
        Objectives(ObjectiveConfig(), make_student(), teacher)


@pytest.mark.parametrize("layers", [[5], [0], [2, 1], []])
def test_layers_that_do_not_exist(make_student, teacher, layers):
    with pytest.raises(UserError, match="matches layers"):
        Objectives(ObjectiveConfig(hint=Hint.Config(layers=layers)), make_student(), teacher)


# Gram matrices


@pytest.mark.parametrize("block", [1, 3, 7, 100])
def test_gram_distance_and_its_gradients(block):
    x, y = (torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    tx, ty = (torch.randn(2, 7, 9, dtype=torch.float64) for _ in range(2))

    def dense(x, y, tx, ty):
        return (x @ y.transpose(1, 2) - tx @ ty.transpose(1, 2)).square().sum()

    torch.testing.assert_close(gram_distance(x, y, tx, ty, block), dense(x, y, tx, ty))
    for ours, theirs in zip(
        torch.autograd.grad(3 * gram_distance(x, y, tx, ty, block), (x, y)),
        torch.autograd.grad(3 * dense(x, y, tx, ty), (x, y)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gram_distance(x, None, tx, tx, block), dense(x, x, tx, tx))
    (ours,) = torch.autograd.grad(gram_distance(x, None, tx, tx, block), x)
    (theirs,) = torch.autograd.grad(dense(x, x, tx, tx), x)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gram_square(tx, ty), dense(0 * x, y, tx, ty).detach())


def test_no_gram_matrix_is_kept(given_passes, make_student, teacher):
    """At 15 s in batches of 2, what the backward pass keeps is frames x channels."""
    states = [torch.randn(2, 749, width) for width in (16, 16, 24, 24)]
    objective = TemporalRelation(TemporalRelation.Config(layers=[1]), make_student(), teacher)
    student = [x.requires_grad_() for x in states[:2]]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (kept.append(x.numel()), x)[1], lambda x: x):
        sum(objective(given_passes(student, states[2:])).values())
    assert kept and max(kept) == 2 * 749 * 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "ctc"])  # which takes no states
def test_finite_in_16_bits_at_15_seconds(given_passes, make_student, teacher, name, dtype):
    """States as large as HuBERT's: an inner product of two frames is far beyond what float16 holds."""
    config = TemporalRelation.Config() if name == "temporal_relation" else CONFIGS[name]
    objective = OBJECTIVES[name](config, make_student(), teacher)
    student = [(20 * torch.randn(2, 749, 16)).to(dtype).requires_grad_() for _ in range(5)]
    targets = [(20 * torch.randn(2, 749, 24)).to(dtype) for _ in range(5)]
    with torch.autocast("cpu", dtype=dtype):
        terms = objective(given_passes(student, targets))
    assert all(value.dtype == torch.float32 and value.isfinite() for value in terms.values())
    total = sum(objective.weights[term] * value for term, value in terms.items())
    (1000 * total / total.detach().abs()).backward()  # scaled, as mixed precision does
    assert all(x.grad.isfinite().all() for x in student if x.grad is not None) and student[4].grad.any()


# Masked spans


def runs_of(masked: np.ndarray) -> list[np.ndarray]:
    """Lengths of the masked runs of each row."""
    edges = np.diff(np.pad(masked, ((0, 0), (1, 1))).astype(int), axis=1)
    return [np.flatnonzero(row < 0) - np.flatnonzero(row > 0) for row in edges]


@pytest.mark.parametrize("probability", [0.0, 0.4, 0.8])
def test_spans_of_the_paper(probability):
    """All equally long, and never touching: runs that touch would merge."""
    lengths = [1500, 700, 31, 11, 10, 1, 0]
    masked = draw_spans(lengths, 1500, SpanConfig(probability, spans="paper"), np.random.default_rng(0))
    assert masked.shape == (7, 1500) and not any(row[n:].any() for row, n in zip(masked, lengths))
    runs = runs_of(masked)
    assert all((run == 10).all() for run in runs)
    assert [len(run) for run in runs[3:]] == [1, 0, 0, 0]  # a span leaves room for the space after it
    wanted = round(probability * 150)
    assert max(2, wanted - 35) <= len(runs[0]) <= max(2, wanted + 1)


@pytest.mark.slow
@pytest.mark.parametrize(("probability", "share", "run"), [(0.8, 0.67, 4.6), (0.4, 0.31, 3.5)])
def test_spans_as_released(probability, share, run):
    """Masked share and mean run of 1,000 batches of 18 rows of 600 frames, as measured on the released code."""
    random, config = np.random.default_rng(0), SpanConfig(probability)
    batches = [draw_spans([600] * 18, 600, config, random) for _ in range(1000)]
    masked = np.concatenate(batches)
    runs = np.concatenate(runs_of(masked))
    assert masked.mean() == pytest.approx(share, abs=0.008) and runs.mean() == pytest.approx(run, abs=0.1)
    assert all(len(set(batch.sum(1))) == 1 for batch in batches) and runs.max() > 10


def test_released_spans_are_up_to_twice_as_long_and_never_touch():
    """One row is not cut to the count of others."""
    masked = np.concatenate([draw_spans([600], 600, SpanConfig(0.4), np.random.default_rng(i)) for i in range(200)])
    runs = np.concatenate(runs_of(masked))
    assert set(runs.tolist()) == set(range(1, 21)) and masked.mean() == pytest.approx(0.4, abs=0.01)
    assert all(abs(np.mean(runs == n) - 1 / 20) < 0.02 for n in range(1, 21))


def test_rows_have_one_count_of_masked_frames():
    lengths = [700, 650, 600, 12, 1, 0]
    masked = draw_spans(lengths, 700, SpanConfig(0.4, span=4), np.random.default_rng(0))
    assert not any(row[n:].any() for row, n in zip(masked, lengths))
    counts = masked.sum(1)
    assert counts[0] == counts[1] == counts[2] == counts[3] > 0 and not counts[4:].any()
    assert not draw_spans([700, 650], 700, SpanConfig(0.0, min_spans=0), np.random.default_rng(0)).any()


@pytest.mark.parametrize("spans", ["released", "paper"])
def test_spans_are_anywhere_and_differ(spans):
    config = SpanConfig(0.4, spans=spans)
    random = np.random.default_rng(0)
    masked = np.concatenate([draw_spans([100], 100, config, random) for _ in range(2000)])
    share = masked.mean(0)
    assert abs(masked.mean() - 0.4) < 0.02
    assert share[:-1].min() > 0.02 and share[-1] == 0  # a span leaves room for the space after it
    assert abs(share[20:80].mean() - share[20:50].mean()) < 0.02  # even but for the ends
    assert not (masked[0] == masked[1]).all()
    again = [draw_spans([100], 100, config, np.random.default_rng(1)) for _ in range(2)]
    assert np.array_equal(*again)


def test_masked_frames_change_in_training_only(make_student, teacher, batch, passes):
    student = make_student()
    objective = Masking(Masking.Config(span=2, probability=0.5), student, teacher).double()
    if batch[0].shape[1] == 400:
        return
    given = passes(objective, student, teacher, batch)
    objective.train()
    torch.manual_seed(1)
    first, second = objective.draw(given), objective.draw(given)
    torch.manual_seed(1)
    assert torch.equal(objective.draw(given), first) and not torch.equal(first, second)
    objective.eval()
    assert torch.equal(objective.draw(given), objective.draw(given))


def test_a_teacher_without_mask_embedding_is_refused(make_student, teacher):
    teacher.mask_embedding = None
    with pytest.raises(UserError, match="needs the teacher's mask embedding"):
        Objectives(config_of("masking"), make_student(), teacher)


def test_a_copy_starts_with_the_teachers_mask_embedding(teacher, make_student):
    copied = Masking(Masking.Config(), copy.deepcopy(teacher), teacher)
    assert torch.equal(copied.mask_embedding, teacher.mask_embedding)
    assert copied.mask_embedding.requires_grad and copied.mask_embedding is not teacher.mask_embedding
    thin = Masking(Masking.Config(), make_student(), teacher)
    assert thin.mask_embedding.shape == (16,) and 0 <= thin.mask_embedding.min() <= thin.mask_embedding.max() < 1


@pytest.mark.parametrize("change", [{"probability": 1.5}, {"span": 0}, {"min_space": 0}])
def test_bad_spans(change):
    with pytest.raises(UserError, match=f"masking.{next(iter(change))} is"):
        Masking.Config(**change)


# Files


@pytest.mark.parametrize("names", [("hint",), ("masking",), ("hint", "masking"), ("temporal_relation",)])
def test_heads_survive_a_file(make_student, teacher, names):
    student = make_student()
    objectives, other = (Objectives(config_of(*names), student, teacher) for _ in range(2))
    state = {name: value.clone() for name, value in objectives.head_state().items()}
    assert other.load_head_state(state, "file.pth")
    for name, value in other.head_state().items():
        assert torch.equal(value, state[name])
    if names == ("masking",):
        assert "mask_embedding" in state and "0.linear.weight" in state
        with pytest.raises(UserError, match=r"file.pth: its heads do not fit the objective"):
            Objectives(config_of("hint"), student, teacher).load_head_state(state, "file.pth")


def test_the_upsampler_is_trained_where_it_is_used(make_student, teacher):
    student = make_student(time_reduction=2)
    upsampler = student.encoder.transformer.upsampler
    Objectives(config_of("hint"), student, teacher)
    assert not any(p.requires_grad for p in upsampler.parameters())
    Objectives(config_of("hint", "layer_to_layer"), student, teacher)
    assert all(p.requires_grad for p in upsampler.parameters())
    with pytest.raises(UserError, match="set it to null for a time-reduced student"):
        Objectives(config_of("temporal_relation"), student, teacher)


def test_scaled_gradients_reach_the_student(make_student, teacher, batch):
    student = make_student()
    weight = student.encoder.transformer.layers[0].feed_forward.intermediate_dense.weight
    forms = [
        Objectives(config_of("hint", scale_gradients=form), student, teacher).double()
        for form in (None, "paper", "released")
    ]
    for objectives in forms[1:]:
        objectives.load_state_dict(forms[0].state_dict())
    losses = [objectives(Teacher(teacher), student, *batch).total for objectives in forms]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])
    sums, means, released = (torch.autograd.grad(loss, weight)[0].norm() for loss in losses)
    assert 0 < released < means < sums / 2


def test_the_gradient_of_the_conv_layers_is_scaled(make_student, teacher, batch):
    student, grads = make_student(), []
    parts = [student.feature_extractor.conv_layers[0].conv.weight, next(student.encoder.transformer.parameters())]
    objectives = Objectives(config_of("hint"), student, teacher).double()
    for factor in (1.0, 0.1):
        scaled = Objectives(config_of("hint", extractor_gradient=factor), student, teacher).double()
        scaled.load_state_dict(objectives.state_dict())
        grads.append(torch.autograd.grad(scaled(Teacher(teacher), student, *batch).total, parts))
    torch.testing.assert_close(grads[1][0], 0.1 * grads[0][0])
    torch.testing.assert_close(grads[1][1], grads[0][1])
    with pytest.raises(UserError, match=r"objective\.extractor_gradient is -1"):
        config_of("hint", extractor_gradient=-1.0)
