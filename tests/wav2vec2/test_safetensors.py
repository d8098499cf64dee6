"""The safetensors files: against the format's own library, and every kind of file that must be refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from wav2vec2 import CheckpointError, load_model, prune, save_model
from wav2vec2.checkpoint import load_checkpoint
from wav2vec2.hub import locate
from wav2vec2.safetensors import read_safetensors, write_safetensors

TENSORS = {
    "a": torch.randn(3, 4),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.empty(0, 3),
    "half": torch.randn(5).half(),
    "brain": torch.randn(2, 1, 3).bfloat16(),
    "strided": torch.randn(4, 6)[:, ::2].t(),
}


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours
    )


def test_the_library_reads_what_we_write(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", TENSORS, {"format": "pt", "note": "é"})
    assert same(safetensors.torch.load_file(tmp_path / "x.safetensors"), TENSORS)
    with safetensors.safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "é"}


def test_we_read_what_the_library_writes(tmp_path):
    contiguous = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    safetensors.torch.save_file(contiguous, tmp_path / "x.safetensors", {"k": "v"})
    tensors, metadata = read_safetensors(tmp_path / "x.safetensors")
    assert same(tensors, TENSORS) and metadata == {"k": "v"}
    tensors["a"] += 1  # writable memory of its own


def file_of(header: object, values: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + values


def entry(begin: int, end: int, shape: object = (2,), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BROKEN = {
    "nothing": (b"", "truncated or not"),
    "short length": (b"\1\0\0", "truncated or not"),
    "header longer than the file": ((1 << 60).to_bytes(8, "little") + b"{}", "truncated or not"),
    "no JSON": (file_of(b"{nonsense"), "no JSON"),
    "no text": (file_of(b"\xff\xfe"), "no JSON"),
    "deep JSON": (file_of(b"[" * 200_000), "no JSON"),
    "a list": (file_of([1]), "no table"),
    "metadata": (file_of({"__metadata__": {"a": 1}}), "not a table of strings"),
    "no offsets": (file_of({"a": {"dtype": "F32", "shape": [2]}}), "no two offsets"),
    "an entry that is none": (file_of({"a": 3}), "no two offsets"),
    "floating offsets": (file_of({"a": entry(0.0, 8.0)}, b"8bytes!!"), "no two offsets"),
    "beyond the end": (file_of({"a": entry(0, 8)}, b"four"), "truncated"),
    "a hole": (file_of({"a": entry(4, 12)}, b"x" * 12), "a overlaps or leaves a hole"),
    "an overlap": (file_of({"a": entry(0, 8), "b": entry(4, 12)}, b"x" * 12), "b overlaps"),
    "negative": (file_of({"a": entry(-8, 0)}, b"x" * 8), "overlaps or leaves"),
    "more bytes": (file_of({"a": entry(0, 8)}, b"x" * 9), "1 bytes more"),
    "integers": (file_of({"a": entry(0, 8, dtype="I32")}, b"x" * 8), "type I32; only F64"),
    "a list for a type": (file_of({"a": entry(0, 8, dtype=["F32"])}, b"x" * 8), "only F64"),
    "shape": (file_of({"a": entry(0, 8, shape=[3])}, b"x" * 8), "other bytes than its shape"),
    "negative shape": (file_of({"a": entry(0, 8, shape=[-1, -2])}, b"x" * 8), "no valid shape"),
    "huge shape": (file_of({"a": entry(0, 8, shape=[1 << 62, 1 << 62])}, b"x" * 8), "other bytes"),
    "many dimensions": (file_of({"a": entry(0, 8, shape=[1] * 1000)}, b"x" * 8), "no valid shape"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_are_refused_in_one_line(kind, tmp_path):
    content, reason = BROKEN[kind]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_model(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_every_truncation_of_a_model_is_refused(tiny, tmp_path):
    save_model(tmp_path / "x.safetensors", tiny("hubert_base"))
    content = (tmp_path / "x.safetensors").read_bytes()
    for size in range(0, len(content), len(content) // 40):
        (tmp_path / "x.safetensors").write_bytes(content[:size])
        with pytest.raises(CheckpointError):
            load_model(tmp_path / "x.safetensors")


@pytest.mark.parametrize("architecture", ["hubert_base", "wavlm_large"])
def test_model_round_trip(tiny, flags, architecture, tmp_path):
    model = prune(tiny(architecture, tuple(flags)))[0]
    content = {"mask_embedding": torch.ones(16), "notes": ["a", "b"]}
    for name in ("x.pth", "x.safetensors"):
        save_model(tmp_path / name, model, {"0.weight": torch.randn(3, 2)}, **content)
    pth, ours = (load_checkpoint(tmp_path / name) for name in ("x.pth", "x.safetensors"))
    assert same(ours.model.state_dict(), pth.model.state_dict()) and ours.model.config == pth.model.config
    assert [layer.__class__ for layer in ours.model.config["extractor_conv_layer_config"]] == [tuple] * 3
    assert list(ours.heads) == ["0.weight"] and ours.heads["0.weight"].shape == (3, 2)
    assert ours.extra["notes"] == ["a", "b"] and torch.equal(ours.model.mask_embedding, torch.ones(16))
    waveforms = torch.randn(1, 500)
    assert torch.equal(ours.model(waveforms)[0], pth.model(waveforms)[0])


def test_a_file_of_another_program_is_refused(tmp_path):
    safetensors.torch.save_file({"a": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match="no config in its metadata; not a model of this toolkit"):
        load_model(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "metadata", [{"config": "{}"}, {"config": "[]"}, {"config": "{}", "extra": "[]"}, {"config": "["}]
)
def test_metadata_that_builds_no_model(metadata, tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"a": torch.ones(2)}, metadata)
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path / "x.safetensors")
    assert "\n" not in str(caught.value)


def fake_hub(monkeypatch: pytest.MonkeyPatch, folder: Path) -> list[tuple]:
    """``huggingface_hub`` that gives the files of a folder; returns the list of what was asked for."""
    import huggingface_hub

    asked = []

    def download(repo_id: str, filename: str, revision: str | None = None) -> str:
        asked.append((repo_id, filename, revision))
        if not (folder / filename).is_file():
            raise OSError(f"404: {filename}\nmore")
        return str(folder / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_hub_ids(tiny, tmp_path, monkeypatch):
    (tmp_path / "hub").mkdir()
    model = tiny("hubert_base")
    save_model(tmp_path / "hub" / "sub" / "final.pth", model)
    asked = fake_hub(monkeypatch, tmp_path / "hub")
    loaded = load_model("owner/name/sub/final.pth", revision="v1", dtype=torch.float64)
    assert asked == [("owner/name", "sub/final.pth", "v1")]
    assert next(loaded.parameters()).dtype == torch.float64
    with pytest.raises(
        CheckpointError, match=r"^owner/name: no such file, and the hub does not give it: 404: config.json$"
    ):
        load_model("owner/name")


@pytest.mark.parametrize(
    "path", ["final.pth", "a/final.pth", "/a/b/final.pth", "./a/final.pth", "../a/b/c.pth", "a/b/c", "x"]
)
def test_missing_paths_never_ask_the_hub(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = fake_hub(monkeypatch, tmp_path)
    with pytest.raises(CheckpointError, match=r"no such file$"):
        load_model(path)
    with pytest.raises(CheckpointError, match=r"no such file$"):
        load_model(Path("owner/name"))
    assert asked == []


def test_what_exists_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert locate("owner/name") == Path("owner/name")
    with pytest.raises(CheckpointError, match=r"owner/name: no config.json in this folder"):
        load_model("owner/name")


def test_without_huggingface_hub(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CheckpointError, match=r"^owner/name: no such file; .* pip install huggingface_hub$"):
        load_model("owner/name")
