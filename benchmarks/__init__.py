"""Speed, formats, methods and mini-SUPERB: what they print is what docs/benchmarks.md quotes."""

import distillation  # noqa: F401  # before torch, for its setting of threads
