"""What happens around the updates of a run: progress, guards, metrics, processes, the lock, memory."""
