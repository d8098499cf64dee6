"""Prunable wav2vec 2.0 / HuBERT / WavLM models: load, run, mask, count and prune. Needs torch alone."""

from .checkpoint import CheckpointError, load_model, save_model
from .model import Wav2Vec2Model, wav2vec2_model
from .pruning import prune

__all__ = ["CheckpointError", "Wav2Vec2Model", "load_model", "prune", "save_model", "wav2vec2_model"]
