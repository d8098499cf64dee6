"""What every importer shares: renaming tensors by a table of rules, each used exactly once, and the flat config."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from wav2vec2.checkpoint import CheckpointError, has_all_values
from wav2vec2.transformer import own_spelling

MASK_EMBEDDING = "mask_embedding"  # target name of the vector that replaces masked frames in pre-training
# Why data2vec of either toolkit is refused.
DATA2VEC_POSITIONS = "five positional convolutions with layer norms, which models here have not"
Rule = tuple[str, str | None]  # pattern of the whole name; its replacement, or None for a training head to drop


def heads_rule(*parts: str) -> Rule:
    """The last rule of a whole model: what belongs to none of its own top-level ``parts`` is a head, to be dropped.

    A tensor of unknown name inside one of these fits no rule and is refused: it would change what the model computes.
    """
    return rf"(?!({'|'.join(parts)})(\.|$)).*", None


@dataclass
class ImportedModel:
    """A model read from a foreign checkpoint.

    Attributes:
        config: flat config of :func:`wav2vec2.model.wav2vec2_model`.
        state_dict: float32 tensors under the names of that model.
        mask_embedding: [D], which replaces masked frames in pre-training; None where the source has none.
        dropped: names in the source of heads that were left out, whatever is stored there.
        heads: state of the distillation heads, under the names of the objectives that made them.
        vocabulary: what the rows of ``aux`` stand for; None where the output layer was left out or there is none.
    """

    config: dict[str, Any]
    state_dict: dict[str, Tensor]
    mask_embedding: Tensor | None
    dropped: list[str]
    heads: dict[str, Tensor] = field(default_factory=dict)
    vocabulary: list[str] | None = None


def import_tensors(
    source: Mapping[str, Any], rules: Iterable[Rule], config: dict[str, Any], dropped: Iterable[str] = ()
) -> ImportedModel:
    """Rename every tensor of ``source`` by the first rule that fits its whole name.

    Args:
        source: tensors of any floating type; rules see weight norm in our own spelling.
        rules: in order of precedence.
        config: flat config that the tensors belong to.
        dropped: names that were left out before.

    Raises:
        CheckpointError: a name that no rule fits, names that are all of heads, two names for one tensor, or a value
            that is no floating tensor with all of its values.
    """
    compiled = [(re.compile(pattern), target) for pattern, target in rules]
    state_dict: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    heads = list(dropped)
    for name, tensor in source.items():
        match, target = next(((m, t) for p, t in compiled if (m := p.fullmatch(own_spelling(name)))), (None, None))
        if match is None:
            raise CheckpointError(f"tensor {name!r} belongs to no known part of this kind of model")
        if target is None:
            heads.append(name)
            continue
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise CheckpointError(f"{name!r} is not a floating-point tensor")
        if not tensor.is_meta and not has_all_values(tensor):  # it would grow in float32
            raise CheckpointError(f"{name!r} is no dense tensor with all of its {tensor.numel()} values")
        key = match.expand(target)
        if key in origin:
            raise CheckpointError(f"{origin[key]!r} and {name!r} are the same tensor ({key})")
        origin[key] = name
        state_dict[key] = tensor.detach().float()
    if source and not state_dict:
        first = next(iter(source))
        raise CheckpointError(f"none of its {len(source)} tensors belongs to the model; the first is {first!r}")
    mask_embedding = state_dict.pop(MASK_EMBEDDING, None)
    return ImportedModel(config, state_dict, None if mask_embedding is None else mask_embedding.flatten(), heads)


def require_architecture(key: str, name: Any, valid: Sequence[str], refused: Mapping[str, str]) -> None:
    """Refuse an architecture that no model here can have.

    Args:
        key: what the source calls it.
        name: in the source.
        valid: the names that can be read.
        refused: names that cannot, with the reason.

    Raises:
        CheckpointError: with the reason where it is known, and the valid names.
    """
    if name in valid:
        return
    reason = refused.get(str(name))
    what = f"{name!r} is not supported" if reason is None else f"{name}: {reason}"
    raise CheckpointError(f"{key} {what}; valid: {', '.join(valid)}")


def require_type(name: str, value: Any, kind: type) -> None:
    """Refuse a setting of another type; an integer may stand for a float.

    Raises:
        CheckpointError: naming the setting and its value.
    """
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise CheckpointError(f"{name} is {str(value)[:40]!r}: it must be of type {kind.__name__}")


def require_shapes(found: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse heads that do not fit the settings of their file.

    Args:
        found: what the file holds, by its name there.
        shapes: what the settings say, by the same names.

    Raises:
        CheckpointError: naming what is missing, left over, of another shape, or without all of its values.
    """
    for what, names in (("missing", shapes.keys() - found), ("left over", found.keys() - shapes)):
        if names:
            raise CheckpointError(f"its heads do not fit the settings: {what} {', '.join(sorted(names)[:3])}")
    for name, tensor in found.items():
        if not isinstance(tensor, Tensor) or tensor.shape != shapes[name]:
            raise CheckpointError(f"{name} is no tensor of shape {list(shapes[name])}")
        if not has_all_values(tensor):
            raise CheckpointError(f"{name} is no dense tensor with all of its {tensor.numel()} values")


@contextlib.contextmanager
def naming(source: object) -> Iterator[None]:
    """Begin every :class:`CheckpointError` of the block with the name of its file or model."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from error


def flat_config(
    *,
    conv_layers: Iterable[Iterable[int]],
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    ff_interm_features: int,
    buckets: tuple[int, int] | None,
    **plain: Any,
) -> dict[str, Any]:
    """Flat config of an unpruned model, whose layers are all alike.

    Args:
        conv_layers: (channels, kernel, stride) per conv layer.
        embed_dim: Transformer width D.
        num_layers: L.
        num_heads: heads of each layer.
        ff_interm_features: FFN units of each layer.
        buckets: WavLM's number of position buckets and maximum distance; None for models without position bias.
        plain: the remaining keys, as they are.

    Raises:
        CheckpointError: a width that the heads do not divide.
    """
    if num_heads < 1 or embed_dim % num_heads:
        raise CheckpointError(f"{num_heads} attention heads do not divide the width {embed_dim}")
    if buckets is None:
        heads: dict[str, Any] = {
            "encoder_num_heads": [num_heads] * num_layers,
            "encoder_head_dim": embed_dim // num_heads,
        }
    else:
        heads = {
            "encoder_total_num_heads": [num_heads] * num_layers,
            "encoder_remaining_heads": [list(range(num_heads)) for _ in range(num_layers)],
            "encoder_num_buckets": buckets[0],
            "encoder_max_distance": buckets[1],
        }
    return {
        "extractor_conv_layer_config": [tuple(layer) for layer in conv_layers],
        "encoder_embed_dim": embed_dim,
        "encoder_num_layers": num_layers,
        "encoder_use_attention": [True] * num_layers,
        "encoder_use_feed_forward": [True] * num_layers,
        **heads,
        "encoder_ff_interm_features": [ff_interm_features] * num_layers,
        **plain,
        "aux_num_out": None,
        "extractor_prune_conv_channels": False,
        "encoder_prune_attention_heads": False,
        "encoder_prune_attention_layer": False,
        "encoder_prune_feed_forward_intermediate": False,
        "encoder_prune_feed_forward_layer": False,
    }
