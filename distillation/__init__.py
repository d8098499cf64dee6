"""Data, losses, objectives, sparsity, schedules, checkpoints and configuration of the training stages."""

import os

# Threads that spin while they wait slow each other down where a machine does other work: training by a factor of 6.
# torch's OpenMP looks once, when torch is first imported; so every command imports this package before it.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
