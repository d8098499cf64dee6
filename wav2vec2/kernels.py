"""Operations whose fastest form depends on the machine; each computes what its name says, whichever form runs.

FORMS names the faster forms of a CPU, ``benchmarks/speed.py`` shows what each gives; a compiler or an exporter gets the
usual ones, but for those of :func:`forms_in_graphs`. Most won wherever they were tried, or drop other units, which is
no question of time. PROBLEMS are those that lose on some processors: when a process first meets a large operation of
the kind, it times both forms on a small problem, on one thread, and keeps to the winner.

Forms round differently, so whoever needs equal bits of several processes reads :func:`decide` in one and gives it to
the others, by :func:`use` or by the environment: ``WAV2VEC2_KERNELS=onednn,shifted_bf16`` names those of PROBLEMS whose
faster form is taken, with commas between them (empty for none), and nothing is measured.

On a GPU the operations are torch's own, without cuDNN's attention.

Shapes: B batch, T frames, C channels, K kernel size.
"""

import contextlib
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MIN_MACS = 1e8  # a smaller product is over before oneDNN has prepared one of a new shape
MAX_WRITTEN_OUT = 2048  # frames up to which bfloat16 attention without a fused kernel is faster on a CPU
SHARE_BITS = 16  # of randomness per element that may be dropped
HEAD_MULTIPLE = 8  # widths of heads that fused attention with a mask takes on a GPU


MARGIN = 1.1  # times faster that a measured form must be to be taken
RUNS = 4  # of each form; the fastest counts
ENOUGH = 0.1  # seconds after which neither is run again: what takes so long needs no repetition
FORMS = {
    "onednn": "float32 products by oneDNN",
    "channels_last": "channels of a frame together",
    "shifted": "positional convolution over shifted copies",
    "folded_norm": "first norm folded into its convolution",
    "written_out": "attention written out",
    "dropout": "dropout from 16 random bits",
}
_off: frozenset[str] = frozenset()  # of FORMS, by usual_forms
_in_graphs: frozenset[str] = frozenset()  # of FORMS, by forms_in_graphs
_choices: dict[str, bool] = {}  # of PROBLEMS; a fork inherits them
_choosing = threading.Lock()
_clock = time.thread_time  # what other programs do meanwhile does not count


class Problem(NamedTuple):
    """Two forms of an operation, and tensors to time them on."""

    usual: Callable[..., Tensor]
    faster: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    backward: bool  # is timed too


def _known(names: Iterable[str], table: Mapping[str, object], what: str) -> frozenset[str]:
    """The names as a set; ValueError for one that is not in the table."""
    names = frozenset(names)
    if unknown := sorted(names - table.keys()):
        raise ValueError(f"{what}: no form {unknown[0]!r}; there are {', '.join(table)}")
    return names


def traced() -> bool:
    """Whether a compiler or an exporter looks on: it gets the usual form of an operation, if no other is asked for."""
    return torch.compiler.is_compiling()


def takes(form: str) -> bool:
    """Whether an operation may take the faster one of FORMS."""
    return form in _in_graphs if traced() else form not in _off


@contextlib.contextmanager
def usual_forms(names: Iterable[str]) -> Iterator[None]:
    """Without some of FORMS, on all threads; ValueError for an unknown name."""
    global _off
    before, _off = _off, _off | _known(names, FORMS, "usual_forms")
    try:
        yield
    finally:
        _off = before


@contextlib.contextmanager
def forms_in_graphs(names: Iterable[str]) -> Iterator[None]:
    """Compilers and exporters get some of FORMS too, on all threads; ValueError for an unknown name."""
    global _in_graphs
    before, _in_graphs = _in_graphs, _in_graphs | _known(names, FORMS, "forms_in_graphs")
    try:
        yield
    finally:
        _in_graphs = before


def choices() -> dict[str, bool]:
    """Which of PROBLEMS take the faster form, as far as that is decided."""
    return dict(_choices)


def decide() -> dict[str, bool]:
    """Decide all of PROBLEMS now, in less than half a second of a core, and return them."""
    return {problem: _chosen(problem) for problem in PROBLEMS}


