"""Tiny models of every architecture, and masks set by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from wav2vec2 import Wav2Vec2Model, wav2vec2_model

FLAGS = {
    "conv": "extractor_prune_conv_channels",
    "head": "encoder_prune_attention_heads",
    "interm": "encoder_prune_feed_forward_intermediate",
    "attlayer": "encoder_prune_attention_layer",
    "ffnlayer": "encoder_prune_feed_forward_layer",
}


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


def _config(architecture: str, units: tuple[str, ...] = (), **changes: Any) -> dict[str, Any]:
    """``architecture`` is hubert or wavlm, then base (group norm, post-norm) or large (layer norm, pre-norm)."""
    family, size = architecture.split("_")
    large = size == "large"
    num_layers = 3
    if family == "wavlm":
        heads = {
            "encoder_total_num_heads": [4] * num_layers,
            "encoder_remaining_heads": [[0, 1, 2, 3] for _ in range(num_layers)],
            "encoder_num_buckets": 16,
            "encoder_max_distance": 40,
        }
    else:
        heads = {"encoder_num_heads": [4] * num_layers, "encoder_head_dim": 4}
    return {
        "extractor_mode": "layer_norm" if large else "group_norm",
        "extractor_conv_layer_config": [(12, 10, 5), (10, 3, 2), (8, 2, 2)],
        "extractor_conv_bias": large,
        "encoder_embed_dim": 16,
        "encoder_projection_dropout": 0.0,
        "encoder_pos_conv_kernel": 8,
        "encoder_pos_conv_groups": 4,
        "encoder_num_layers": num_layers,
        "encoder_use_attention": [True] * num_layers,
        "encoder_use_feed_forward": [True] * num_layers,
        **heads,
        "encoder_attention_dropout": 0.0,
        "encoder_ff_interm_features": [24] * num_layers,
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.0,
        "encoder_layer_norm_first": large,
        "encoder_layer_drop": 0.0,
        "aux_num_out": None,
        "normalize_waveform": large,
        **{flag: unit in units for unit, flag in FLAGS.items()},
        **({"encoder_prune_attention_head_channels": True} if "head_channel" in units else {}),
        **changes,
    }


def _model(architecture: str, units: tuple[str, ...] = (), **changes: Any) -> Wav2Vec2Model:
    """In eval mode, with every parameter random: norms and biases start as 1 and 0, which hides mistakes."""
    model = wav2vec2_model(**_config(architecture, units, **changes))
    for name, p in model.named_parameters():
        if not name.endswith("log_alpha"):
            p.data.add_(torch.randn_like(p), alpha=0.2)
    for mask in model.masks().values():
        torch.nn.init.normal_(mask.log_alpha, 0.0, 2.0)
        if len(mask) == 1:
            mask.log_alpha.data.abs_()  # alive, but soft
    return model.eval()


@pytest.fixture(scope="session")
def flags() -> dict[str, str]:
    return FLAGS


@pytest.fixture(scope="session")
def tiny_config() -> Callable[..., dict[str, Any]]:
    return _config


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Wav2Vec2Model]:
    return _model
