"""Models that exports are tested with, and the folders that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import export
from exporting import verify
from exporting.source import ExportOptions
from tests.helpers import run_exported_here
from wav2vec2 import save_model, wav2vec2_model

MASKS = {
    "extractor_prune_conv_channels": True,
    "encoder_prune_attention_heads": True,
    "encoder_prune_feed_forward_intermediate": True,
    "encoder_prune_attention_layer": True,
    "encoder_prune_feed_forward_layer": True,
}
MAP_REUSE = {"encoder_reuse_attention": [False, True] * 2, "encoder_layer_drop": 0.0}
LARGE = {"extractor_mode": "layer_norm", "encoder_layer_norm_first": True, "normalize_waveform": True}
WAVLM = {
    "encoder_num_heads": None,
    "encoder_head_dim": None,
    "encoder_total_num_heads": [4] * 4,
    "encoder_remaining_heads": [[0, 1, 2, 3]] * 4,
    "encoder_num_buckets": 32,
    "encoder_max_distance": 80,
}
THIN = {"extractor_conv_layer_config": [(8, 10, 5), (12, 1, 1), *[(12, 3, 2)] * 4, (24, 1, 1), *[(24, 2, 2)] * 2],
        "encoder_use_projection": False}  # fmt: skip
# an export takes its time by the number of operations; frames are still of 400 samples, 320 apart
FEW_CONVOLUTIONS = {"extractor_conv_layer_config": [(12, 10, 5), (12, 15, 8), (24, 9, 8)]}
KINDS: dict[str, dict[str, Any]] = {
    "DPHuBERT": MASKS,
    "DPWavLM": {**WAVLM, **MASKS},
    "DPWavLM of channels": {
        **WAVLM,
        **MASKS,
        "encoder_prune_attention_heads": False,
        "encoder_prune_attention_head_channels": True,
    },
    "DPHuBERT of Large": {**LARGE, **MASKS},
    "ARMHuBERT": {**THIN, **MAP_REUSE},
    "FitHuBERT": {**THIN, "encoder_time_reduction": 2},
}
# all that is special about students and WavLM in one model
EVERYTHING = {**WAVLM, **MASKS, **THIN, **MAP_REUSE, "encoder_time_reduction": 2}
VOCABULARY = ["<pad>", "|", "A", "B", "C"]


def make(path: Path, tiny_config: dict, **changes: Any) -> Path:
    """A random model; masks leave about half of it."""
    torch.manual_seed(0)
    model = wav2vec2_model(**{**tiny_config, **changes})
    for name, parameter in model.named_parameters():
        if not name.endswith("log_alpha"):
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    for mask in model.masks().values():
        torch.nn.init.normal_(mask.log_alpha, 0.0, 2.0)
    extra = {"vocabulary": VOCABULARY} if model.aux is not None else {}
    save_model(path, model, **extra)
    return path


def exported(model: Path, to: str, out: Path, last: bool = False, int8: bool = False, native: bool = False) -> Path:
    export.run(model, to, out, ExportOptions(last, "int8" if int8 else None, native))
    return out


def transformers_folder(model: Path, out: Path, native: bool = False) -> Path:
    """A folder for transformers, checked on short audio as the fixture ``exported_here`` does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify, "run_exported", run_exported_here)
        patch.setattr(verify, "BATCHES", [[0.05], [0.05, 0.4]])
        return exported(model, "hf", out, native=native)


def waveforms() -> list[np.ndarray]:
    """Noise of 1 s, 0.44 s and 56 ms: 49, 21 and 2 frames."""
    random = np.random.default_rng(1)
    return [random.standard_normal(n).astype(np.float32) for n in (16_000, 7_000, 900)]
