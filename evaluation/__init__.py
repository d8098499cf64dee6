"""SUPERB through s3prl, and its scores."""

import distillation  # noqa: F401  # before torch, for its setting of threads
