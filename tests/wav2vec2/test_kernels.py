"""Every form of an operation computes the same; which of them runs can be told, and is decided by time."""

from __future__ import annotations

import os
from contextlib import contextmanager, nullcontext
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from tests.configs import TINY
from wav2vec2 import feature_extractor, kernels, wav2vec2_model
from wav2vec2.feature_extractor import LiveNorm, instance_norm, normalized_conv1d


def gradients(result, inputs, seed=0):
    torch.manual_seed(seed)
    weights = torch.randn(result.shape, dtype=result.dtype)  # randn_like would follow the layout in memory
    return torch.autograd.grad((result * weights).sum(), inputs)


def assert_same(left, right, inputs, tolerance=1e-5):
    torch.testing.assert_close(left, right, atol=tolerance, rtol=tolerance)
    for a, b in zip(gradients(left, inputs), gradients(right, inputs), strict=True):
        torch.testing.assert_close(a, b, atol=20 * tolerance, rtol=tolerance)


@pytest.mark.parametrize("with_bias", [True, False])
def test_linear_by_onednn(monkeypatch, with_bias):
    monkeypatch.setattr(kernels, "_choices", {"onednn": True})
    monkeypatch.setattr(kernels, "MIN_MACS", 0)
    x, weight = torch.randn(3, 50, 24, requires_grad=True), torch.randn(40, 24, requires_grad=True)
    bias = torch.randn(40, requires_grad=True) if with_bias else None
    inputs = [x, weight, *([bias] if with_bias else [])]
    with mock.patch.object(F, "conv2d", wraps=F.conv2d) as used:
        result = kernels.linear(x, weight, bias)
    assert used.called
    assert result.is_contiguous()
    assert_same(result, F.linear(x, weight, bias), inputs)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 2), (2, 2), (1, 1)])
