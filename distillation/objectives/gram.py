"""Distances between temporal Gram matrices, without ever holding one.

Shapes: B batch, T frames, D student width, E teacher width, K frames per block.
"""

from typing import Any

import torch
from torch import Tensor

BLOCK_ENTRIES = 2**24  # of one block [B, K, T]: 64 MiB in float32


class GramDistance(torch.autograd.Function):
    """Sum over rows and frames i, j of ``(<x_i, y_j> - <tx_i, ty_j>)^2``, block by block of frames i.

    The gradient is computed along with the value, so that what stays for the backward pass is [B, T, D], not [B, T, T].
    Everything is computed in the type of the arguments, whatever the autocast around it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor | None, tx: Tensor, ty: Tensor, block: int) -> Tensor:
        """x, y [B, T, D] of the student (None for y = x), tx, ty [B, T, E] of the teacher -> scalar."""
        other = x if y is None else y
        total = torch.zeros((), dtype=x.dtype, device=x.device)
        needs_x, needs_y = ctx.needs_input_grad[0], y is not None and ctx.needs_input_grad[1]
        grad_x = torch.empty_like(x) if needs_x else None
        grad_y = torch.zeros_like(other) if needs_y else None
        with torch.autocast(x.device.type, enabled=False):
            for start in range(0, x.shape[1], block):
                rows = slice(start, start + block)
                error = x[:, rows] @ other.transpose(1, 2) - tx[:, rows] @ ty.transpose(1, 2)
                total += error.square().sum()
                if grad_x is not None:
                    grad_x[:, rows] = error @ other
                if grad_y is not None:
                    grad_y += error.transpose(1, 2) @ x[:, rows]
        if grad_x is not None:
            grad_x *= 4 if y is None else 2  # with y = x both sides are x, and the error is symmetric
        if grad_y is not None:
            grad_y *= 2
        ctx.save_for_backward(grad_x, grad_y)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """Scale the gradients that are already there."""
        grad_x, grad_y = (None if saved is None else saved * grads[0] for saved in ctx.saved_tensors)
        return grad_x, grad_y, None, None, None


def gram_distance(x: Tensor, y: Tensor | None, tx: Tensor, ty: Tensor, block: int | None = None) -> Tensor:
    """Squared Frobenius distance of ``x y^T`` and ``tx ty^T``, summed over the batch.

    Args:
        x: [B, T, D], zero on padding, as are the others; in float32 or float64.
        y: [B, T, D]; None for y = x.
        tx: [B, T, E], without gradient.
        ty: [B, T, E], without gradient.
        block: frames i at a time; by default as many as 64 MiB hold.
    """
    if block is None:
        block = max(1, BLOCK_ENTRIES // max(1, x.shape[0] * x.shape[1]))
    if not torch.is_grad_enabled():  # a Function does not see that nobody wants its gradient
        x, y = x.detach(), None if y is None else y.detach()
    return GramDistance.apply(x, y, tx, ty, block)


def gram_square(x: Tensor, y: Tensor) -> Tensor:
    """Squared Frobenius norm of ``x y^T``, summed over the batch: the inner product of the [D, D] Gram matrices."""
    with torch.autocast(x.device.type, enabled=False):
        return ((x.transpose(1, 2) @ x) * (y.transpose(1, 2) @ y)).sum()
