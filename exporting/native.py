"""Models that transformers has a class of its own for: HubertModel and WavLMModel, HubertForCTC and WavLMForCTC."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import HubertConfig, HubertForCTC, HubertModel, PreTrainedModel, WavLMConfig, WavLMForCTC, WavLMModel

from distillation.errors import UserError
from exporting.verify import ExportedOutputs
from wav2vec2 import Wav2Vec2Model
from wav2vec2.checkpoint import DUMMY_WEIGHT
from wav2vec2.importers.huggingface import EXTRACTOR_MODES, NORMALIZE_EPS, SETTINGS
from wav2vec2.transformer import torch_spelling


class NativeOutputs(ExportedOutputs):
    """A model with the outputs that it has in transformers' own class.

    These are the layers 1 to L, the last one through the final layer norm where there is one. State 0 is another one
    there: the first layer's input, after the positional convolution.
    """

    def __init__(self, model: Wav2Vec2Model) -> None:
        super().__init__(model, last=False)

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, ...]:
        """Waveforms [B, N], lengths [B] -> layers [L, B, T, D], frames [B], logits [B, T, V]."""
        states, *others = super().forward(waveforms, lengths)
        transformer = self.model.encoder.transformer
        last = transformer.layer_norm(states[-1]) if transformer.layer_norm_first else states[-1]
        return torch.cat([states[1:-1], last[None]]), *others


def padding_changes(model: Wav2Vec2Model) -> bool:
    """Whether padding changes what transformers' own class computes: group norm lets it into the statistics."""
    return model.config["extractor_mode"] == "group_norm"


def require_native(model: Wav2Vec2Model, source: Path) -> None:
    """Refuse a model that transformers has no class for.

    Args:
        model: dense.
        source: file that it came from.

    Raises:
        UserError: naming what transformers lacks.
    """
    config = model.config
    has_blocks = [*config["encoder_use_attention"], *config["encoder_use_feed_forward"]]
    is_wavlm, has_norm = _is_wavlm(config), config.get("encoder_projection_layer_norm") is not False
    eps = model.normalize_eps
    lacks = {
        "time reduction": config.get("encoder_time_reduction", 1) > 1,
        "reuse of attention maps": any(config.get("encoder_reuse_attention", [])),
        "models without a feature projection": config.get("encoder_use_projection") is False,
        "WavLM without a layer norm before the feature projection": is_wavlm and not has_norm,
        "models without layers": config["encoder_num_layers"] == 0,
        "layers without an attention or a feed-forward block": not all(has_blocks),
        "layers without some of their heads": _num_heads(config) is None,
        "feed-forward units that differ per layer": len(set(config["encoder_ff_interm_features"])) > 1,
        "factors of conv channels (dummy_weight)": not bool((model.feature_extractor.dummy_weight == 1).all()),
        f"waveform normalisation with an eps of {eps}, only {NORMALIZE_EPS}": eps not in (None, NORMALIZE_EPS),
    }
    if what := next((what for what, found in lacks.items() if found), None):
        raise UserError(
            f"{source}: --native: transformers has no {what}; without the flag the folder brings its own code"
        )


def native_model(model: Wav2Vec2Model, vocab_size: int | None) -> PreTrainedModel:
    """The model in transformers' own class: HuBERT's also for wav2vec 2.0, which computes the same.

    Args:
        model: one that :func:`require_native` lets pass.
        vocab_size: outputs of ``aux``; None for the backbone alone.
    """
    config_class, base_class, ctc_class = (
        (WavLMConfig, WavLMModel, WavLMForCTC) if _is_wavlm(model.config) else (HubertConfig, HubertModel, HubertForCTC)
    )
    settings = _settings(model.config)
    state = {_native_name(name): tensor for name, tensor in model.state_dict().items()
             if name != DUMMY_WEIGHT and not name.startswith("aux.")}  # fmt: skip
    if model.mask_embedding is not None:
        state["masked_spec_embed"] = model.mask_embedding
    else:  # without masking in fine-tuning transformers has none either, and need not draw one at random
        settings |= {"mask_time_prob": 0.0, "mask_feature_prob": 0.0}
    if vocab_size is None:
        whole = base_class(config_class(**settings))
    else:  # the loss as in CompressedSpeechConfig
        whole = ctc_class(
            config_class(**settings, vocab_size=vocab_size, ctc_loss_reduction="mean", ctc_zero_infinity=True)
        )
        assert model.aux is not None
        whole.lm_head.load_state_dict(model.aux.state_dict())
    whole.base_model.load_state_dict(state)
    return whole


def _is_wavlm(config: dict[str, Any]) -> bool:
    return "encoder_remaining_heads" in config


def _num_heads(config: dict[str, Any]) -> int | None:
    """Heads of every layer; None where a layer lacks some of those that fill the width, or channels of them."""
    if config.get("encoder_head_channels") is not None:
        return None
    if _is_wavlm(config):
        totals, remaining = config["encoder_total_num_heads"], config["encoder_remaining_heads"]
        whole = all(list(heads) == list(range(total)) for heads, total in zip(remaining, totals))
        return totals[0] if whole and totals else None
    heads, width = set(config["encoder_num_heads"]), config["encoder_embed_dim"]
    return heads.pop() if {n * config["encoder_head_dim"] for n in heads} == {width} else None


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Config of transformers for a flat one; the way back from ``import_huggingface``."""
    alike = {
        "embed_dim": config["encoder_embed_dim"],
        "num_layers": config["encoder_num_layers"],
        "num_heads": _num_heads(config),
        "ff_interm_features": config["encoder_ff_interm_features"][0],
    }
    settings = {theirs: (alike | config)[ours] for ours, theirs in SETTINGS.items()}
    settings |= zip(("conv_dim", "conv_kernel", "conv_stride"), zip(*config["extractor_conv_layer_config"]))
    settings["feat_extract_norm"] = next(
        theirs for theirs, ours in EXTRACTOR_MODES.items() if ours == config["extractor_mode"]
    )
    if _is_wavlm(config):
        buckets = {"num_buckets": "encoder_num_buckets", "max_bucket_distance": "encoder_max_distance"}
        return settings | {theirs: config[ours] for theirs, ours in buckets.items()}
    return settings | {"feat_proj_layer_norm": config.get("encoder_projection_layer_norm") is not False}


def _native_name(name: str) -> str:
    """Name of a backbone's tensor in transformers."""
    name = name.replace("encoder.transformer.", "encoder.").replace(
        "encoder.feature_projection.", "feature_projection."
    )
    return torch_spelling(name)
