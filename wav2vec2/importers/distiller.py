"""Import DistilHuBERT of s3prl: a ``.ckpt`` whose ``Config`` has the settings and whose ``Distiller`` has the tensors.

The backbone has fairseq's names and goes through :func:`import_fairseq`. Shapes: D width, n predicted layers, I width
within the heads (D but for a setting), E width of the teacher.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from wav2vec2.checkpoint import CheckpointError

from .fairseq import import_fairseq
from .mapping import ImportedModel, import_tensors, require_shapes, require_type

DISTILLER = "Distiller"  # entry of the file
DEFAULTS: dict[str, Any] = {
    "extractor_mode": "default",
    "extractor_conv_feature_layers": "[(512,10,5)] + [(512,3,2)] * 4 + [(512,2,2)] * 2",
    "conv_pos": 128,
    "conv_pos_groups": 16,
    "encoder_layers": 1,
    "encoder_embed_dim": 768,
    "encoder_ffn_embed_dim": 3072,
    "encoder_attention_heads": 12,
    "activation_fn": "gelu",
    "layer_norm_first": False,
    "attention_type": "original",
    "dropout": 0.1,
    "attention_dropout": 0.1,
    "activation_dropout": 0.1,
    "encoder_layerdrop": 0.0,
    "final_dim": 768,
    "out_layer_type": "expand-last",
    "out_layer_inter_dim": -1,
    "n_tasks": 12,
    "task_emb_type": "expand-last",
}
# Other values make another function of the backbone, or of the heads.
ONLY: dict[str, tuple[Any, ...]] = {
    "extractor_mode": ("default",),
    "activation_fn": ("gelu",),
    "layer_norm_first": (False,),
    "attention_type": ("original",),
    "task_emb_type": ("expand-last", "none"),
    "out_layer_type": ("expand-last", "none"),
}
_HEADS = "output_layer."


def import_distiller(checkpoint: Any, normalize_waveform: bool | None = None) -> ImportedModel:
    """Import a DistilHuBERT. Every tensor is used or named in ``dropped``.

    Its ``heads`` have the names of the objective ``prediction_layer`` with ``heads: two_linear``: of the i-th predicted
    layer ``{i}.0.weight`` [I, D], ``{i}.0.bias``, ``{i}.2.weight`` [E, I], ``{i}.2.bias``. In the file the first maps
    of all layers are one wide map, and the second ones are stored transposed.

    Args:
        checkpoint: what :func:`wav2vec2.importers.load_pickled` read from the ``.ckpt`` file.
        normalize_waveform: None for what it was trained with: no.

    Raises:
        CheckpointError: a file of another kind, settings that change the function, tensors of unknown name inside the
            backbone, or heads that do not fit the settings. Whether the backbone fits the config shows when the model
            is built.
    """
    config, state = (checkpoint.get(k) if isinstance(checkpoint, Mapping) else None for k in ("Config", DISTILLER))
    if not isinstance(config, Mapping) or not isinstance(state, Mapping):
        raise CheckpointError(f"it has no 'Config' and {DISTILLER!r}: not a DistilHuBERT of s3prl")
    tensors = {str(name): tensor for name, tensor in state.items()}
    chosen = _settings(config.get("distiller"), len(tensors))
    heads = _take_heads(tensors, chosen)
    conv_layers = chosen["extractor_conv_feature_layers"]
    settings = {**chosen, "conv_feature_layers": conv_layers, "conv_bias": False, "dropout_input": 0.0}
    imported = import_fairseq({"cfg": settings, "model": tensors}, bool(normalize_waveform))
    imported.config["encoder_projection_layer_norm"] = False
    if imported.config["extractor_conv_layer_config"][-1][0] == chosen["encoder_embed_dim"]:
        imported.config["encoder_use_projection"] = False
    imported.heads = heads
    return imported


def _settings(section: Any, num_tensors: int) -> dict[str, Any]:
    """The settings of the model, checked and complete."""
    if not isinstance(section, Mapping):
        raise CheckpointError("its Config has no section 'distiller'")
    chosen: dict[str, Any] = {}
    for key, default in DEFAULTS.items():
        value = section.get(key, default)
        require_type(f"distiller.{key}", value, type(default))
        if key in ONLY and value not in ONLY[key]:
            valid = " or ".join(map(repr, ONLY[key]))
            raise CheckpointError(f"distiller.{key} is {str(value)[:40]!r}: only {valid} is supported")
        chosen[key] = value
    if chosen["out_layer_type"] != "none" and chosen["task_emb_type"] == "none":
        raise CheckpointError("distiller.task_emb_type is 'none': with an out_layer_type it must be 'expand-last'")
    for key in ("encoder_layers", "n_tasks"):
        if not 1 <= chosen[key] <= num_tensors:
            raise CheckpointError(f"distiller.{key} is {chosen[key]}, of a model with {num_tensors} tensors")
    return chosen


def _take_heads(tensors: dict[str, Any], chosen: dict[str, Any]) -> dict[str, Tensor]:
    """Take the heads out of ``tensors``, each of the shape that the settings say, none missing."""
    if chosen["out_layer_type"] == "none":
        return {}
    width, count, out = chosen["encoder_embed_dim"], chosen["n_tasks"], chosen["final_dim"]
    inner = chosen["out_layer_inter_dim"] if chosen["out_layer_inter_dim"] > 0 else width
    shapes: dict[str, tuple[int, ...]] = {"0.weight": (count * inner, width), "0.bias": (count * inner,)}
    if count == 1:
        shapes |= {"2.layer.weight": (out, inner), "2.layer.bias": (out,)}
    else:
        shapes |= {"2.weight": (count, inner, out), "2.bias": (1, 1, count, out)}
    found = {name: tensors.pop(name) for name in list(tensors) if name.startswith(_HEADS)}
    require_shapes(found, {_HEADS + name: shape for name, shape in shapes.items()})
    wide = import_tensors(found, [(_HEADS + r"(0|2)(?:\.layer)?\.(weight|bias)", r"\1.\2")], {}).state_dict
    first_weights, first_biases = wide["0.weight"].chunk(count), wide["0.bias"].chunk(count)
    weights = [wide["2.weight"]] if count == 1 else [weight.T.contiguous() for weight in wide["2.weight"]]
    biases = wide["2.bias"].reshape(count, out)
    heads: dict[str, Tensor] = {}
    for i in range(count):
        heads |= {f"{i}.0.weight": first_weights[i], f"{i}.0.bias": first_biases[i]}
        heads |= {f"{i}.2.weight": weights[i], f"{i}.2.bias": biases[i]}
    return heads
