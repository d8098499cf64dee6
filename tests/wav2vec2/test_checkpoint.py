"""Model files: round trips, both spellings of the weight norm, and every kind of file that must be refused."""

from __future__ import annotations

import argparse
import copy
import os
import zipfile
from pathlib import Path

import pytest
import torch

from wav2vec2 import CheckpointError, load_model, prune, save_model, wav2vec2_model
from wav2vec2.checkpoint import add_masks, load_checkpoint, model_from_state

ARCHITECTURES = ["hubert_base", "hubert_large", "wavlm_base", "wavlm_large"]
DUMMY_WEIGHT = "feature_extractor.dummy_weight"
NEW_SPELLING = {"weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}


def respelt(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """With the weight norm's names of today's torch."""
    return {f"{head}{NEW_SPELLING.get(tail, tail)}": tensor for (head, tail), tensor in (
        ((name[: name.rfind(".") + 1], name[name.rfind(".") + 1 :]), tensor) for name, tensor in state.items()
    )}  # fmt: skip


@torch.no_grad()
def output(model: torch.nn.Module) -> torch.Tensor:
    waveforms = torch.sin(torch.arange(700.0) ** 1.3)[None].to(next(model.parameters()).dtype)
    return model.extract_features(waveforms)[0][-1]


def refusal(path: Path) -> str:
    """The one line that loading ends with."""
    with pytest.raises(CheckpointError) as caught:
        load_model(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and "\n" not in message
    return message.removeprefix(f"{path}: ")


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_round_trip(tiny, flags, architecture, pruned, tmp_path):
    model = tiny(architecture, tuple(flags))
    model = prune(model)[0] if pruned else model
    heads = {"0.weight": torch.randn(3, 2)}
    save_model(tmp_path / "deep" / "model.pth", model, heads, mask_embedding=torch.ones(16), note={"a": [1, "b"]})
    loaded = load_checkpoint(tmp_path / "deep" / "model.pth")
    assert not loaded.model.training
    assert loaded.config == loaded.model.config == model.config
    assert list(loaded.heads) == ["0.weight"] and torch.equal(loaded.heads["0.weight"], heads["0.weight"])
    assert set(loaded.extra) == {"mask_embedding", "note"} and loaded.extra["note"] == {"a": [1, "b"]}
    assert torch.equal(output(loaded.model), output(model))
    assert [p.requires_grad for p in loaded.model.parameters()] == [p.requires_grad for p in model.parameters()]


def test_the_released_idiom_reads_what_we_write(tiny, tmp_path):
    model = prune(tiny("wavlm_base", ("conv", "head", "interm")))[0]
    save_model(tmp_path / "model.pth", model)
    content = torch.load(tmp_path / "model.pth", weights_only=True)
    assert set(content) == {"state_dict", "config", "distill_linear_projs"}
    other = wav2vec2_model(**content["config"])
    other.load_state_dict(content["state_dict"], strict=True)
    assert torch.equal(output(other.eval()), output(model))


def test_load_model_to_another_dtype(tiny, tmp_path):
    model = tiny("hubert_base", ("head",))
    save_model(tmp_path / "model.pth", model.double())
    loaded = load_model(tmp_path / "model.pth", dtype=torch.float64)
    assert {p.dtype for p in loaded.parameters()} == {torch.float64}
    assert {p.dtype for p in load_model(tmp_path / "model.pth").parameters()} == {torch.float32}
    torch.testing.assert_close(output(loaded), output(model), atol=1e-5, rtol=1e-5)


def test_both_spellings_of_the_weight_norm(tiny):
    model = tiny("hubert_base")
    state = respelt(model.state_dict())
    assert len(state.keys() - model.state_dict().keys()) == 2
    assert torch.equal(output(model_from_state(model.config, state, "test")), output(model))
    other = wav2vec2_model(**model.config)
    other.load_state_dict(state, strict=True)
    assert torch.equal(output(other.eval()), output(model))
    assert set(state) == set(respelt(model.state_dict()))  # the caller's dict is left alone


def test_missing_dummy_weight_is_one(tiny, tmp_path):
    model = tiny("hubert_base")
    state = {name: tensor for name, tensor in model.state_dict().items() if name != DUMMY_WEIGHT}
    torch.save({"state_dict": state, "config": model.config}, tmp_path / "model.pth")
    model.feature_extractor.dummy_weight.data.fill_(1.0)
    loaded = load_model(tmp_path / "model.pth")
    assert torch.equal(output(loaded), output(model)) and not loaded.feature_extractor.dummy_weight.requires_grad


def bad_states(state: dict[str, torch.Tensor]) -> dict[str, tuple[dict, str]]:
    name = "encoder.transformer.layer_norm.weight"
    without = {key: tensor for key, tensor in state.items() if key != name}
    wants = "its config wants float [16]"
    return {
        "every key misspelt": ({f"model.{key}": t for key, t in state.items()}, "missing (encoder.feature_projection"),
        "one missing": (without, f"its tensors do not fit its config: 1 missing ({name})"),
        "one too many": ({**state, "masked_spec_embed": torch.ones(3)}, "1 unexpected (masked_spec_embed)"),
        "key of another type": ({**state, 7: torch.ones(3)}, "1 unexpected (7)"),
        "wrong shape": ({**state, name: torch.ones(15)}, f"{name} is torch.float32 [15], {wants}"),
        "whole numbers": ({**state, name: torch.ones(16, dtype=torch.int64)}, f"{name} is torch.int64 [16], {wants}"),
        "no tensor": ({**state, name: [1.0] * 16}, f"{name} is list, {wants}"),
        "sparse": ({**state, name: torch.ones(16).to_sparse()}, "holds a tensor without all of its values"),
        "without values": ({**state, name: torch.ones(16, device="meta")}, "holds a tensor without all of its values"),
        "one value for all": (
            {**state, name: torch.ones(1).expand(16)},
            "holds a tensor without all of its values; refused",
        ),
    }


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("case", bad_states({}))
def test_tensors_that_do_not_fit_are_refused(tiny, tmp_path, case):
    model = tiny("hubert_base")
    state, message = bad_states(model.state_dict())[case]
    torch.save({"state_dict": state, "config": model.config}, tmp_path / "model.pth")
    assert message in refusal(tmp_path / "model.pth")


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_malicious_pickle_is_refused_and_not_run(tmp_path, zipped):
    content = {"state_dict": {}, "config": Malicious(tmp_path / "ran")}
    torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=zipped)
    message = refusal(tmp_path / "model.pth")
    assert message == f"holds {os.system.__module__}.system besides tensors and plain types; refused, nothing was run"
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ([1, 2], "holds a list, not a dict"),
        ({"model": {}}, "no 'config' and 'state_dict' in it; not a model of this toolkit"),
        ({"state_dict": {}, "config": None}, "no 'config' and 'state_dict' in it"),
        ({"state_dict": {}, "pytorch-lightning_version": "2.6"}, "a training checkpoint, not a model"),
        ({"state_dict": {}, "config": {}}, "its config builds no model"),
        ({"state_dict": {}, "config": {1: 2}}, "its config builds no model"),
        (
            {"state_dict": {}, "config": {}, "distill_linear_projs": [1]},
            "'distill_linear_projs' is not a dict of tensors",
        ),
        ({"cfg": argparse.Namespace(a=1)}, "holds argparse.Namespace besides tensors and plain types"),
    ],
)
def test_other_kinds_of_content_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "model.pth")
    assert refusal(tmp_path / "model.pth").startswith(message)


