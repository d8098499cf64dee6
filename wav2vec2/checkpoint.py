"""The ``.pth`` file: ``{"state_dict", "config", "distill_linear_projs"}`` of plain types, safe and strict.

Interchangeable with the files of the released DPHuBERT and DPWavLM. Other top-level entries are allowed and kept:
``mask_embedding`` [D] and ``source`` of a converted teacher, ``vocabulary`` [V] of a recogniser's output layer.

The same as ``.safetensors``: tensors by their names in ``state_dict``, heads under ``distill_linear_projs.``, other
top-level tensors under ``extra.``; in the metadata, as JSON, ``config`` and the other top-level entries, ``extra``.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import re
import secrets
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .hardconcrete import BETA, LIMIT_HIGH, LIMIT_LOW
from .hub import FOLDER_FILES, locate
from .model import Wav2Vec2Model, wav2vec2_model
from .placement import check_placement
from .safetensors import read_safetensors, write_safetensors
from .transformer import own_spelling
from .vocabulary import VOCABULARY

DUMMY_WEIGHT = "feature_extractor.dummy_weight"
HEADS, EXTRA = "distill_linear_projs", "extra"
CLASSIFIER = ("projector.", "classifier.", "layer_weights")  # of AutoModelForAudioClassification
ZIP_MAGIC = b"PK\x03\x04"
# What DiariZen's files have in their config besides ours: how their masks were drawn, and remarks on the sizes.
FOREIGN_MASKS = {"use_layerwise_prune": False, "limit_l": LIMIT_LOW, "limit_r": LIMIT_HIGH, "temperature": BETA}
FOREIGN_REMARKS = {f"wavlm_{when}_{what}" for when in ("original", "current") for what in ("params", "macs")}


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

    Raises:
        OSError: naming ``path``; the disk is full, the folder cannot be written, ...
    """
    path = Path(path)
    # No longer than the name where that is as long as names may be, and no other process's: some share folders and ids.
    temporary = path.with_name(f".{path.name[:32]}.{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        if error.filename in (None, str(temporary)):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
    finally:
        with contextlib.suppress(OSError):  # the reason is on its way
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a whole text file in UTF-8. Atomic; raises as :func:`replacing` does."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_torch_file(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write what :func:`read_torch_file` reads. Atomic.

    Raises:
        OSError: naming ``path``; the disk is full, the folder cannot be written, ...
    """
    with replacing(path) as temporary, temporary.open("wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch puts a message about its own file positions in place of the reason
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def check_torch_file(path: Path) -> bool:
    """Refuse a file of ``torch.save`` that would grow in memory or is damaged, before its pickle is looked at.

    Returns:
        Whether it is a zip archive, as they all are since PyTorch 1.6.

    Raises:
        CheckpointError: missing, compressed, larger than the file once unpacked, or checksums that do not fit.
        zipfile.BadZipFile: an archive that is cut off, or damaged where it says what it holds.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    with path.open("rb") as file:
        if file.read(len(ZIP_MAGIC)) != ZIP_MAGIC:  # as torch tells them apart
            return False
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
        if any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise CheckpointError(f"{path}: compressed, which torch.save never does; refused")
        if sum(member.file_size for member in members) > path.stat().st_size:
            raise CheckpointError(f"{path}: unpacks to more than it holds; refused")
        if archive.testzip() is not None:  # torch does not look at the checksums
            raise CheckpointError(f"{path}: damaged, its checksums do not fit; copy or download it again")
    return True


def read_torch_file(path: str | Path) -> dict[str, Any]:
    """Read a dict of tensors and plain types; nothing in the file is executed.

    Raises:
        CheckpointError: missing, truncated, not a torch file, or with anything else than plain types in it.
    """
    path = Path(path)
    try:
        check_torch_file(path)
        # not mapped into memory: a model may outlive its file
        content = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        if named := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise CheckpointError(
                f"{path}: holds {named[1]} besides tensors and plain types; refused, nothing was run"
            ) from None
        raise CheckpointError(f"{path}: truncated or not a torch file") from None
    except Exception as error:  # a damaged file can fail anywhere in the parsers
        raise CheckpointError(f"{path}: truncated or not a torch file ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a dict")
    _check_tensors(content, path)
    return content


def has_all_values(tensor: Tensor) -> bool:
    """Whether a tensor from a file is dense and holds all of its values: it does not grow when it is copied."""
    dense = tensor.layout == torch.strided and not tensor.is_meta
    return dense and tensor.untyped_storage().nbytes() >= tensor.nbytes


def _check_tensors(content: Any, path: Path) -> None:
    """Refuse a file with a tensor that lacks values."""
    waiting, seen = [content], {id(content)}
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor) and not has_all_values(value):
            raise CheckpointError(f"{path}: holds a tensor without all of its values; refused")
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        for item in inner if isinstance(inner, list | tuple | set) else ():
            if id(item) not in seen:  # a pickle may hold circles
                seen.add(id(item))
                waiting.append(item)


