"""Speed, mini-SUPERB and reports: what they print is what the README quotes."""

import distillation  # noqa: F401  # before torch, for its setting of threads
