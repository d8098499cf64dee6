"""Import the released students FitHuBERT, ARMHuBERT, MaskHuBERT and STaRHuBERT: Lightning ``.ckpt`` and its ``.yaml``.

Their backbone has fairseq's names and goes through :func:`import_fairseq`; what only students have is read here: time
reduction, the pattern of reused attention maps, and the heads of training.
"""

import ast
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from wav2vec2.checkpoint import CheckpointError

from .fairseq import import_fairseq
from .mapping import MASK_EMBEDDING, ImportedModel, Rule, import_tensors, require_shapes, require_type

STUDENT = "student_model."
REQUIRED: dict[str, type] = {
    "conv_feature_layers": str,
    "encoder_layers": int,
    "encoder_embed_dim": int,
    "encoder_ffn_embed_dim": int,
    "encoder_attention_heads": int,
}
# Settings that a file may leave out. STaRHuBERT's have neither heads nor time reduction nor reused maps.
OPTIONAL: dict[str, Any] = {
    "extractor_mode": "default",
    "conv_bias": False,
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "pos_conv_depth": 1,
    "layer_type": "transformer",
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.0,
    "dropout_input": 0.0,
    "encoder_layerdrop": 0.0,
    "enable_tr_layer": False,
    "tr_layer_type": "conv1d",
    "tr_layer_index": 0,
    "tr_reduce_factor": 2,
    "reuse_pattern": "None",
    "layerwise_proj": False,
    "pred_head_final_dim": 768,
    "n_mels": 0,
    "crop_seq_to_multiple": 1,
    "required_seq_len_multiple": 1,
}

_TIME_REDUCTION: list[Rule] = [
    (r"encoder\.layers\.0\.(weight|bias)", r"encoder.transformer.time_reduction.\1"),
    (r"upsampler\.(weight|bias)", r"encoder.transformer.upsampler.\1"),
]
_HEADS: list[Rule] = [
    (r"proj_head\.(\d+)\.lin_proj\.(weight|bias)", r"\1.linear.\2"),
    (r"proj_head\.(\d+)\.upsampler\.(weight|bias)", r"\1.upsampler.\2"),
    (r"final_proj\.lin_proj\.(weight|bias)", r"0.linear.\1"),  # all that is left where training deleted the others
    (r"final_proj\.upsampler\.(weight|bias)", r"0.upsampler.\1"),
]


def import_student(checkpoint: Any, settings: Any, normalize_waveform: bool | None = None) -> ImportedModel:
    """Import a released student. Every tensor is used exactly once or named in ``dropped``, as the teacher's are.

    Its ``heads`` have the names of the objectives ``hint`` and ``masking``: ``{i}.upsampler.*`` and ``{i}.linear.*`` of
    the i-th layer, and ``mask_embedding`` [D]. STaRHuBERT has none.

    The model computes what the released class computes for one utterance: reused maps go through a second softmax. At
    batches above 1 the released ARMHuBERT also mixes heads and rows there, which is not reproduced.

    Args:
        checkpoint: what :func:`wav2vec2.importers.load_pickled` read from the ``.ckpt`` file.
        settings: what the ``.yaml`` file holds, in plain types.
        normalize_waveform: None for what the released students were trained with: no.

    Raises:
        CheckpointError: files of another kind, settings that change the function (mel front end, other kinds of time
            reduction, conformer layers), backbone tensors of unknown name, or heads that are missing, left over or of a
            wrong shape. Whether the backbone fits the config shows when the model is built.
    """
    if not isinstance(checkpoint, Mapping) or not isinstance(checkpoint.get("state_dict"), Mapping):
        raise CheckpointError("it has no 'state_dict': not a checkpoint of PyTorch Lightning")
    state = {str(name): tensor for name, tensor in checkpoint["state_dict"].items()}
    tensors = {name.removeprefix(STUDENT): tensor for name, tensor in state.items() if name.startswith(STUDENT)}
    if not tensors:
        raise CheckpointError(f"no tensor is named {STUDENT}*: not a released student")
    dropped = [name for name in state if not name.startswith(STUDENT)]  # the teacher, what scored it

    chosen = _settings(settings, len(tensors))
    heads = _take_heads(tensors, chosen)
    backbone = tensors
    reduction: dict[str, Tensor] = {}
    if chosen["enable_tr_layer"]:
        backbone, reduction = _split_time_reduction(tensors)
    imported = import_fairseq({"cfg": chosen, "model": backbone}, bool(normalize_waveform))
    if imported.mask_embedding is not None:
        if imported.mask_embedding.numel() != chosen["encoder_embed_dim"]:
            raise CheckpointError(f"its mask embedding is no vector of the width {chosen['encoder_embed_dim']}")
        heads[MASK_EMBEDDING] = imported.mask_embedding
    channels = imported.config["extractor_conv_layer_config"][-1][0]
    return ImportedModel(
        {**imported.config, **_student_config(chosen, channels)},
        {**imported.state_dict, **reduction},
        None,
        dropped + imported.dropped,
        heads,
    )


