"""Folders of transformers: what is fetched from the hub, and what is read."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import Wav2Vec2FeatureExtractor

from wav2vec2 import CheckpointError
from wav2vec2.importers.folder import check_folder, locate_folder, read_weights


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """A folder in place of a repository on the hub, and the files that were fetched of it."""
    fetched: list[str] = []

    def download(repository: str, name: str, revision: str | None = None) -> str:
        if not (tmp_path / name).is_file():
            raise LocalEntryNotFoundError(f"404: {name}")
        fetched.append(name)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return tmp_path, fetched


def test_every_shard_is_fetched(hub: tuple[Path, list[str]]) -> None:
    folder, fetched = hub
    with pytest.raises(CheckpointError, match=r"^owner/name is no local folder and .* from the hub: 404: config.json$"):
        locate_folder("owner/name")
    shards = {"b": "model-2.safetensors", "a": "model-1.safetensors", "c": "model-1.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    (folder / "config.json").write_text('{"model_type": "hubert"}')
    with pytest.raises(CheckpointError, match=r"could not be fetched from the hub: 404: model-1.safetensors$"):
        locate_folder("owner/name")
    (folder / "model-1.safetensors").touch()
    (folder / "model-2.safetensors").touch()
    fetched.clear()
    assert locate_folder("owner/name") == folder
    assert fetched == ["config.json", "model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"]


def test_settings_come_before_weights(hub: tuple[Path, list[str]]) -> None:
    """What will be refused does not cost a download, and who asks for the settings alone gets them alone."""
    folder, fetched = hub
    settings = {"config.json": {"model_type": "hubert"}, "preprocessor_config.json": {}, "processor_config.json": {}}
    for name, content in settings.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "model.safetensors").touch()
    assert locate_folder("owner/name", weights=False) == folder and fetched == [*settings]
    fetched.clear()
    locate_folder("owner/name")
    assert fetched == [*settings, "model.safetensors"]
    fetched.clear()
    (folder / "processor_config.json").write_text('{"feature_extractor": {"sampling_rate": 8000}}')
    with pytest.raises(CheckpointError, match=r"processor_config.json: sampling_rate is 8000"):
        locate_folder("owner/name")
    (folder / "config.json").write_text('{"model_type": "whisper"}')
    with pytest.raises(CheckpointError, match=r"config.json: model_type whisper: spectrograms as input, and a decoder"):
        locate_folder("owner/name")
    assert fetched == [*settings] * 2


PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
TELEPHONE, WIDE = {"sampling_rate": 8000, "do_normalize": True}, {"sampling_rate": 16000, "do_normalize": False}


def write_layouts(folder: Path, layouts: dict[str, object]) -> None:
    (folder / "config.json").write_text('{"model_type": "hubert", "feat_extract_norm": "layer"}')
    for name, content in layouts.items():
        (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("layouts", "place"),
    [
        ({PREPROCESSOR: TELEPHONE}, PREPROCESSOR),
        ({PREPROCESSOR: {"feature_extractor": TELEPHONE}}, PREPROCESSOR),
        ({PREPROCESSOR: {"feature_extractor": WIDE} | TELEPHONE}, PREPROCESSOR),
        ({PROCESSOR: {"feature_extractor": TELEPHONE}}, PROCESSOR),
        ({PROCESSOR: {"feature_extractor": TELEPHONE}, PREPROCESSOR: WIDE}, PROCESSOR),
        ({PROCESSOR: {"feature_extractor": {}}, PREPROCESSOR: TELEPHONE}, None),
        ({PROCESSOR: {"feature_extractor": WIDE}, PREPROCESSOR: TELEPHONE}, None),
        ({PROCESSOR: {"processor_class": "Wav2Vec2Processor"}, PREPROCESSOR: TELEPHONE}, PREPROCESSOR),
        ({PROCESSOR: {"feature_extractor": None}, PREPROCESSOR: TELEPHONE}, PREPROCESSOR),
        ({PROCESSOR: TELEPHONE}, None),
    ],
)
def test_three_layouts_of_the_feature_extractor(tmp_path: Path, layouts: dict[str, object], place: str | None) -> None:
    """The place that counts has 8 kHz; where transformers reads a layout, it agrees."""
    write_layouts(tmp_path, layouts)
    if place is None:
        check_folder(tmp_path)
    else:
        with pytest.raises(CheckpointError) as error:
            check_folder(tmp_path)
        message = f"{tmp_path / place}: sampling_rate is 8000; only models of 16000 Hz are supported"
        assert str(error.value) == message
    if layouts not in ({PREPROCESSOR: {"feature_extractor": TELEPHONE}}, {PROCESSOR: TELEPHONE}):
        theirs = Wav2Vec2FeatureExtractor.from_pretrained(tmp_path).sampling_rate
        assert theirs == (16_000 if place is None else 8_000)


@pytest.mark.parametrize("layouts", [{PREPROCESSOR: WIDE}, {PROCESSOR: {"feature_extractor": WIDE}}])
def test_another_normalisation_is_noticed(
    tmp_path: Path, layouts: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    write_layouts(tmp_path, layouts)
    settings = check_folder(tmp_path)
    assert settings.normalizes(None) and not settings.normalizes(False)
    (line,) = caplog.messages
    (name,) = layouts
    assert line.startswith(
        f"{tmp_path / name} says do_normalize=false, the converted model has normalize_waveform=true"
    )


@pytest.mark.parametrize("name", [PREPROCESSOR, PROCESSOR])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[1]", "holds no JSON object"),
        ("{", "not valid JSON"),
        ('{"feature_extractor": 1}', "its feature_extractor is"),
    ],
)
def test_malformed_settings(tmp_path: Path, name: str, content: str, reason: str) -> None:
    write_layouts(tmp_path, {})
    (tmp_path / name).write_text(content)
    with pytest.raises(CheckpointError) as error:
        check_folder(tmp_path)
    assert str(error.value).startswith(f"{tmp_path / name}: {reason}") and "\n" not in str(error.value)


def test_other_failures_of_the_hub_end_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(repository: str, name: str, revision: str | None = None) -> str:
        raise RuntimeError(" \nno token\nmore") if name == "model.safetensors" else EntryNotFoundError(name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    with pytest.raises(CheckpointError, match=r"hub: config.json$"):
        locate_folder("owner/name")


def test_the_same_tensors_as_the_package_of_the_format(tmp_path: Path) -> None:
    """In every type, of no and of many dimensions, in one file and in shards."""
    tensors = {
        f"{dtype}.{number}": torch.randn(shape).to(dtype)
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
        for number, shape in enumerate([(), (3,), (0, 2), (2, 1, 3, 2)])
    }
    whole = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)  # of heads that count
    tensors |= {f"{dtype}": torch.tensor([[0, 1, 7]]).to(dtype) for dtype in whole}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    parts = [dict(list(tensors.items())[i::2]) for i in range(2)]
    index = {name: f"{i}.safetensors" for i, part in enumerate(parts) for name in part}
    (tmp_path / "sharded").mkdir()
    (tmp_path / "sharded/model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for i, part in enumerate(parts):
        safetensors.torch.save_file(part, tmp_path / f"sharded/{i}.safetensors")
    for folder in (tmp_path, tmp_path / "sharded"):
        found = read_weights(folder)
        assert found.keys() == tensors.keys()
        for name, tensor in safetensors.torch.load_file(tmp_path / "model.safetensors").items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    safetensors.torch.save_file(tensors, tmp_path / "sharded/1.safetensors")
    with pytest.raises(CheckpointError, match=r"1.safetensors: tensor 'torch.bfloat16.0' is in another shard too"):
        read_weights(tmp_path / "sharded")
