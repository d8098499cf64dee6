"""Other formats of a model, each checked against PyTorch; and the proof that a converted teacher is its original."""

import distillation  # noqa: F401  # before torch, for its setting of threads
