"""Other formats of a model: what ``export.py`` writes, and how each is checked against PyTorch."""

import distillation  # noqa: F401  # before torch, for its setting of threads
