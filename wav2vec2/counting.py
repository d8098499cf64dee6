"""How many parameters modules have."""

from torch import nn


def count_params(*modules: nn.Module | None) -> int:
    """Parameters of all modules that exist, those of masks included."""
    return sum(p.numel() for module in modules if module is not None for p in module.parameters())
