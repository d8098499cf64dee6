"""The ``.pth`` file: ``{"state_dict", "config", "distill_linear_projs"}`` of plain types, safe and strict.

Interchangeable with the files of the released DPHuBERT and DPWavLM. Other top-level entries are allowed and kept:
``mask_embedding`` [D] of a converted teacher.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .model import Wav2Vec2Model, wav2vec2_model

DUMMY_WEIGHT = "feature_extractor.dummy_weight"


class CheckpointError(ValueError):
    """A model file that cannot be used: the message names the file and what is wrong with it."""


@dataclass
class Checkpoint:
    """What a ``.pth`` file holds."""

    model: Wav2Vec2Model  # eval mode, float32, on the CPU
    config: dict[str, Any]  # flat, rebuilds the model
    heads: dict[str, Tensor] = field(default_factory=dict)  # state of the distillation heads, "distill_linear_projs"
    extra: dict[str, Any] = field(default_factory=dict)  # everything else in the file


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; on success flush it to disk and rename it, on failure remove it.

    Nobody ever sees a half-written file under the final name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_torch_file(path: str | Path) -> dict[str, Any]:
    """Read a dict of tensors and plain types; nothing in the file is executed.

    Raises:
        CheckpointError: missing, truncated, not a torch file, or with anything else than plain types in it.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        if zipfile.is_zipfile(path):  # torch.save never compresses: a small file must not unpack to a huge one
            with zipfile.ZipFile(path) as archive:
                if sum(member.file_size for member in archive.infolist()) > path.stat().st_size:
                    raise CheckpointError(f"{path}: unpacks to more than it holds; refused")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{path}: holds {named[1]} besides tensors and plain types; refused, nothing was run"
            ) from None
        raise CheckpointError(f"{path}: truncated or not a torch file") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, TypeError, AttributeError, IndexError,
            zipfile.BadZipFile, MemoryError, AssertionError, OverflowError) as error:  # fmt: skip
        raise CheckpointError(f"{path}: truncated or not a torch file ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dict")
    return content


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Build the model of a ``.pth`` file and load it strictly.

    Raises:
        CheckpointError: the file cannot be read, is of another kind, or its tensors do not fit its config.
    """
    content = read_torch_file(path)
    if "pytorch-lightning_version" in content:
        raise CheckpointError(f"{path}: a training checkpoint, not a model; make a model of it with prune.py")
    config, state = content.get("config"), content.get("state_dict")
    if not isinstance(config, dict) or not isinstance(state, dict):
        raise CheckpointError(f"{path}: no 'config' and 'state_dict' in it; not a model of this toolkit")
    heads = content.get("distill_linear_projs") or {}
    if not isinstance(heads, dict) or not all(isinstance(tensor, Tensor) for tensor in heads.values()):
        raise CheckpointError(f"{path}: 'distill_linear_projs' is not a dict of tensors")
    model = model_from_state(config, state, source=path)
    extra = {k: v for k, v in content.items() if k not in ("config", "state_dict", "distill_linear_projs")}
    embedding = extra.get("mask_embedding")
    if embedding is not None:
        if not isinstance(embedding, Tensor) or embedding.shape != (model.embed_dim,):
            raise CheckpointError(f"{path}: 'mask_embedding' is not a vector of the model's width {model.embed_dim}")
        model.mask_embedding = embedding.detach().float()
    return Checkpoint(model, config, heads, extra)


def model_from_state(config: Mapping[str, Any], state: Mapping[str, Tensor], source: object) -> Wav2Vec2Model:
    """Model of a flat config with the given state, in eval mode and float32; masks of the config stay masks.

    The model is built without memory first, so a file cannot make us allocate more than it holds itself.

    Raises:
        CheckpointError: naming ``source`` and the first keys or shapes that do not fit.
    """
    for name in ("encoder_use_attention", "extractor_conv_layer_config"):
        if isinstance(config.get(name), Sequence) and len(config[name]) > len(state):
            raise CheckpointError(f"{source}: {len(config[name])} layers in {name}, but only {len(state)} tensors")
    try:
        with torch.device("meta"):
            model = wav2vec2_model(**config)
    except (TypeError, ValueError, RuntimeError, OverflowError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{source}: its config builds no model: {reason}") from None
    expected = model.state_dict()
    state = {str(name): tensor for name, tensor in state.items()}
    for name in [name for name in state if ".parametrizations.weight.original" in name]:
        renamed = name.replace("parametrizations.weight.original0", "weight_g")
        state[renamed.replace("parametrizations.weight.original1", "weight_v")] = state.pop(name)
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing == [DUMMY_WEIGHT]:  # never pruned, as torchaudio and the released converters save models
        missing = []
    if missing or unexpected:
        lists = [f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
                 for what, names in (("missing", missing), ("unexpected", unexpected)) if names]  # fmt: skip
        raise CheckpointError(f"{source}: its tensors do not fit its config: {' and '.join(lists)}")
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor) or tensor.shape != expected[name].shape or not tensor.is_floating_point():
            found = f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise CheckpointError(f"{source}: {name} is {found}, its config wants float {list(expected[name].shape)}")
        if tensor.layout != torch.strided or tensor.is_meta or tensor.untyped_storage().nbytes() < tensor.nbytes:
            raise CheckpointError(f"{source}: {name} is no dense tensor with all of its {tensor.numel()} values")
        state[name] = tensor.detach().to(torch.float32)
    if DUMMY_WEIGHT not in state:
        state[DUMMY_WEIGHT] = torch.ones(expected[DUMMY_WEIGHT].shape)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def load_model(
    path: str | Path, *, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> Wav2Vec2Model:
    """Load a model for use: strict, safe, in eval mode.

    >>> model = load_model("final.pth")
    >>> hidden, lengths = model.extract_features(waveforms, lengths)

    Raises:
        CheckpointError: the file cannot be read, is of another kind, or its tensors do not fit its config.
    """
    return load_checkpoint(path).model.to(device=device, dtype=dtype)


def save_model(
    path: str | Path, model: Wav2Vec2Model, heads: Mapping[str, Tensor] | None = None, **extra: object
) -> None:
    """Write a ``.pth`` file that :func:`load_model` and the released code read. Atomic.

    Args:
        path: the file.
        model: saved with its config; tensors go to the CPU in float32.
        heads: state of the distillation heads.
        extra: further top-level entries of plain types.
    """
    content = {
        "state_dict": {k: v.detach().to("cpu", torch.float32).contiguous() for k, v in model.state_dict().items()},
        "config": model.config,
        "distill_linear_projs": {k: v.detach().cpu().contiguous() for k, v in (heads or {}).items()},
        **extra,
    }
    with replacing(path) as temporary:
        torch.save(content, temporary)


def add_masks(model: Wav2Vec2Model, **flags: bool) -> Wav2Vec2Model:
    """The same network with fresh masks, e.g. ``add_masks(teacher, encoder_prune_attention_heads=True)``.

    Args:
        model: its weights are copied.
        flags: the ``*_prune_*`` entries of the flat config.
    """
    masked = wav2vec2_model(**{**model.config, **flags})
    state = {k: v for k, v in model.state_dict().items() if not k.endswith("log_alpha")}
    missing, unexpected = masked.load_state_dict(state, strict=False)
    if unexpected or not all(name.endswith("log_alpha") for name in missing):
        raise AssertionError(f"masks changed the network: {missing} {unexpected}")
    return masked