@pytest.mark.parametrize(
    "content",
    [b"", b"# a YAML file\nlr: 0.1\n", b"fLaC" + bytes(100), b"RIFF\x00\x00\x00\x00WAVEfmt ", bytes(range(256))],
)
def test_other_kinds_of_file_are_refused(tmp_path, content):
    (tmp_path / "model.pth").write_bytes(content)
    assert refusal(tmp_path / "model.pth").startswith("truncated or not a torch file")


def test_missing_files_and_folders_are_refused(tmp_path):
    assert refusal(tmp_path / "model.pth") == "no such file"
    assert refusal(tmp_path) == "no config.json in this folder"


def test_truncated_files_are_refused(tiny, tmp_path):
    save_model(tmp_path / "whole.pth", tiny("hubert_base"))
    whole, path = (tmp_path / "whole.pth").read_bytes(), tmp_path / "model.pth"
    for length in range(0, len(whole) - 1, len(whole) // 15):
        path.write_bytes(whole[:length])
        assert refusal(path).startswith("truncated or not a torch file")


@pytest.mark.slow
def test_a_huge_config_allocates_nothing(tiny, tmp_path):
    model = tiny("hubert_base")
    state, path = model.state_dict(), tmp_path / "model.pth"
    del state[DUMMY_WEIGHT]  # it must not be made up before the rest is known to fit
    huge = 10**11  # floats: 400 GB
    channels = [*model.config["extractor_conv_layer_config"][:2], (huge, 2, 2)]
    torch.save({"state_dict": state, "config": {**model.config, "extractor_conv_layer_config": channels}}, path)
    assert f"its config wants float [{huge}, 10, 2]" in refusal(path)
    many = {f"encoder_{name}": [True] * 10**6 for name in ("use_attention", "use_feed_forward")}
    torch.save({"state_dict": state, "config": {**model.config, **many, "encoder_num_layers": 10**6}}, path)
    assert "1000000 layers in encoder_use_attention, but only" in refusal(path)


def test_a_compressed_file_is_refused(tmp_path):
    torch.save({"state_dict": {"a": torch.zeros(100_000)}, "config": {}}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "model.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in plain.infolist():
            packed.writestr(member.filename, plain.read(member))
    assert (tmp_path / "model.pth").stat().st_size < 10_000
    assert refusal(tmp_path / "model.pth") == "compressed, which torch.save never does; refused"


def test_damaged_values_are_refused(tiny, tmp_path):
    path = tmp_path / "model.pth"
    model = tiny("hubert_base")
    save_model(path, model)
    content, weight = path.read_bytes(), model.encoder.feature_projection.projection.weight
    at = content.index(weight.detach().numpy().tobytes())
    path.write_bytes(content[:at] + bytes(4) + content[at + 4 :])
    assert refusal(path) == "damaged, its checksums do not fit; copy or download it again"


DIARIZEN = {
    "use_layerwise_prune": False, "wavlm_original_params": "94.38 M", "wavlm_original_macs": "1669.1 G",
    "wavlm_current_params": "18.8 M", "wavlm_current_macs": "333.9 G",
}  # fmt: skip
MASKS = {"limit_l": -0.1, "limit_r": 1.1, "temperature": 2 / 3}


def test_files_of_diarizen(tiny, tmp_path):
    """What their config says of masks that are gone, and of sizes, changes nothing."""
    model = prune(tiny("wavlm_base", ("head",)))[0]
    content = {"state_dict": model.state_dict(), "config": model.config | DIARIZEN | {**MASKS, "limit_l": -0.2}}
    torch.save(content, tmp_path / "pytorch_model.bin")
    loaded = load_checkpoint(tmp_path / "pytorch_model.bin")
    assert loaded.config == loaded.model.config == model.config
    assert torch.equal(output(loaded.model), output(model))
    torch.save(content | {"config": content["config"] | {"wavlm_size": "18.8 M"}}, tmp_path / "model.pth")
    assert "its config builds no model" in refusal(tmp_path / "model.pth")


@pytest.mark.parametrize("key, value", [("limit_l", -0.2), ("temperature", 0.5), ("use_layerwise_prune", "5-12")])
def test_masks_of_diarizen(tiny, tmp_path, key, value):
    model = tiny("wavlm_base", ("head",))
    content = {"state_dict": model.state_dict(), "config": model.config | DIARIZEN | MASKS}
    torch.save(content, tmp_path / "same.pth")
    assert torch.equal(output(load_model(tmp_path / "same.pth")), output(model))
    content["config"][key] = value
    torch.save(content, tmp_path / "model.pth")
    assert refusal(tmp_path / "model.pth").startswith(f"{key} is {value} in its config, but ")


class Unpicklable:
    def __reduce__(self):
        raise RuntimeError("disk full")


def test_a_failing_save_leaves_the_old_file_and_nothing_else(tiny, tmp_path):
    path = tmp_path / "model.pth"
    model = tiny("hubert_base")
    save_model(path, model)
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="disk full"):
        save_model(path, tiny("hubert_large"), broken=Unpicklable())
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["model.pth"]
    save_model(path, prune(tiny("hubert_base", ("head",)))[0])
    assert path.read_bytes() != before and len(list(tmp_path.iterdir())) == 1


def test_deep_copies_are_independent(tiny, flags):
    model = tiny("wavlm_base", tuple(flags))
    twin = copy.deepcopy(model)
    assert torch.equal(output(twin), output(model))
    twin.load_state_dict(respelt({name: tensor + 0.1 for name, tensor in twin.state_dict().items()}))
    assert not torch.equal(output(twin), output(model))
    names = ("encoder.transformer.pos_conv_embed.conv.weight_v", "encoder.transformer.pos_conv_embed.conv.weight_g")
    for name in names:
        torch.testing.assert_close(twin.state_dict()[name], model.state_dict()[name] + 0.1)


def test_eval_masks_follow_the_weights(tiny, flags):
    """They are never cached: a stale one would outlive load_state_dict() and .double()."""
    model, other = tiny("hubert_base", tuple(flags)), tiny("hubert_base", tuple(flags))
    expected = output(other)
    assert not torch.equal(output(model), expected)
    model.load_state_dict(other.state_dict())
    assert torch.equal(output(model), expected)
    assert output(model.double()).dtype == torch.float64
    torch.testing.assert_close(output(model).float(), expected, atol=1e-5, rtol=1e-5)
    for mask in model.masks().values():
        mask.log_alpha.data.mul_(-1)
    assert (output(model).float() - expected).abs().max() > 0.01


def test_masks_and_network_must_agree(tiny):
    model = tiny("hubert_base")
    model.config["encoder_use_attention"][1] = False
    with pytest.raises(AssertionError, match="masks changed the network"):
        add_masks(model, encoder_prune_attention_heads=True)
