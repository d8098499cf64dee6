"""Heads: what maps a student's states to the teacher's, in training only."""

from torch import Tensor, nn


def identity_linear(in_features: int, out_features: int) -> nn.Linear:
    """Linear map that starts as the identity; on unequal widths, of the leading coordinates."""
    linear = nn.Linear(in_features, out_features)
    nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear


class LayerHead(nn.Module):
    """Linear map of one student layer to the teacher's width; first back to T frames if the student is time-reduced.

    Starts as the identity where the widths are equal (the student may be a copy), else at random as published.

    Args:
        width: D.
        teacher_width: E.
        reduction: frames that the student merges into one; 1 for none.
    """

    def __init__(self, width: int, teacher_width: int, reduction: int) -> None:
        super().__init__()
        self.upsampler = nn.ConvTranspose1d(width, width, reduction, reduction) if reduction > 1 else None
        same = width == teacher_width
        self.linear = identity_linear(width, width) if same else nn.Linear(width, teacher_width)

    def forward(self, state: Tensor, num_frames: int) -> Tensor:
        """[B, T', D] -> [B, T, E]."""
        if self.upsampler is not None:
            state = self.upsampler(state.transpose(1, 2)).transpose(1, 2)[:, :num_frames]
        return self.linear(state)