def test_conv1d_in_both_layouts(grad, dtype, kernel_size, stride):
    x = torch.randn(2, 31, 12).to(dtype).requires_grad_()
    weight, bias = (torch.randn(*shape).to(dtype).requires_grad_() for shape in ((7, 12, kernel_size), (7,)))
    with nullcontext() if grad else torch.no_grad():
        result = kernels.conv1d(x, weight, bias, stride)
    expected = F.conv1d(x.transpose(1, 2), weight, bias, stride).transpose(1, 2)
    tolerance = 3e-2 if dtype == torch.bfloat16 else 1e-5
    if grad:
        assert_same(result, expected, [x, weight, bias], tolerance)
    torch.testing.assert_close(result, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kernel_size", [128, 32, 31, 8, 7])
@pytest.mark.parametrize("num_frames", [1, 9, 100])
def test_wide_convolution(kernel_size, num_frames):
    x = torch.randn(2, 12, num_frames, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(12, 4, kernel_size, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(12, dtype=torch.float64, requires_grad=True)
    result = kernels.wide_conv1d(x, weight, bias, 3)
    expected = F.conv1d(x, weight, bias, padding=kernel_size // 2, groups=3)[..., :num_frames]
    assert_same(result, expected, [x, weight, bias], 1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.05, 0.1, 0.5])
def test_dropout(dtype, p):
    torch.manual_seed(1)
    x = torch.ones(500, 1001, dtype=dtype, requires_grad=True)
    result = kernels.dropout(x, p)
    assert result.dtype == dtype
    share = (result == 0).double().mean().item()
    assert share == pytest.approx(p, abs=5 * (p * (1 - p) / x.numel()) ** 0.5 + 2**-17)
    kept = result[result != 0].unique()
    assert kept.numel() == 1
    assert kept.item() == pytest.approx(1 / (1 - p), rel=1e-2 if dtype == torch.bfloat16 else 1e-4)
    (grad,) = torch.autograd.grad(result.sum(), x)
    assert torch.equal(grad, result.detach())
    # every position and its neighbours are independent
    dropped = (result == 0).double()
    for shift in (1, 2, 3, 4):
        together = (dropped[:, shift:] * dropped[:, :-shift]).mean().item()
        assert together == pytest.approx(p * p, abs=6 * p / x.numel() ** 0.5)
    torch.manual_seed(1)
    assert torch.equal(kernels.dropout(x, p), result)
    assert torch.equal(kernels.dropout(x, 0.0), x)


def test_dropout_of_nearly_everything():
    x = torch.ones(1000)
    assert torch.isfinite(kernels.dropout(x, 1 - 1e-9)).all()
    assert not kernels.dropout(x, 1.0).any()


def test_dropout_module_is_silent_in_eval():
    x, module = torch.randn(4, 5), kernels.Dropout(0.5)
    assert not torch.equal(module(x), x)
    assert torch.equal(module.eval()(x), x)


@pytest.mark.parametrize("mask", [None, "bool", "bias"])
def test_attention_written_out_equals_the_fused_one(mask):
    q, k, v = (torch.randn(2, 3, 20, 8, requires_grad=True) for _ in range(3))
    given = {None: None, "bool": torch.rand(2, 1, 1, 20) > 0.3, "bias": torch.randn(3, 20, 20)}[mask]
    written = kernels.attention_weights(q, k, given) @ v
    assert_same(kernels.attend(q, k, v, given, 0.0), written, [q, k, v])
    low = kernels.attend(*(t.bfloat16() for t in (q, k, v)), given, 0.0)
    torch.testing.assert_close(low.float(), written, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("mask", [None, "bool", "bias"])
@pytest.mark.parametrize("width", [8, 9, 15])
def test_attention_of_heads_that_no_fused_kernel_takes(mask, width, monkeypatch):
    q, k, v = (torch.randn(2, 3, 20, width, requires_grad=True) for _ in range(3))
    given = {None: None, "bool": torch.rand(2, 1, 1, 20) > 0.3, "bias": torch.randn(3, 20, 20)}[mask]
    seen = []
    usual = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda q, *a, **b: seen.append(q.shape[-1]) or usual(q, *a, **b)
    )
    fused = kernels.fused_attention(q, k, v, given, 0.0)
    assert seen == [width if mask is None else -(-width // 8) * 8]
    assert_same(fused, kernels.attention_weights(q, k, given) @ v, [q, k, v])


def test_attention_drops_weights_without_bias():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 1, 6, 4) for _ in range(3))
    mean = torch.stack([kernels.attend(q, k, v, None, 0.3) for _ in range(4000)]).mean(0)
    torch.testing.assert_close(mean, kernels.attend(q, k, v, None, 0.0), atol=0.06, rtol=0)


@pytest.mark.parametrize("lengths", [None, [40, 17]])
@pytest.mark.parametrize("grad", [True, False])
def test_norm_folded_into_the_first_convolution(lengths, grad):
    x = torch.randn(2, 203, 1, dtype=torch.float64) + 3
    kernel = torch.randn(6, 1, 10, dtype=torch.float64, requires_grad=True)
    weight, bias = (torch.randn(6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    length = None if lengths is None else torch.tensor(lengths)
    convolved = F.conv1d(x.transpose(1, 2), kernel, None, 5).transpose(1, 2)
    expected = instance_norm(convolved, length, LiveNorm(weight, bias, 1e-5))
    with nullcontext() if grad else torch.no_grad():
        result = normalized_conv1d(x, length, kernel, LiveNorm(weight, bias, 1e-5), 5)
    torch.testing.assert_close(result, expected, atol=1e-10, rtol=1e-10)
    if grad:
        assert_same(result, expected, [kernel, weight, bias], 1e-9)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 0.0])
def test_folded_norm_hears_what_a_filter_almost_removes(scale):
    """Low-frequency audio through a filter that cancels it: the variance is far below the windows' own."""
    time = torch.arange(16_000) / 16_000
    x = scale * (torch.sin(2 * torch.pi * 60 * time) + 1e-3 * torch.randn(16_000))[None, :, None] + 0.1
    kernel = torch.tensor([1.0, -4.0, 6.0, -4.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0])[None, None]
    weight, bias = torch.ones(1), torch.zeros(1)
    exact = instance_norm(F.conv1d(x.double().transpose(1, 2), kernel.double(), None, 5).transpose(1, 2), None,
                          LiveNorm(weight.double(), bias.double(), 1e-5))  # fmt: skip
    result = normalized_conv1d(x, None, kernel, LiveNorm(weight, bias, 1e-5), 5)
    torch.testing.assert_close(result.double(), exact, atol=2e-3, rtol=1e-3)


# What only the faster form runs: the owner of a function, and its name.
SPIES = {
    "onednn": (kernels, "_linear_by_onednn"),
    "channels_last": (F, "conv2d"),
    "shifted": (kernels._WideConv1d, "apply"),
    "folded_norm": (feature_extractor, "normalized_conv1d"),
    "written_out": (kernels, "attention_weights"),
    "dropout": (kernels._CPUDropout, "apply"),
}


@contextmanager
def all_forms(choices):
    """At any size, with what has been decided."""
    with mock.patch.object(kernels, "MIN_MACS", 0), mock.patch.object(kernels, "_choices", dict(choices)):
        yield


@pytest.mark.parametrize("form", kernels.FORMS)
def test_a_form_that_is_switched_off(form):
    torch.manual_seed(0)
    others = {**TINY, "encoder_layer_drop": 0.0, "encoder_pos_conv_kernel": 32}
    model = wav2vec2_model(**others).train()
    waveforms = torch.randn(1, 4000)
    owner, name = SPIES[form]
    # the product by oneDNN is a conv2d too
    forms = {**dict.fromkeys(kernels.PROBLEMS, True), "onednn": form == "onednn"}
    with all_forms(forms), mock.patch.object(owner, name, wraps=getattr(owner, name)) as spy:
        for used in (True, False):
            for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16)):
                with nullcontext() if used else kernels.usual_forms([form]), context:
                    model.extract_features(waveforms)
            assert spy.called == used
            spy.reset_mock()
        with kernels.usual_forms(set(kernels.FORMS) - {form}), kernels.usual_forms([]):
            model.extract_features(waveforms.requires_grad_())
            with torch.no_grad():
                model.extract_features(waveforms)
        assert spy.called


def test_forms_come_back_after_an_error():
    with pytest.raises(KeyError), kernels.usual_forms(["shifted"]):
        raise KeyError
    assert kernels.takes("shifted")


class Clock:
    """Fake seconds; a form that runs takes what was agreed."""

    def __init__(self):
        self.now, self.ran = 0.0, []

    def __call__(self):
        return self.now

    def problem(self, usual, faster, backward=False):
        def form(name, seconds):
            def run(x, y):
                self.ran.append(name)
                self.now += next(seconds)
                return x @ y

            return run

        return kernels.Problem(form("usual", usual), form("faster", faster), ((2, 3), (3, 2)), torch.float32, backward)


def steady(seconds):
    while True:
        yield seconds


@pytest.mark.parametrize(
    ("usual", "faster", "wins"),
    [(1.0, 0.5, True), (1.0, 0.89, True), (1.0, 0.95, False), (1.0, 1.0, False), (0.5, 1.0, False), (0.0, 0.0, False)],
)
@pytest.mark.parametrize("backward", [True, False])
def test_the_faster_one_by_a_margin_is_taken(monkeypatch, usual, faster, wins, backward):
    clock = Clock()
    monkeypatch.setattr(kernels, "_clock", clock)
    assert kernels._wins(clock.problem(steady(usual / 1000), steady(faster / 1000), backward)) == wins
    assert clock.ran == ["usual", "faster"] * kernels.RUNS


def test_the_fastest_run_counts_and_slow_ones_are_not_repeated(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(kernels, "_clock", clock)
    milliseconds = iter([0.01, 0.001, 0.002, 0.002]), iter([0.03, 0.001, 0.0005, 0.002])
    assert kernels._wins(clock.problem(*milliseconds))
    clock.ran.clear()
    assert not kernels._wins(clock.problem(steady(0.5), steady(0.5)))
    assert clock.ran == ["usual", "faster"]


@pytest.fixture
def undecided(monkeypatch):
    """A process that has decided nothing; what it measures is counted, and loses."""
    monkeypatch.setattr(kernels, "_choices", {})
    monkeypatch.delenv("WAV2VEC2_KERNELS", raising=False)
    with mock.patch.object(kernels, "_wins", return_value=False) as wins:
        yield wins


def large(problem):
    """One operation at a size for which the choice is made."""
    if problem == "onednn":
        return kernels.linear(torch.ones(1, 500, 500), torch.ones(500, 500))
    if problem == "channels_last_grad":
        return kernels.conv1d(torch.ones(1, 1000, 200), torch.ones(200, 200, 3), None, 1)
    if problem == "shifted_bf16":
        x, weight = torch.ones(1, 192, 125).bfloat16(), torch.ones(192, 48, 128).bfloat16()
        return kernels.wide_conv1d(x, weight, weight[:, 0, 0], 4)
    q = torch.ones(1, 4, 500, 64).bfloat16()
    with torch.set_grad_enabled("grad" in problem):
        return kernels.attend(q, q, q, None, 0.0)


@pytest.mark.parametrize("problem", kernels.PROBLEMS)
def test_a_choice_is_made_once_at_the_first_large_operation(undecided, problem):
    for _ in range(2):
        large(problem)
        undecided.assert_called_once_with(kernels.PROBLEMS[problem])
    assert kernels.choices() == {problem: False}


@pytest.mark.parametrize("problem", kernels.PROBLEMS)
@pytest.mark.parametrize("choice", [True, False])
def test_a_choice_is_kept_to(undecided, problem, choice):
    kernels.use({problem: choice})
    owner, name = SPIES[problem.removesuffix("_grad").removesuffix("_bf16")]
    with mock.patch.object(owner, name, wraps=getattr(owner, name)) as spy:
        large(problem)
    assert spy.called == choice
    assert not undecided.called


def test_small_operations_measure_nothing(undecided):
    model = wav2vec2_model(**TINY)
    for context in (nullcontext(), torch.autocast("cpu", torch.bfloat16), torch.no_grad()):
        with context:
            model.extract_features(torch.randn(2, 16_000))
    assert not undecided.called
    assert kernels.choices() == {}


def test_a_compiler_an_exporter_or_a_switched_off_form_measures_nothing(undecided, monkeypatch):
    class Product(torch.nn.Module):
        def forward(self, x, weight):
            return kernels.linear(x, weight)

    inputs = torch.ones(1, 500, 500), torch.ones(500, 500)
    torch.export.export(Product(), inputs)
    torch.compile(Product(), backend="eager", fullgraph=True)(*inputs)
    with kernels.usual_forms(kernels.FORMS):
        for problem in kernels.PROBLEMS:
            large(problem)
    assert not undecided.called


def test_measuring_leaves_no_trace(monkeypatch):
    monkeypatch.setattr(kernels, "_choices", {})
    monkeypatch.delenv("WAV2VEC2_KERNELS", raising=False)
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    saved = []
    with (
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x),
    ):
        found = kernels.decide()
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
    assert list(found) == list(kernels.PROBLEMS) and set(map(type, found.values())) == {bool}
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
    assert not saved


def test_choices_go_to_another_process(undecided, monkeypatch):
    kernels.use({"onednn": True, "shifted_bf16": False})
    assert kernels.choices() == {"onednn": True, "shifted_bf16": False}
    found = kernels.decide()  # measures the others
    assert undecided.call_count == len(kernels.PROBLEMS) - 2
    assert found == kernels.choices() == {name: name == "onednn" for name in kernels.PROBLEMS}
    kernels.use(dict.fromkeys(found, True))
    assert all(kernels.decide().values())
    copy = kernels.choices()
    copy.clear()  # is nobody else's
    assert len(kernels.choices()) == len(found)


@pytest.mark.parametrize("taken", ["", "onednn", "written_out_bf16,shifted_bf16"])
def test_choices_by_the_environment(undecided, monkeypatch, taken):
    monkeypatch.setenv("WAV2VEC2_KERNELS", taken)
    assert kernels.decide() == {name: name in taken.split(",") for name in kernels.PROBLEMS}
    kernels.use({"onednn": False})  # what a checkpoint says holds
    assert not kernels.decide()["onednn"]
    assert not undecided.called


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_inherits_the_choices(undecided):
    kernels.use({"onednn": True})
    child = os.fork()
    if child == 0:
        os._exit(0 if kernels.choices() == {"onednn": True} else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_unknown_names(undecided, monkeypatch):
    with pytest.raises(ValueError, match=r"^use: no form 'onedn'; there are onednn, channels_last_grad, [a-z0-9_, ]+$"):
        kernels.use({"onedn": True})
    with (
        pytest.raises(ValueError, match=r"^usual_forms: no form 'norm'; there are onednn, channels_last, "),
        kernels.usual_forms(["norm"]),
    ):
        pass
    monkeypatch.setenv("WAV2VEC2_KERNELS", "onednn, shifted")
    with pytest.raises(ValueError, match=r"^WAV2VEC2_KERNELS: no form ' shifted'; there are onednn, "):
        kernels.decide()
    assert kernels.choices() == {}