def _settings(content: Any, num_tensors: int) -> dict[str, Any]:
    """The settings of the student, checked and complete."""
    if not isinstance(content, Mapping) or not isinstance(content.get("distiller"), Mapping):
        raise CheckpointError("the settings have no section 'distiller': not those of a released student")
    distiller = content["distiller"]
    if missing := [key for key in REQUIRED if distiller.get(key) is None]:
        raise CheckpointError(f"the section 'distiller' has no {', '.join(missing)}")
    chosen: dict[str, Any] = {}
    for key, kind in (REQUIRED | {key: type(value) for key, value in OPTIONAL.items()}).items():
        value = distiller.get(key)
        value = OPTIONAL[key] if value is None else value
        require_type(f"distiller.{key}", value, kind)
        chosen[key] = value
    for key in ("n_mels", "tr_layer_index", "tr_layer_type", "crop_seq_to_multiple"):
        if chosen[key] != OPTIONAL[key] and (chosen["enable_tr_layer"] or not key.startswith("tr_")):
            raise CheckpointError(f"distiller.{key} is {chosen[key]!r}: only {OPTIONAL[key]!r} is supported")
    if chosen["enable_tr_layer"] and chosen["required_seq_len_multiple"] != 1:  # fills odd ends with zeros there
        raise CheckpointError(
            f"distiller.required_seq_len_multiple is {chosen['required_seq_len_multiple']}: only 1 is supported with "
            "time reduction"
        )
    if chosen["enable_tr_layer"] and chosen["tr_reduce_factor"] < 2:
        raise CheckpointError(f"distiller.tr_reduce_factor is {chosen['tr_reduce_factor']}: it must be at least 2")
    if not 1 <= chosen["encoder_layers"] <= num_tensors:
        raise CheckpointError(f"{chosen['encoder_layers']} layers in distiller, but {num_tensors} tensors")
    return chosen


def _take_heads(tensors: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Tensor]:
    """Take the heads of the layers out of ``tensors``, each of the shape that the settings say, none missing."""
    if not chosen["layerwise_proj"]:  # DistilHuBERT's kind of head, which none of the released models has
        return {}
    width, out, factor = chosen["encoder_embed_dim"], chosen["pred_head_final_dim"], chosen["tr_reduce_factor"]
    shapes: dict[str, tuple[int, ...]] = {}
    if chosen["enable_tr_layer"]:
        shapes |= {"upsampler.weight": (width, width, factor), "upsampler.bias": (width,)}
    if width != out:
        shapes |= {"lin_proj.weight": (out, width), "lin_proj.bias": (out,)}
    prefixes = [f"proj_head.{layer}." for layer in range(chosen["encoder_layers"])]
    if any(name.startswith("final_proj.") for name in tensors):
        prefixes = ["final_proj."]
    expected = {prefix + name: shape for prefix in prefixes for name, shape in shapes.items()}
    found = {name: tensors.pop(name) for name in list(tensors) if name.startswith(("proj_head.", "final_proj."))}
    require_shapes(found, expected)
    return import_tensors(found, _HEADS, {}).state_dict


def _split_time_reduction(tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Backbone with its layers counted from 0, and the convolution that stands in their list as layer 0."""
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(("encoder.layers.0.", "upsampler."))}
    backbone = {
        re.sub(r"(?<=^encoder\.layers\.)[1-9]\d{0,3}(?=\.)", lambda index: str(int(index[0]) - 1), name): tensor
        for name, tensor in tensors.items()
        if name not in own
    }
    return backbone, import_tensors(own, _TIME_REDUCTION, {}).state_dict


def _student_config(chosen: dict[str, Any], channels: int) -> dict[str, Any]:
    """The entries of the flat config that other models do not have."""
    config: dict[str, Any] = {}
    if channels == chosen["encoder_embed_dim"]:
        config["encoder_use_projection"] = False
    if chosen["enable_tr_layer"]:
        config["encoder_time_reduction"] = chosen["tr_reduce_factor"]
    pattern = chosen["reuse_pattern"]
    try:
        computes = ast.literal_eval(pattern)  # per layer, whether it computes a map of its own
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        computes = pattern
    if computes is None:
        return config
    num_layers = chosen["encoder_layers"]
    is_list = isinstance(computes, list | tuple) and all(isinstance(layer, bool) for layer in computes)
    if not is_list or len(computes) != num_layers:
        raise CheckpointError(
            f"distiller.reuse_pattern is {pattern[:40]!r}: it must list True or False for {num_layers} layers"
        )
    if not all(computes):
        config["encoder_reuse_attention"] = [not layer for layer in computes]
        config["encoder_reuse_softmax"] = True
    return config
