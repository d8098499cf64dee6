"""Every objective against a slow, literal transcription of its formula in NumPy, in float64 to 1e-9."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distillation.objectives.hint import Hint
from distillation.objectives.layer_to_layer import LayerToLayer, PredictionLayer
from distillation.objectives.masking import Masking
from distillation.objectives.temporal_relation import TemporalRelation
from wav2vec2.passes import PassOptions

STUDENTS = [
    {},
    {"num_layers": 2, "width": 24, "channels": [6, 8, 24]},
    {"time_reduction": 2, "reuse_attention": "released"},
]


@pytest.fixture(params=STUDENTS, ids=["thin", "short", "reduced"])
def student(request, make_student):
    return make_student(**request.param)


def to_numpy(states):
    return [state.detach().numpy() for state in states]


def run(model, batch, **options):
    """Features and layers as arrays, reduced layers not upsampled."""
    output, _ = model.run(*batch, PassOptions(**options))
    return to_numpy([output.features, *output.layers])


def linear(head, frame):
    return head.weight.detach().numpy() @ frame + head.bias.detach().numpy()


def upsampled(conv, states):
    """Transposed convolution with kernel = stride: [T', D] -> [2 T', D]."""
    weight, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
    return np.array([weight[:, :, k].T @ frame + bias for frame in states for k in range(weight.shape[2])])


def layer_head(head, states):
    """[T', D] -> [T, E], perhaps one frame too many."""
    if head.upsampler is not None:
        states = upsampled(head.upsampler, states)
    return np.array([linear(head.linear, frame) for frame in states])


def full_rate(student, states):
    """Layers through the student's own upsampler, per row."""
    conv = student.encoder.transformer.upsampler
    return states if conv is None else [states[0], *(np.array([upsampled(conv, row) for row in x]) for x in states[1:])]


def relative_layers(layers, student_layers, teacher_layers=4):
    return [(layer, round(layer * teacher_layers / student_layers)) for layer in layers]


def check(terms, expected):
    assert terms.keys() == expected.keys()
    for name, value in expected.items():
        assert terms[name].dtype == torch.float64
        np.testing.assert_allclose(terms[name].item(), value, rtol=1e-9, atol=1e-9, err_msg=name)


# Layer to layer and prediction


def literal_distances(pairs, frames, cos_type):
    """``pairs``: per matched layer (predictions, targets), each [B, T, E]."""
    l1, l2, cos = [], [], []
    for predictions, targets in pairs:
        sums, count = np.zeros(3), 0
        for row, num_frames in enumerate(frames):
            for t in range(num_frames):
                p, q = predictions[row][t], targets[row][t]
                similarity = sum(a * b for a, b in zip(p, q)) / (np.sqrt(sum(p**2)) * np.sqrt(sum(q**2)))
                if cos_type == "log_sig":
                    similarity = np.log(1 / (1 + np.exp(-similarity)))
                sums += [sum(abs(p - q)) / len(p), sum((p - q) ** 2) / len(p), -similarity]
                count += 1
        for values, total in zip((l1, l2, cos), sums):
            values.append(total / count)
    return {"l1": np.mean(l1), "l2": np.mean(l2), "cos": np.mean(cos)}


@pytest.mark.parametrize("cos_type", ["raw", "log_sig"])
def test_layer_to_layer(student, teacher, batch, passes, frames_of, cos_type):
    layers = [[0], [1, 2]]
    objective = LayerToLayer(LayerToLayer.Config(layers=layers, cos_type=cos_type), student, teacher).double()
    torch.nn.init.normal_(objective.heads[1].weight)
    assert objective.heads[1] is objective.heads[2] and objective.heads[0] is not objective.heads[1]
    ours, theirs = full_rate(student, run(student, batch)), run(teacher, batch)
    pairs = [
        ([[linear(head, frame) for frame in row] for row in ours[layer]], theirs[layer])
        for head, layer in zip(objective.heads, [0, 1, 2])
    ]
    check(
        objective(passes(objective, student, teacher, batch)),
        literal_distances(pairs, frames_of(batch, student), cos_type),
    )


@pytest.mark.parametrize("heads", ["linear_gelu", "two_linear", "linear"])
def test_prediction_layer(student, teacher, batch, passes, frames_of, heads):
    config = PredictionLayer.Config(layers=[0, 4], heads=heads, cos_type="log_sig")
    objective = PredictionLayer(config, student, teacher).double()
    last, theirs = full_rate(student, run(student, batch))[-1], run(teacher, batch)

    def gelu(y):
        return np.array([v * 0.5 * (1 + math.erf(v / 2**0.5)) for v in y])

    def predict(head, frame):
        y = linear(head[0], frame)
        if heads == "two_linear":
            return linear(head[2], gelu(y))
        return gelu(y) if heads == "linear_gelu" else y

    pairs = [
        ([[predict(head, frame) for frame in row] for row in last], theirs[layer])
        for head, layer in zip(objective.heads, [0, 4])
    ]
    check(
        objective(passes(objective, student, teacher, batch)),
        literal_distances(pairs, frames_of(batch, student), "log_sig"),
    )


# Hint and masking


def squared(prediction, target):
    return sum((p - q) ** 2 for p, q in zip(prediction, target)) / len(target)


@pytest.mark.parametrize("layers", [None, [1, 2], [2]])
def test_hint(student, teacher, batch, passes, frames_of, layers):
    objective = Hint(Hint.Config(layers=layers), student, teacher).double()
    ours, theirs, frames = run(student, batch), run(teacher, batch), frames_of(batch, student)
    pairs = relative_layers(layers or range(1, student.num_layers + 1), student.num_layers)
    means = []
    for head, (mine, other) in zip(objective.heads, pairs, strict=True):
        predictions = [layer_head(head, row) for row in ours[mine]]
        values = [squared(predictions[b][t], theirs[other][b][t]) for b, n in enumerate(frames) for t in range(n)]
        means.append(sum(values) / sum(frames))
    assert objective.weights == {"last": 1.0, "hint": 0.1}
    check(objective(passes(objective, student, teacher, batch)), {"last": means[-1], "hint": sum(means[:-1])})


@pytest.mark.parametrize("spans", ["released", "paper"])
def test_masking(student, teacher, batch, passes, frames_of, spans):
    """With rows of which nothing is masked."""
    objective = Masking(Masking.Config(span=2, probability=0.6, spans=spans), student, teacher).double().eval()
    given = passes(objective, student, teacher, batch)
    masked = objective.draw(given).numpy()
    frames = frames_of(batch, student)
    student_embedding, teacher_embedding = objective.mask_embedding, teacher.mask_embedding
    assert all(not row[n:].any() for row, n in zip(masked, frames))
    num_frames = (batch[0].shape[1] - 400) // 320 + 1  # a time-reduced student may not compare the last
    masks = {"masked": torch.from_numpy(np.pad(masked, ((0, 0), (0, num_frames - masked.shape[1]))))}
    ours = run(student, batch, mask_embedding=student_embedding, **masks)
    blind = run(teacher, batch, mask_embedding=teacher_embedding, **masks)
    seeing = run(teacher, batch)
    expected = dict.fromkeys(("last_masked", "last_unmasked", "hint_masked", "hint_unmasked"), 0.0)
    for head, (mine, other) in zip(
        objective.heads, relative_layers(range(1, student.num_layers + 1), student.num_layers), strict=True
    ):
        for b, n in enumerate(frames):
            predictions = layer_head(head, ours[mine][b])
            for t in range(n):
                target = seeing if masked[b, t] else blind
                name = ("last_" if mine == student.num_layers else "hint_") + ("masked" if masked[b, t] else "unmasked")
                expected[name] += squared(predictions[t], target[other][b][t]) / sum(frames)
    check(objective(given), expected)
    assert objective.weights == {"last_masked": 1, "last_unmasked": 1, "hint_masked": 0.1, "hint_unmasked": 0.1}
    if batch[0].shape[1] > 400:
        assert masked.any() and all(value > 0 for value in expected.values())


# Temporal relation


def layer_inputs(model, batch):
    """What each layer gets and gives, [L + 1] arrays: the input of the first is not the extractor's output."""
    output, _ = model.run(*batch)
    states = to_numpy([output.layer_input, *output.layers])
    conv = model.encoder.transformer.upsampler
    return states if conv is None else [np.array([upsampled(conv, row) for row in x]) for x in states]


def literal_relation(pairs, frames):
    """``pairs``: (x, y, teacher's x, teacher's y): sums of squared differences of <x_i, y_j>, and of the teacher's."""
    distance = size = 0.0
    for b, n in enumerate(frames):
        for i in range(n):
            for j in range(n):
                ours, theirs = (sum(p * q for p, q in zip(x[b][i], y[b][j])) for x, y in pairs)
                distance += (ours - theirs) ** 2
                size += theirs**2
    return distance, size


@pytest.mark.parametrize("relative", [False, True])
def test_temporal_relation(student, teacher, batch, passes, frames_of, relative):
    objective = TemporalRelation(TemporalRelation.Config(relative=relative), student, teacher)
    ours, theirs, frames = layer_inputs(student, batch), layer_inputs(teacher, batch), frames_of(batch, student)
    expected = {"layer": [], "intra": []}
    for mine, other in relative_layers(range(1, student.num_layers + 1), student.num_layers):
        for name, step in (("layer", 0), ("intra", 1)):
            pairs = [(ours[mine - step], ours[mine]), (theirs[other - step], theirs[other])]
            distance, size = literal_relation(pairs, frames)
            expected[name].append(distance / (size if relative else sum(n * n for n in frames)))
    check(objective(passes(objective, student, teacher, batch)), {k: np.mean(values) for k, values in expected.items()})


def attention_scores(model, batch, layer):
    """q k^T / sqrt(E) of a layer, from its weights: [B, H, T, T]."""
    block = model.encoder.transformer.layers[layer].attention
    x = layer_inputs(model, batch)[layer]
    maps = []
    for row in x:
        for head in range(block.num_heads):
            rows = slice(head * block.head_dim, (head + 1) * block.head_dim)
            q, k = (np.array([linear(each, frame)[rows] for frame in row]) for each in (block.q_proj, block.k_proj))
            maps.append(q @ k.T / np.sqrt(block.head_dim))
    return np.array(maps).reshape(len(x), block.num_heads, x.shape[1], x.shape[1])


@pytest.mark.parametrize("relative", [False, True])
def test_average_attention_map(make_student, teacher, batch, passes, frames_of, relative):
    student = make_student()
    config = TemporalRelation.Config(layer=0, intra=0, attention=1, relative=relative)
    objective = TemporalRelation(config, student, teacher)
    frames, expected = frames_of(batch, student), []
    for layer in range(4):
        distance = size = 0.0
        scores = attention_scores(student, batch, layer), attention_scores(teacher, batch, layer)
        for b, n in enumerate(frames):
            for i in range(n):
                ours, theirs = (
                    np.mean([np.exp(head[i, :n]) / sum(np.exp(head[i, :n])) for head in s[b]], axis=0) for s in scores
                )
                distance += sum((ours - theirs) ** 2)
                size += sum(theirs**2)
        expected.append(distance / (size if relative else sum(n * n for n in frames)))
    terms = objective(passes(objective, student, teacher, batch))
    check({"attention": terms["attention"]}, {"attention": np.mean(expected)})
