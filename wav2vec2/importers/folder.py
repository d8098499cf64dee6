"""Read a model folder in the layout of transformers, local or from the hub: everything but its defaults, without it."""

import json
import logging
import re
from pathlib import Path
from typing import Any

from torch import Tensor

from wav2vec2.checkpoint import CheckpointError, read_torch_file
from wav2vec2.feature_extractor import SAMPLE_RATE
from wav2vec2.hub import download
from wav2vec2.safetensors import read_safetensors

from .huggingface import check_model_type
from .mapping import naming

logger = logging.getLogger(__name__)

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def locate_folder(model: str) -> Path:
    """Local folder of a transformers model; a hub id is fetched to the hub's cache first.

    Raises:
        CheckpointError: no such folder, or the hub does not give it.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            f"{model} is a file; give the folder of {CONFIG} (a file of fairseq: convert_from_checkpoint.py)"
        )
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith("."):
        raise CheckpointError(f"{model}: no such folder")
    from huggingface_hub import logging as hub_logging

    hub_logging.set_verbosity_error()  # it reports every retry

    def fetch(name: str) -> Path | None:
        try:
            return download(model, name)
        except FileNotFoundError:
            return None

    try:
        config = download(model, CONFIG)
        fetch(PREPROCESSOR)
        weights = next((file for file in map(fetch, WEIGHTS) if file is not None), None)
        if weights is not None and weights.suffix == ".json":
            for shard in _shards(weights):
                download(model, shard)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model} is no local folder and could not be fetched from the hub: {error}") from error
    return config.parent


def check_folder(folder: Path, normalize: bool | None) -> bool:
    """Whether to normalise the waveform; refuses another kind of model before anything large is read.

    Args:
        folder: of the model.
        normalize: what the user wants; None for what models of this extractor were trained with. A notice says where
            the preprocessor file has it otherwise.

    Raises:
        CheckpointError: another architecture or sample rate, or a broken file.
    """
    config = _read_json(folder / CONFIG)
    with naming(folder / CONFIG):
        check_model_type(config)
    decided = config.get("feat_extract_norm") == "layer" if normalize is None else normalize
    if not (path := folder / PREPROCESSOR).is_file():
        return decided
    preprocessor = _read_json(path)
    rate, stated = preprocessor.get("sampling_rate", SAMPLE_RATE), preprocessor.get("do_normalize", True)
    if rate != SAMPLE_RATE:
        raise CheckpointError(f"{path}: sampling_rate is {rate}; only models of {SAMPLE_RATE} Hz are supported")
    if stated != decided:
        reason = " as models of this extractor were trained (--normalize overrides)" if normalize is None else ""
        logger.warning(
            "%s says do_normalize=%s, the converted model has normalize_waveform=%s%s",
            path, str(stated).lower(), str(decided).lower(), reason,
        )  # fmt: skip
    return decided


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model folder, from one file or many.

    Raises:
        CheckpointError: a file is missing, damaged or names what is in another.
    """
    files = _weight_files(folder)
    if not files:
        raise CheckpointError(f"{folder}: no weights; expected one of {', '.join(WEIGHTS)}")
    weights: dict[str, Tensor] = {}
    for file in files:
        tensors = _read_tensors(file) if file.suffix == ".safetensors" else read_torch_file(file)
        if twice := weights.keys() & tensors.keys():
            raise CheckpointError(f"{file}: tensor {min(twice)!r} is in another shard too")
        weights |= tensors
    return weights


def model_files(folder: Path) -> list[Path]:
    """The files that make the model of a folder, config and weights; none where they are not all there.

    Raises:
        CheckpointError: the index of a sharded model is damaged.
    """
    weights = _weight_files(folder)
    files = [folder / CONFIG, *weights]
    return files if weights and all(file.is_file() for file in files) else []


def _weight_files(folder: Path) -> list[Path]:
    """The one file, or those that the index names; none where there is neither."""
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        return []
    return [folder / name for name in _shards(path)] if path.suffix == ".json" else [path]


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        return read_safetensors(path, integers=True)[0]  # a head may count something
    except (OSError, ValueError, MemoryError) as error:
        raise CheckpointError(f"{path}: {error}; if it is damaged, download it again") from error


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return content


def _shards(index: Path) -> list[str]:
    """Names of the files that the index of a sharded model lists."""
    files = _read_json(index).get("weight_map")
    names = list(files.values()) if isinstance(files, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise CheckpointError(f"{index}: its weight_map does not name files of this folder")
    return sorted(set(names))
