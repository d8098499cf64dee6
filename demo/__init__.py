"""The synthetic corpus and the tiny teacher that the demo, mini-SUPERB and the tests use."""

import distillation  # noqa: F401  # before torch, for its setting of threads
