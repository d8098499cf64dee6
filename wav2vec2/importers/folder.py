"""Read a model folder in the layout of transformers, local or from the hub: everything but its defaults, without it."""

import contextlib
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
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

CONFIG, PREPROCESSOR, PROCESSOR = "config.json", "preprocessor_config.json", "processor_config.json"
EXTRACTOR = "feature_extractor"  # section of PROCESSOR, and of some PREPROCESSOR
VOCAB = "vocab.json"
TOKENIZER_FILES = (VOCAB, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Settings:
    """What a model folder says besides its weights.

    Attributes:
        config: content of config.json, of an architecture that can be read.
        extractor: settings of the feature extractor, of audio at 16 kHz; None where no file has them.
        extractor_file: the file that has them.
    """

    config: dict[str, Any]
    extractor: dict[str, Any] | None
    extractor_file: Path

    def normalizes(self, wanted: bool | None) -> bool:
        """Whether to normalise the waveform; a notice says where the folder has it otherwise.

        Args:
            wanted: by the user; None for what models of this extractor were trained with.
        """
        decided = self.config.get("feat_extract_norm") == "layer" if wanted is None else wanted
        if self.extractor is not None and (stated := self.extractor.get("do_normalize", True)) != decided:
            reason = " as models of this extractor were trained (--normalize overrides)" if wanted is None else ""
            logger.warning(
                "%s says do_normalize=%s, the converted model has normalize_waveform=%s%s",
                self.extractor_file, str(stated).lower(), str(decided).lower(), reason,
            )  # fmt: skip
        return decided


def locate_folder(model: str, weights: bool = True, tokenizer: bool = False) -> Path:
    """Local folder of a transformers model; a hub id is fetched to the hub's cache first.

    Args:
        model: folder or hub id.
        weights: of a hub id, fetch them too.
        tokenizer: of a hub id, fetch its files too.

    Raises:
        CheckpointError: no such folder, the hub does not give it, or what it gives is refused by
            :func:`check_folder`, which is known before the weights are fetched.
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

    with _fetching(model):
        folder = download(model, CONFIG).parent
        for name in (PREPROCESSOR, PROCESSOR, *(TOKENIZER_FILES if tokenizer else ())):
            fetch(name)
    if weights:
        check_folder(folder)
        with _fetching(model):
            file = next((file for file in map(fetch, WEIGHTS) if file is not None), None)
            for shard in _shards(file) if file is not None and file.suffix == ".json" else ():
                download(model, shard)
    return folder


@contextlib.contextmanager
def _fetching(model: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{model} is no local folder and could not be fetched from the hub: {error}") from error


def check_folder(folder: Path) -> Settings:
    """The settings of a model; refuses another kind of model before anything large is read.

    Raises:
        CheckpointError: another architecture or sample rate, or a broken file.
    """
    config = read_json(folder / CONFIG)
    with naming(folder / CONFIG):
        check_model_type(config)
    settings = Settings(config, *_read_extractor(folder))
    if settings.extractor is not None and (rate := settings.extractor.get("sampling_rate", SAMPLE_RATE)) != SAMPLE_RATE:
        raise CheckpointError(
            f"{settings.extractor_file}: sampling_rate is {rate}; only models of {SAMPLE_RATE} Hz are supported"
        )
    return settings


def _read_extractor(folder: Path) -> tuple[dict[str, Any] | None, Path]:
    """Settings of the feature extractor, and their file, from any of the three layouts of transformers.

    As there, what PROCESSOR has comes before PREPROCESSOR, and within PREPROCESSOR its own keys before nested ones.
    """
    if (path := folder / PROCESSOR).is_file() and (nested := _section(read_json(path), path)) is not None:
        return nested, path
    if (path := folder / PREPROCESSOR).is_file():
        content = read_json(path)
        return {**(_section(content, path) or {}), **content}, path
    return None, path


def _section(content: dict[str, Any], path: Path) -> dict[str, Any] | None:
    """The nested settings; None where there are none: of old, PROCESSOR names a class alone."""
    section = content.get(EXTRACTOR)
    if section is not None and not isinstance(section, dict):
        raise CheckpointError(f"{path}: its {EXTRACTOR} is no JSON object")
    return section


def find_weights(folder: Path) -> list[Path]:
    """The files of a model folder's weights, one or many.

    Raises:
        CheckpointError: one is missing, or there is none.
    """
    files = _weight_files(folder)
    if not files:
        raise CheckpointError(f"{folder}: no weights; expected one of {', '.join(WEIGHTS)}")
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"{file}: no such file")
    return files


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model folder, from one file or many.

    Raises:
        CheckpointError: a file is missing, damaged or names what is in another.
    """
    weights: dict[str, Tensor] = {}
    for file in find_weights(folder):
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
    try:
        return read_safetensors(path, integers=True)[0]  # a head may count something
    except (OSError, ValueError, MemoryError) as error:
        raise CheckpointError(f"{path}: {error}; if it is damaged, download it again") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: no such file, or it holds something else.
    """
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
    files = read_json(index).get("weight_map")
    names = list(files.values()) if isinstance(files, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise CheckpointError(f"{index}: its weight_map does not name files of this folder")
    return sorted(set(names))