def use(given: Mapping[str, bool]) -> None:
    """Take what another process has decided, over what this one has; ValueError for an unknown name."""
    _known(given, PROBLEMS, "use")
    _choices.update(given)


def _chosen(problem: str) -> bool:
    """Whether the faster form is taken; decided here if it is not yet."""
    if problem not in _choices:
        with _choosing:
            names = os.environ.get("WAV2VEC2_KERNELS")
            if problem in _choices:
                pass  # by another thread
            elif names is not None:
                taken = _known(filter(None, names.split(",")), PROBLEMS, "WAV2VEC2_KERNELS")
                _choices[problem] = problem in taken
            else:
                # on a thread of its own, where no mode of the caller's holds: autocast, inference, hooks, counters
                with ThreadPoolExecutor(1) as pool:
                    _choices[problem] = pool.submit(_wins, PROBLEMS[problem]).result()
    return _choices[problem]


def _wins(problem: Problem) -> bool:
    """Whether the faster form is so here, by MARGIN at least; nothing random is drawn."""
    inputs = [torch.full(shape, 0.01, dtype=problem.dtype, requires_grad=problem.backward) for shape in problem.shapes]
    fastest = [math.inf, math.inf]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = _clock()
        for _ in range(RUNS):
            for i, form in enumerate((problem.usual, problem.faster)):
                begin = _clock()
                result = form(*inputs)
                if problem.backward:
                    torch.autograd.grad(result.square().sum(), inputs)
                fastest[i] = min(fastest[i], _clock() - begin)
            if _clock() - start > ENOUGH:
                break
    finally:
        torch.set_num_threads(threads)
    return MARGIN * fastest[1] <= fastest[0] and fastest[0] > 0


def computes_in_float32(x: Tensor) -> bool:
    """Whether an operation on ``x`` runs in float32: that is its type, and autocast does not lower it."""
    device = x.device.type
    lowered = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return x.dtype == torch.float32 and not lowered


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: [..., C_in] -> [..., C_out].

    Large float32 products go through oneDNN where MKL is slower, as it is on other makers' processors.
    """
    if (
        takes("onednn")
        and x.device.type == "cpu"
        and x.dim() == 3
        and x.numel() * len(weight) >= MIN_MACS
        and computes_in_float32(x)
        and _chosen("onednn")
    ):
        return _linear_by_onednn(x, weight, bias)
    return F.linear(x, weight, bias)


def _linear_by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`linear` as a convolution of kernel size 1, of [B, T, C_in]."""
    x = x.transpose(1, 2).unsqueeze(2)  # channels last, as it lies in memory
    return F.conv2d(x, weight[:, :, None, None], bias).squeeze(2).transpose(1, 2)


def keeps_channels_first(x: Tensor, num_macs: float) -> bool:
    """Whether :func:`conv1d` of ``x`` is fastest with the frames of a channel next to each other in memory.

    It may be where float32 gradients follow: with the channels last, oneDNN's float32 backward pass takes longer on
    some processors, and a fraction of the time on others. Lower precisions (also on a GPU, whose tensor cores want it
    so) and float32 without gradients are faster with the channels of a frame together. A graph to be exported has the
    usual layout.
    """
    if not takes("channels_last"):
        return True
    if not computes_in_float32(x):
        return False
    if x.device.type != "cpu":
        return True
    if not torch.is_grad_enabled():
        return False
    return num_macs < MIN_MACS or not _chosen("channels_last_grad")


def conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Convolution over frames without padding: [B, T, C_in] -> [B, T', C_out], ``weight`` [C_out, C_in, K]."""
    first = keeps_channels_first(x, x.shape[0] * x.shape[1] / stride * weight.numel())
    return (_conv1d_channels_first if first else _conv1d_channels_last)(x, weight, bias, stride)


def _conv1d_channels_first(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    return F.conv1d(x.transpose(1, 2), weight, bias, stride).transpose(1, 2)


def _conv1d_channels_last(x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: int = 1) -> Tensor:
    # F.conv1d would copy its input to have the channels first
    x = x.transpose(1, 2).unsqueeze(2)
    return F.conv2d(x, weight.unsqueeze(2), bias, (1, stride)).squeeze(2).transpose(1, 2)


class _WideConv1d(torch.autograd.Function):
    """Grouped convolution of stride 1 to as many frames, with the kernel cut into parts.

    Few channels per group and a long kernel suit no CPU kernel. The same sum is taken over more channels with a shorter
    kernel: copies of the input, shifted against each other, next to the parts of the kernel. The copies are made again
    in the backward pass, not kept.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, parts: int) -> Tensor:
        """x [B, C, T], weight [C, C / groups, K] -> [B, C, T]; ``parts`` divides K."""
        ctx.save_for_backward(x, weight)
        ctx.groups, ctx.parts = groups, parts
        left = weight.shape[-1] // 2
        return F.conv1d(_shifted(x, weight, parts, left), _cut(weight, parts), bias, groups=groups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient of the input is such a convolution too, with the kernel turned around."""
        (grad,), (x, weight), groups, parts = grads, ctx.saved_tensors, ctx.groups, ctx.parts
        left = weight.shape[-1] // 2
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            turned = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(-1)
            copies = _shifted(grad, weight, parts, weight.shape[-1] - 1 - left)
            grad_x = F.conv1d(copies, _cut(turned, parts), groups=groups)
        if ctx.needs_input_grad[1]:
            copies = _shifted(x, weight, parts, left)
            _, found, _ = torch.ops.aten.convolution_backward(
                grad, copies, _cut(weight, parts), None, [1], [0], [1], False, [0], groups, [False, True, False]
            )
            grad_weight = found.unflatten(1, (-1, parts)).flatten(2)
        return grad_x, grad_weight, grad.sum((0, 2)) if ctx.needs_input_grad[2] else None, None, None


def _shifted(x: Tensor, weight: Tensor, parts: int, left: int) -> Tensor:
    """[B, C, T] -> [B, C * parts, T + K / parts - 1], of ``x`` padded with K - 1 zeros, ``left`` of them before it."""
    kernel_size = weight.shape[-1]
    part = kernel_size // parts
    x = F.pad(x, (left, kernel_size - 1 - left))
    return x.unfold(-1, x.shape[-1] - kernel_size + part, part).flatten(1, 2)


def _cut(weight: Tensor, parts: int) -> Tensor:
    """[C_out, C_in, K] -> [C_out, C_in * parts, K / parts]."""
    return weight.unflatten(-1, (parts, -1)).flatten(1, 2)


def wide_conv1d(x: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
    """Grouped convolution of large kernel: [B, C, T] -> [B, C, T]; an even kernel sees one frame more to the left."""
    num_frames, kernel_size = x.shape[-1], weight.shape[-1]
    float32 = computes_in_float32(x)
    parts = math.isqrt(2 * kernel_size) // (2 if float32 else 1)  # 8 or 16 of the usual 128
    if (
        x.device.type != "cpu"
        or parts < 2
        or kernel_size % parts
        or not takes("shifted")
        or not (float32 or x.numel() * weight[0].numel() < MIN_MACS or _chosen("shifted_bf16"))
    ):
        return F.conv1d(x, weight, bias, padding=kernel_size // 2, groups=groups)[..., :num_frames]
    if not float32 and torch.is_autocast_enabled("cpu"):
        x, weight, bias = (tensor.to(torch.get_autocast_dtype("cpu")) for tensor in (x, weight, bias))
    return _WideConv1d.apply(x, weight, bias, groups, parts)


class _CPUDropout(torch.autograd.Function):
    """Dropout from 16 random bits per element; keeps one byte per element for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        """Drop with probability ``p``, rounded to a multiple of 2^-16 below 1."""
        threshold = min(round(p * 2**SHARE_BITS), 2**SHARE_BITS - 1)
        words = torch.empty(-(-x.numel() * SHARE_BITS // 64), dtype=torch.int64).random_(-(2**63), None)
        shares = words.view(torch.int16)[: x.numel()].view(x.shape)
        keep = torch.empty(x.shape, dtype=torch.uint8)  # not bool, whose conversion to another type is slow
        torch.ge(shares, threshold - 2 ** (SHARE_BITS - 1), out=keep)
        ctx.save_for_backward(keep)
        ctx.factor = 1 / (1 - threshold / 2**SHARE_BITS)
        return (x * keep).mul_(ctx.factor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Scale what was kept."""
        return (grads[0] * ctx.saved_tensors[0]).mul_(ctx.factor), None


def dropout(x: Tensor, p: float) -> Tensor:
    """``F.dropout`` in training; torch's own draws a double per element on a CPU, which costs as much as a layer."""
    if p == 0:
        return x
    if x.device.type != "cpu" or not 0 < p < 1 or not takes("dropout"):
        return F.dropout(x, p)
    return _CPUDropout.apply(x, p)


class Dropout(nn.Dropout):
    """``nn.Dropout`` by :func:`dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        """Any shape."""
        return dropout(input, self.p) if self.training else input


def attention_weights(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over keys of q k^T / sqrt(E), written out: [B, h, T, E] twice -> [B, h, T, T].

    Args:
        q: queries.
        k: keys.
        mask: broadcast to [B, h, T, T]; bool with False where nothing is attended to, or an additive bias; or None.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """Attention with dropout ``p`` on its weights: [B, h, T, E] three times -> [B, h, T, E]; ``mask`` as above.

    Fused, except on a CPU where that is slower: with dropout, and on some in bfloat16 over few frames.
    """
    if q.is_cuda and not traced():
        with _without_cudnn_attention():
            return fused_attention(q, k, v, mask, p)
    if q.device.type != "cpu" or not takes("written_out") or not _slow_if_fused(q, p):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    return dropout(attention_weights(q, k, mask).to(v.dtype), p) @ v


def _slow_if_fused(q: Tensor, p: float) -> bool:
    """Whether attention of [B, h, T, E] is faster written out, on a CPU."""
    num_frames = q.shape[2]
    if p > 0 or q.dtype == torch.float32 or num_frames > MAX_WRITTEN_OUT:
        return p > 0
    small = 2 * q.numel() * num_frames < MIN_MACS
    return small or _chosen("written_out_bf16_grad" if torch.is_grad_enabled() else "written_out_bf16")


@contextlib.contextmanager
def _without_cudnn_attention() -> Iterator[None]:
    """cuDNN is torch's first choice on Hopper, and takes half a second to plan for a new shape.

    Live heads, rows and frames change with every batch.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, p: float) -> Tensor:
    """:func:`attend` for a GPU, where no fused kernel takes a mask and heads whose width is no multiple of 8.

    Zeros beside them change nothing; without a fused kernel all weights would be kept, in float32.
    """
    width = q.shape[-1]
    if mask is None or width % HEAD_MULTIPLE == 0:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p)
    q, k, v = (F.pad(x, (0, -width % HEAD_MULTIPLE)) for x in (q, k, v))
    x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=p, scale=width**-0.5)
    return x[..., :width]


_HEADS = ((1, 4, 250, 64),) * 3
_WRITTEN_OUT = Problem(
    F.scaled_dot_product_attention, lambda q, k, v: attention_weights(q, k, None) @ v, _HEADS, torch.bfloat16, False
)
PROBLEMS = {
    # sixteen rows: on one thread, torch gives convolutions of kernel size 1 with fewer to MKL
    "onednn": Problem(F.linear, _linear_by_onednn, ((16, 64, 512), (512, 512)), torch.float32, False),
    "channels_last_grad": Problem(
        _conv1d_channels_first, _conv1d_channels_last, ((1, 600, 96), (96, 96, 3)), torch.float32, True
    ),
    "shifted_bf16": Problem(
        lambda x, weight: F.conv1d(x, weight, padding=64, groups=2)[..., :-1],
        lambda x, weight: _WideConv1d.apply(x, weight, weight[:, 0, 0], 2, 16),
        ((1, 96, 125), (96, 48, 128)), torch.bfloat16, True,
    ),
    "written_out_bf16": _WRITTEN_OUT,
    "written_out_bf16_grad": _WRITTEN_OUT._replace(backward=True),
}  # fmt: skip
