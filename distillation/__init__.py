"""Data, losses, objectives, sparsity, schedules, checkpoints and configuration of the training stages."""
