"""How ONNX files write convolutions and attention: as products of matrices.

ONNX Runtime computes those best, and in 8 bits too. Its convolutions over one dimension take several times as long, and
want another order of the values than the rest of the model.

Shapes: B batch, T frames, C channels, K kernel size, G groups, h heads, E head width.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import onnxscript
import torch

PARTS = 8  # that a grouped kernel is cut into; more make wider products and more sums
op: Any = onnxscript.opset22  # typed for arrays alone


def conv1d(
    x: ir.Value,
    weight: ir.Value,
    bias: ir.Value | None = None,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Any:
    """``F.conv1d``: [B, C, T] -> [B, C', T'] with ``weight`` [C', C / G, K]."""
    assert tuple(dilation) == (1,) and (groups == 1 or tuple(stride) == (1,))
    frames = op.Transpose(x, perm=[0, 2, 1])
    if padding[0]:
        frames = op.Pad(frames, [0, padding[0], 0, 0, padding[0], 0])
    y = _grouped(frames, weight, groups) if groups > 1 else _strided(frames, weight, stride[0])
    return op.Transpose(y if bias is None else op.Add(y, bias), perm=[0, 2, 1])


def _strided(x: Any, weight: ir.Value, stride: int) -> Any:
    """[B, T, C] -> [B, T', C']: the frames that each output sees stand side by side, and are multiplied at once.

    Those that fill whole strides are there already, one after another; the others are taken one by one.
    """
    num_out, width, kernel = _sizes(weight)
    whole = kernel // stride
    num = op.Div(_num_frames(x) - (kernel - stride), [stride])
    blocks = x
    if stride > 1:
        blocks = op.Reshape(_slice(x, 1, 0, (num + (whole - 1)) * stride), [0, -1, stride * width])
    seen = [blocks] if whole == 1 else [_slice(blocks, 1, i, num + i) for i in range(whole)]
    seen += [_slice(x, 1, i, num * stride + (i + 1 - stride), stride) for i in range(whole * stride, kernel)]
    taps = op.Reshape(op.Transpose(weight, perm=[2, 1, 0]), [kernel * width, num_out])
    return op.MatMul(seen[0] if len(seen) == 1 else op.Concat(*seen, axis=-1), taps)


def _grouped(x: Any, weight: ir.Value, groups: int) -> Any:
    """[B, T, C] -> [B, T', C'] of stride 1.

    The taps i, i + P, i + 2 P, ... of a kernel see frames at the same distances for every i < P. So copies of the input
    that are shifted by 0, P, 2 P, ... stand side by side once, one product gives the sums over the taps of every i, and
    an output is the sum of P of those, shifted by i.
    """
    num_out, width, kernel = _sizes(weight)
    parts = math.gcd(kernel, PARTS)
    copies, out = kernel // parts, num_out // groups
    num = _num_frames(x) - (kernel - 1)
    x = op.Transpose(op.Reshape(x, [0, 0, groups, width]), perm=[0, 2, 1, 3])
    x = op.Concat(*(_slice(x, 2, i * parts, num + (i * parts + parts - 1)) for i in range(copies)), axis=-1)
    taps = op.Transpose(op.Reshape(weight, [groups, out, width, copies, parts]), perm=[0, 3, 2, 4, 1])
    x = op.MatMul(x, op.Reshape(taps, [groups, copies * width, parts * out]))
    x = op.Sum(*(_slice(_slice(x, 3, i * out, (i + 1) * out), 2, i, num + i) for i in range(parts)))
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), [0, 0, num_out])


def _sizes(value: ir.Value) -> list[int]:
    assert value.shape is not None
    return list(value.shape.numpy())


def _num_frames(x: Any) -> Any:
    """Of [B, T, C]: [1]."""
    return op.Shape(x, start=1, end=2)


def _slice(x: Any, axis: int, start: int, end: Any, step: int = 1) -> Any:
    """``end`` is a number or [1]."""
    return op.Slice(x, [start], [end] if isinstance(end, int) else end, [axis], [step])


def attention(
    q: ir.Value, k: ir.Value, v: ir.Value, attn_mask: ir.Value | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Any:  # fmt: skip
    """``F.scaled_dot_product_attention``: [B, h, T, E] three times -> [B, h, T, E].

    The usual translation looks for rows that attend to nothing, of which the model has none.
    """
    width = None if q.shape is None else q.shape[-1]
    assert not (dropout_p or is_causal or enable_gqa) and isinstance(width, int)
    scores = op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2])) * (scale or width**-0.5)
    if attn_mask is not None:
        bias: Any = attn_mask
        if attn_mask.dtype == ir.DataType.BOOL:
            bias = op.Where(attn_mask, op.Constant(value_float=0.0), op.Constant(value_float=-math.inf))
        scores = scores + bias
    return op.MatMul(op.Softmax(scores, axis=-1), v)


TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.aten.conv1d.default: conv1d,
    torch.ops.aten.scaled_dot_product_attention.default: attention,
}