def read_safetensors_file(path: str | Path) -> dict[str, Any]:
    """Read what :func:`save_model` wrote as ``.safetensors``, as the dict of a ``.pth`` file.

    Raises:
        CheckpointError: missing, truncated, not a safetensors file, or without this toolkit's metadata.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: {'not a file' if path.exists() else 'no such file'}")
    try:
        tensors, metadata = read_safetensors(path)
    except (OSError, ValueError, MemoryError) as error:
        raise CheckpointError(f"{path}: {error}") from None
    try:
        config, extra = json.loads(metadata["config"]), json.loads(metadata.get(EXTRA, "{}"))
    except (KeyError, ValueError, RecursionError):
        raise CheckpointError(f"{path}: no config in its metadata; not a model of this toolkit") from None
    if not isinstance(extra, dict):
        raise CheckpointError(f"{path}: {EXTRA!r} in its metadata is no table")
    groups: dict[str, dict[str, Tensor]] = {"state_dict": {}, HEADS: {}, EXTRA: {}}
    for name, tensor in tensors.items():
        group, _, rest = name.partition(".")
        if group in (HEADS, EXTRA):
            groups[group][rest] = tensor
        else:
            groups["state_dict"][name] = tensor
    return {"config": config, "state_dict": groups["state_dict"], HEADS: groups[HEADS], **extra, **groups[EXTRA]}


def read_transformers_folder(path: Path) -> dict[str, Any]:
    """Read a folder of config.json and model.safetensors (transformers' layout), as the dict of a ``.pth`` file.

    A classifier that was trained on top is left out: it has no place in a model of this package.

    Raises:
        CheckpointError: a file is missing or broken, or the folder holds another kind of model.
    """
    config_path, tensors_path = (path / name for name in FOLDER_FILES)
    for file in (config_path, tensors_path):
        if not file.is_file():
            raise CheckpointError(f"{path}: no {file.name} in this folder")
    try:
        flat = json.loads(config_path.read_text(encoding="utf-8"))["model_config"]
        tensors, _ = read_safetensors(tensors_path)
    except (KeyError, TypeError, RecursionError, json.JSONDecodeError, UnicodeDecodeError):
        raise CheckpointError(
            f"{config_path}: no 'model_config' in it; not a model of this toolkit. A model of transformers itself: "
            f"convert_hubert_from_hf.py --model {path}"
        ) from None
    except (OSError, ValueError, MemoryError) as error:
        raise CheckpointError(f"{tensors_path}: {error}") from None
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(CLASSIFIER)}
    state = {re.sub(r"^(.*\.)?backbone\.", "", name).replace("lm_head.", "aux."): t for name, t in tensors.items()}
    if "aux.weight" in state and isinstance(flat, dict):
        flat["aux_num_out"] = len(state["aux.weight"])
        symbols = _folder_vocabulary(path / "vocab.json", flat["aux_num_out"])
        return {"config": flat, "state_dict": state, **({} if symbols is None else {VOCABULARY: symbols})}
    return {"config": flat, "state_dict": state}


def _folder_vocabulary(path: Path, rows: int) -> list[str] | None:
    """What the rows of an output layer stand for; those that write nothing are not in the file."""
    if not path.is_file():
        return None
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
        symbols = {int(row): str(symbol) for symbol, row in ids.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path}: no vocabulary of an output layer") from None
    return [symbols.get(row, f"<unused{row}>") for row in range(rows)]


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Build the model of a ``.pth`` or ``.safetensors`` file, or of a transformers folder, and load it strictly.

    Raises:
        CheckpointError: the file cannot be read, is of another kind, or its tensors do not fit its config.
    """
    if Path(path).is_dir():
        content = read_transformers_folder(Path(path))
    elif Path(path).suffix == ".safetensors":
        content = read_safetensors_file(path)
    else:
        content = read_torch_file(path)
    if "pytorch-lightning_version" in content:
        raise CheckpointError(f"{path}: a training checkpoint, not a model; make a model of it with prune.py")
    config, state = content.get("config"), content.get("state_dict")
    if not isinstance(config, dict) or not isinstance(state, dict):
        raise CheckpointError(f"{path}: no 'config' and 'state_dict' in it; not a model of this toolkit")
    heads = content.get("distill_linear_projs") or {}
    if not isinstance(heads, dict) or not all(isinstance(tensor, Tensor) for tensor in heads.values()):
        raise CheckpointError(f"{path}: 'distill_linear_projs' is not a dict of tensors")
    config = own_config(config, source=path)
    model = model_from_state(config, state, source=path)
    extra = {k: v for k, v in content.items() if k not in ("config", "state_dict", "distill_linear_projs")}
    embedding = extra.get("mask_embedding")
    if embedding is not None:
        if not isinstance(embedding, Tensor) or embedding.shape != (model.embed_dim,):
            raise CheckpointError(f"{path}: 'mask_embedding' is not a vector of the model's width {model.embed_dim}")
        model.mask_embedding = embedding.detach().float()
    model.vocabulary = _checked_vocabulary(extra.get(VOCABULARY), model, path)
    return Checkpoint(model, config, heads, extra)


def _checked_vocabulary(symbols: Any, model: Wav2Vec2Model, source: object) -> list[str] | None:
    if symbols is None:
        return None
    rows = 0 if model.aux is None else model.aux.out_features
    known = isinstance(symbols, list) and all(isinstance(symbol, str) and symbol for symbol in symbols)
    if not known or len(set(symbols)) != len(symbols) or len(symbols) != rows:
        raise CheckpointError(f"{source}: {VOCABULARY!r} does not name the {rows} rows of its output layer, each once")
    return symbols


def own_config(config: Mapping[str, Any], source: object) -> dict[str, Any]:
    """The flat config without what DiariZen's files add to it, which changes nothing in a model without masks.

    Raises:
        CheckpointError: naming ``source``; the config has masks that are drawn in another way than here.
    """
    if any(value is not False for key, value in config.items() if "_prune_" in str(key)):
        for key, value in FOREIGN_MASKS.items():
            given = config.get(key, value)
            if isinstance(given, Tensor) or given != value:
                raise CheckpointError(
                    f"{source}: {key} is {str(given)[:40]} in its config, but {value} for masks here: "
                    "prune it with the code that trained it, and load what that writes"
                )
    return {key: value for key, value in config.items() if key not in FOREIGN_MASKS and key not in FOREIGN_REMARKS}


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
    state = {own_spelling(str(name)): tensor for name, tensor in state.items()}
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
        if not has_all_values(tensor):
            raise CheckpointError(f"{source}: {name} is no dense tensor with all of its {tensor.numel()} values")
        if name.endswith("log_alpha") and not tensor.isfinite().all():
            raise CheckpointError(f"{source}: {name} is not finite: nobody can tell what it keeps")
        state[name] = tensor.detach().to(torch.float32)
    if DUMMY_WEIGHT not in state:
        state[DUMMY_WEIGHT] = torch.ones(expected[DUMMY_WEIGHT].shape)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval()


def load_model(
    path: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> Wav2Vec2Model:
    """Load a model for use: strict, safe, in eval mode.

    >>> model = load_model("final.pth")
    >>> features = model.embed([waveform, another])
    >>> hidden, lengths = model.extract_features(waveforms, lengths)

    Args:
        path: a ``.pth`` or ``.safetensors`` file, a folder in the layout of transformers, or on the Hugging Face hub
            "owner/name" (such a folder) or "owner/name/file.pth"; the hub needs ``huggingface_hub``.
        device: where to.
        dtype: of the weights: torch.float32, bfloat16, float16 or float64.
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: the file cannot be read, is of another kind, or its tensors do not fit its config.
        ValueError: no such device, or no type that models run in.
    """
    place = check_placement(device, dtype)
    try:
        path = locate(path, revision)
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    return load_checkpoint(path).model.to(device=place, dtype=dtype)


def save_model(
    path: str | Path, model: Wav2Vec2Model, heads: Mapping[str, Tensor] | None = None, **extra: object
) -> None:
    """Write a ``.pth`` file that :func:`load_model` and the released code read, or ``.safetensors``. Atomic.

    Args:
        path: the file; its suffix decides.
        model: saved with its config, and its vocabulary if it has one; tensors go to the CPU in float32.
        heads: state of the distillation heads.
        extra: further top-level entries of plain types.

    Raises:
        ValueError: what would be written could not be read: a wrapped model, or entries of other types or names.
        OSError: naming ``path``; the disk is full, the folder cannot be written, ...
    """
    if not isinstance(model, Wav2Vec2Model):
        raise ValueError(f"model must be a Wav2Vec2Model, got {type(model).__name__}: save what it wraps")
    if model.vocabulary is not None:
        extra.setdefault(VOCABULARY, model.vocabulary)
    _check_extra(extra)
    content: dict[str, Any] = {
        "state_dict": {k: v.detach().to("cpu", torch.float32).contiguous() for k, v in model.state_dict().items()},
        "config": model.config,
        "distill_linear_projs": {k: v.detach().cpu().contiguous() for k, v in (heads or {}).items()},
        **extra,
    }
    if Path(path).suffix == ".safetensors":
        _write_safetensors_file(path, content)
    else:
        write_torch_file(path, content)


def _check_extra(extra: Mapping[str, object]) -> None:
    """Look whether :func:`load_checkpoint` would read further entries of a file.

    Raises:
        ValueError: naming one that it would not.
    """
    for name, value in extra.items():
        if name in ("state_dict", "config", HEADS, "pytorch-lightning_version"):
            raise ValueError(f"{name}: an entry of this name has a meaning of its own in model files")
        file = io.BytesIO()
        try:
            torch.save(value, file)
            torch.load(io.BytesIO(file.getvalue()), weights_only=True)
        except (pickle.PickleError, TypeError, AttributeError):
            raise ValueError(f"{name}: a {type(value).__name__} must hold tensors and plain types alone") from None


def _write_safetensors_file(path: str | Path, content: dict[str, Any]) -> None:
    extra = {k: v for k, v in content.items() if k not in ("state_dict", "config", HEADS)}
    tensors = {
        **content["state_dict"],
        **{f"{HEADS}.{name}": tensor for name, tensor in content[HEADS].items()},
        **{f"{EXTRA}.{name}": value for name, value in extra.items() if isinstance(value, Tensor)},
    }
    plain = {name: value for name, value in extra.items() if not isinstance(value, Tensor)}
    metadata = {"format": "pt", "config": json.dumps(content["config"]), EXTRA: json.dumps(plain)}
    with replacing(path) as temporary:
        write_safetensors(temporary, tensors, metadata)


def fingerprint(model: Wav2Vec2Model, heads: Mapping[str, Tensor] | None = None) -> str:
    """SHA-256 of a model's config and weights, whatever the file that it came from.

    Args:
        model: masks and all.
        heads: state of the distillation heads that go with it.
    """
    digest = hashlib.sha256(json.dumps(model.config, sort_keys=True).encode())
    for name, tensor in [*sorted(model.state_dict().items()), *sorted((heads or {}).items())]:
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


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
    masked.vocabulary = model.vocabulary
    return masked


def with_output_layer(model: Wav2Vec2Model, vocabulary: list[str]) -> Wav2Vec2Model:
    """The same network with a new output layer over a vocabulary, drawn from torch's default generator."""
    result = wav2vec2_model(**{**model.config, "aux_num_out": len(vocabulary)})
    state = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith("aux.")}
    missing, unexpected = result.load_state_dict(state, strict=False)
    assert set(missing) == {"aux.weight", "aux.bias"} and not unexpected
    result.vocabulary = vocabulary
    return result.train(model.training)
