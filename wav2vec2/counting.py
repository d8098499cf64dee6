"""Counting parameters."""

from __future__ import annotations

from torch import nn


def count_params(*modules: nn.Module | None) -> int:
    """Parameters of these modules together, masks included; those that are None count as nothing."""
    return sum(p.numel() for module in modules if module is not None for p in module.parameters())
