"""CTC in the loop: its formula by listing all alignments, padding, impossible rows, error rates, what is refused."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from distillation.errors import UserError
from distillation.objectives import ObjectiveConfig, Objectives, Passes, Teacher
from distillation.objectives.ctc import CTC
from distillation.objectives.layer_to_layer import LayerToLayer
from distillation.recognition.labels import NEVER, Speller, make_vocabulary, trial_labels
from wav2vec2.checkpoint import add_masks, with_output_layer
from wav2vec2.passes import PassOptions

VOCABULARY = ["<pad>", "|", "A", "B"]
MASKS = {"encoder_prune_attention_heads": True, "encoder_prune_feed_forward_intermediate": True}


def writing(model, vocabulary=VOCABULARY):
    """The same with an output layer whose biases count."""
    result = with_output_layer(model, vocabulary).double().eval()
    torch.nn.init.normal_(result.aux.weight, 0, 0.5)
    torch.nn.init.normal_(result.aux.bias)
    return result


def collapsed(path: tuple[int, ...]) -> list[int]:
    return [symbol for symbol, _ in itertools.groupby(path) if symbol]


def literal_loss(logits: np.ndarray, symbols: list[int]) -> float:
    """Minus the log of the summed probability of all alignments, per symbol."""
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    total = sum(
        np.prod(probabilities[range(len(path)), path])
        for path in itertools.product(range(logits.shape[1]), repeat=len(logits))
        if collapsed(path) == symbols
    )
    return -np.log(total) / max(1, len(symbols))


def given(logits: torch.Tensor, teacher: torch.Tensor, frames: list[int], texts: list[str]) -> SimpleNamespace:
    """Passes whose logits are given, one sample a frame."""
    counts = torch.tensor(frames)
    return SimpleNamespace(
        labels=Speller(VOCABULARY)(texts), num_frames=logits.shape[1], student_logits=lambda: logits,
        teacher_logits=lambda: teacher, output_frames=lambda: counts, symbol_frames=lambda: counts,
        valid=lambda: torch.arange(logits.shape[1]) < counts[:, None],
    )  # fmt: skip


@pytest.fixture
def objective(teacher):
    return CTC(CTC.Config(distill=1.0, temperature=2.0), writing(teacher), writing(teacher))


def test_against_all_alignments(objective):
    """A padded row, one without a text, one in which two equal symbols leave no frame for the blank between them."""
    frames, texts = [5, 4, 3, 2, 5], ["AB A", "", "AB", "AA", "BBA"]
    logits, targets = torch.randn(2, 5, 5, 4, dtype=torch.float64)
    found = objective(given(logits, targets, frames, texts))
    ids = {"A": 2, "B": 3, " ": 1}
    each = [
        literal_loss(row[:count].numpy(), [ids[c] for c in text])
        for row, count, text in zip(logits, frames, texts)
        if text != "AA"
    ]
    assert found["ctc"].item() == pytest.approx(np.mean(each), rel=1e-9)
    assert found["impossible"].item() == pytest.approx(1 / 5, abs=1e-6)

    distances = []
    for row, target, count in zip(logits.numpy() / 2, targets.numpy() / 2, frames):
        p, q = (np.exp(x[:count]) / np.exp(x[:count]).sum(-1, keepdims=True) for x in (target, row))
        distances += (p * np.log(p / q)).sum(-1).tolist()
    assert found["logits"].item() == pytest.approx(4 * np.mean(distances), rel=1e-9)


def test_impossible_rows_give_no_gradient_and_no_infinity(objective):
    logits = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    passes = given(logits, logits.detach(), [3, 3], ["AAA", "AB"])
    found = objective(passes)
    found["ctc"].backward()
    assert found["ctc"].isfinite() and not logits.grad[0].any() and logits.grad[1].any()
    nothing = objective(given(logits, logits.detach(), [3, 3], ["AAA", "BBBB"]))
    assert nothing["ctc"] == 0 and nothing["impossible"] == 1
    total = nothing["ctc"]
    logits.grad = None
    total.backward()
    assert not logits.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_finite_in_16_bits_at_15_seconds(objective, dtype):
    logits = (50 * torch.randn(2, 749, 4)).to(dtype).requires_grad_()
    passes = given(logits, (50 * torch.randn(2, 749, 4)).to(dtype), [749, 700], ["AB AB" * 20, "A"])
    with torch.autocast("cpu", dtype=dtype):
        found = objective(passes)
    assert all(value.dtype == torch.float32 and value.isfinite() for value in found.values())
    (1000 * found["ctc"]).backward()
    assert logits.grad.isfinite().all() and logits.grad.any()


@pytest.mark.parametrize("kind", ["copy", "masked", "reduced"])
def test_a_padded_batch_is_the_mean_of_its_rows(teacher, make_student, kind):
    student = {
        "copy": lambda: writing(teacher),
        "masked": lambda: add_masks(writing(teacher), **MASKS).double().eval(),
        "reduced": lambda: writing(make_student(time_reduction=2)),
    }[kind]()
    texts, samples = ["AB", "", "B A"], [9000, 2000, 5000]
    rows = [torch.randn(n, dtype=torch.float64) for n in samples]
    config = ObjectiveConfig(ctc=CTC.Config(distill=0.0 if kind == "reduced" else 0.7))
    objectives = Objectives(config, student, writing(teacher)).eval()
    frozen = Teacher(writing(teacher))

    def loss(which: list[int]):
        padded = torch.nn.utils.rnn.pad_sequence([rows[i] for i in which], batch_first=True)
        lengths = torch.tensor([samples[i] for i in which]) if len(which) > 1 else None
        return objectives(frozen, student, padded, lengths, labels=Speller(VOCABULARY)([texts[i] for i in which]))

    alone = [loss([i]) for i in range(3)]
    together = loss([0, 1, 2])
    assert together.terms["ctc"].item() == pytest.approx(np.mean([x.terms["ctc"].item() for x in alone]), rel=1e-9)
    for name, (errors, total) in together.ratios.items():
        assert errors == sum(x.ratios[name][0] for x in alone) and total == sum(x.ratios[name][1] for x in alone)
    if kind != "reduced":  # a mean over frames
        weights = np.array([(n - 400) // 320 + 1 for n in samples])
        expected = np.average([x.terms["logits"].item() for x in alone], weights=weights)
        assert together.terms["logits"].item() == pytest.approx(expected, rel=1e-9)


def test_merged_frames_hold_one_symbol(make_student, teacher):
    student = writing(make_student(time_reduction=2))
    objectives = Objectives(ObjectiveConfig(ctc=CTC.Config()), student, teacher)
    waveforms = torch.randn(1, 400 + 7 * 320, dtype=torch.float64)  # 8 frames, 4 of the layers

    def impossible(text: str) -> float:
        found = objectives(Teacher(teacher), student, waveforms, None, labels=Speller(VOCABULARY)([text]))
        return found.terms["impossible"].item()

    assert impossible("ABAB") == 0 and impossible("ABABA") == 1 and impossible("AAB") == 0 and impossible("AABB") == 1


def test_the_student_alone_hears_the_noise(teacher):
    """The teacher's states and logits are those of the clean waveform, the student's of the other."""
    student = writing(teacher)
    clean, noisy = torch.randn(2, 2, 2600, dtype=torch.float64)
    options = PassOptions(4), PassOptions(4)
    passes = Passes(Teacher(teacher), student, clean, None, *options, heard=noisy)
    torch.testing.assert_close(passes.teacher()[-1], teacher.extract_features(clean)[0][-1])
    torch.testing.assert_close(passes.student()[-1], student.extract_features(noisy)[0][-1])
    torch.testing.assert_close(passes.student_logits(), student(noisy)[0])


def test_the_logits_are_those_of_the_model(teacher, tiny_config):
    """Also of a pre-norm model, whose final norm other objectives do not see."""
    from wav2vec2 import wav2vec2_model

    model = writing(wav2vec2_model(**{**tiny_config, "encoder_layer_norm_first": True}))
    waveforms, lengths = torch.randn(2, 3000, dtype=torch.float64), torch.tensor([3000, 1800])
    waveforms[1, 1800:] = 0
    passes = Passes(Teacher(model), model, waveforms, lengths, PassOptions(4), PassOptions(4))
    logits, frames = model(waveforms, lengths)
    torch.testing.assert_close(passes.student_logits(), logits)
    torch.testing.assert_close(passes.teacher_logits(), logits)
    assert torch.equal(passes.output_frames(), frames)


def test_error_rates_by_hand(objective):
    said = [[2, 2, 0, 1, 3], [3, 3, 3, 3, 3]]  # "A B" and "B"
    logits = torch.nn.functional.one_hot(torch.tensor(said), 4).double()
    passes = given(logits, logits, [5, 5], ["A A", "B"])
    found = {name: (float(a), float(b)) for name, (a, b) in objective.ratios(passes).items()}
    assert found == {"wer": (100, 3), "cer": (100, 4)}


def test_what_the_vocabulary_lacks_is_in_no_label():
    labels = Speller(VOCABULARY)(["A-B", "ÄÄ", "AA A", ""])
    assert labels.counts.tolist() == [2, 0, 4, 0]
    assert labels.needed.tolist() == [2, NEVER, 5, 0], "nothing that can be written is no silence"
    assert labels.symbols.tolist() == [2, 3, 2, 2, 1, 2] and labels.texts == ["A-B", "ÄÄ", "AA A", ""]
    assert Speller(VOCABULARY).unknown(["A-B", "Ä A"]) == ["-", "Ä"]
    assert Speller(["<pad>", "<s>", "|", "a"]).ids == {" ": 2, "a": 3}, "special symbols are never written"
    assert make_vocabulary(["b a", "ab"]) == ["<pad>", "|", "a", "b"]


def test_trial_labels_fit_their_waveforms(teacher):
    student = writing(teacher)
    waveforms = torch.randn(2, 16000, dtype=torch.float64)
    labels = trial_labels(waveforms, 4, 16000)
    found = Objectives(ObjectiveConfig(ctc=CTC.Config()), student, teacher)(
        Teacher(teacher), student, waveforms, None, labels=labels
    )
    assert found.terms["impossible"] == 0 and found.total > 0


def test_what_cannot_be(teacher, make_student):
    with pytest.raises(UserError, match=r"objective\.ctc: the student has no output layer: set data\.transcripts"):
        CTC(CTC.Config(), teacher, teacher)
    for other in (teacher, writing(teacher, ["<pad>", "|", "A"])):
        with pytest.raises(UserError, match=r"objective\.ctc\.distill: the teacher has no output layer over the same"):
            CTC(CTC.Config(distill=1.0), writing(teacher), other)
    with pytest.raises(UserError, match=r"objective\.ctc\.distill: .* over the same symbols"):
        CTC(CTC.Config(distill=1.0), writing(teacher), writing(teacher, ["<pad>", "A", "|", "B"]))
    for settings in ({"weight": -1.0}, {"temperature": 0.0}):
        with pytest.raises(UserError, match=r"objective\.ctc"):
            CTC.Config(**settings)


def test_nothing_but_heads_and_output_layer_learns_when_frozen(teacher):
    """All others get a gradient of exactly 0: DDP waits for it."""
    student = writing(teacher).train().requires_grad_(True)
    student.feature_extractor.dummy_weight.requires_grad_(False)
    config = ObjectiveConfig(ctc=CTC.Config(), layer_to_layer=LayerToLayer.Config(layers=[[0], [4]]))
    objectives = Objectives(config, student, teacher).double().train()
    labels = Speller(VOCABULARY)(["AB", "A"])
    waveforms = torch.randn(2, 5000, dtype=torch.float64)
    objectives(Teacher(teacher), student, waveforms, None, labels=labels, frozen=True).total.backward()
    for name, p in [*student.named_parameters(), *objectives.named_parameters()]:
        if p.requires_grad:
            is_new = name.startswith(("aux.", "parts."))
            assert p.grad is not None and bool(p.grad.any()) == is_new, name
