"""Fine-tuning of a compressed model to write down speech: transcripts, training, decoding."""

import distillation  # noqa: F401  # before torch, for its setting of threads
