"""Folders of transformers: what is fetched from the hub, and what is read."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
import safetensors.torch
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from wav2vec2 import CheckpointError
from wav2vec2.importers.folder import locate_folder, read_weights


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
    (folder / "config.json").touch()
    with pytest.raises(CheckpointError, match=r"could not be fetched from the hub: 404: model-1.safetensors$"):
        locate_folder("owner/name")
    (folder / "model-1.safetensors").touch()
    (folder / "model-2.safetensors").touch()
    fetched.clear()
    assert locate_folder("owner/name") == folder
    assert fetched == ["config.json", "model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"]


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
