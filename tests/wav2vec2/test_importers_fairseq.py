"""Files in the layouts of fairseq and unilm, written by stand-ins for their classes, read without either package.

The weights are those of tiny transformers models under fairseq's names, so the outputs can be compared.
"""

import argparse
import collections
import datetime
import enum
import functools
import os
import pickle
import re
import subprocess
import sys
import types
import typing
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    HubertConfig,
    HubertModel,
    PreTrainedModel,
    UniSpeechConfig,
    UniSpeechModel,
    UniSpeechSatConfig,
    UniSpeechSatModel,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
)

from tests.helpers import HF_BASE, HF_LARGE, tiny_hf
from wav2vec2.checkpoint import CheckpointError, model_from_state
from wav2vec2.importers import import_fairseq, load_pickled, recognise
from wav2vec2.importers.pickles import plain

BUCKETS = {"num_buckets": 16, "max_bucket_distance": 30}
TEACHERS = {
    "hubert": (HubertModel, HubertConfig, HF_BASE),
    "hubert large": (HubertModel, HubertConfig, HF_LARGE),
    "wav2vec2": (Wav2Vec2Model, Wav2Vec2Config, HF_BASE),
    "unispeech": (UniSpeechModel, UniSpeechConfig, HF_LARGE),
    "unispeech-sat": (UniSpeechSatModel, UniSpeechSatConfig, HF_BASE),
    "unispeech-sat large": (UniSpeechSatModel, UniSpeechSatConfig, HF_LARGE | {"conv_bias": False}),
    "wavlm": (WavLMModel, WavLMConfig, HF_BASE | BUCKETS),
    "wavlm large": (WavLMModel, WavLMConfig, HF_LARGE | BUCKETS),
}
RENAMES = [
    (r"masked_spec_embed", "mask_emb"),
    (r"(feature_extractor\.conv_layers\.\d+)\.conv\.", r"\1.0."),
    (r"feature_projection\.layer_norm\.", "layer_norm."),
    (r"feature_projection\.projection\.", "post_extract_proj."),
    (r"encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original0", "encoder.pos_conv.0.weight_g"),
    (r"encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original1", "encoder.pos_conv.0.weight_v"),
    (r"encoder\.pos_conv_embed\.conv\.", "encoder.pos_conv.0."),
    (r"(encoder\.layers\.\d+)\.layer_norm\.", r"\1.self_attn_layer_norm."),
    (r"\.attention\.rel_attn_embed\.", ".self_attn.relative_attention_bias."),
    (r"\.attention\.gru_rel_pos_linear\.", ".self_attn.grep_linear."),
    (r"\.attention\.gru_rel_pos_const", ".self_attn.grep_a"),
    (r"\.attention\.", ".self_attn."),
    (r"\.feed_forward\.intermediate_dense\.", ".fc1."),
    (r"\.feed_forward\.output_dense\.", ".fc2."),
]


def teacher(kind: str) -> PreTrainedModel:
    model_class, config_class, options = TEACHERS[kind]
    return tiny_hf(model_class, config_class, **options)


def fairseq_state(model: PreTrainedModel) -> dict[str, Tensor]:
    norm = "2.1" if model.config.feat_extract_norm == "layer" else "2"
    rules = [*RENAMES, (r"(feature_extractor\.conv_layers\.\d+)\.layer_norm\.", rf"\1.{norm}.")]
    state = {}
    for name, tensor in model.state_dict().items():
        for pattern, target in rules:
            name = re.sub(pattern, target, name)
        state[name] = tensor
    return state


def model_settings(model: PreTrainedModel) -> dict[str, typing.Any]:
    config = model.config
    settings = {
        "extractor_mode": "layer_norm" if config.feat_extract_norm == "layer" else "default",
        "conv_feature_layers": "[(16,10,5)] + [(20, 3, 2)] * 2",
        "conv_bias": config.conv_bias,
        "encoder_layers": 2,
        "encoder_embed_dim": 24,
        "encoder_ffn_embed_dim": 36,
        "encoder_attention_heads": 3,
        "activation_fn": "gelu",
        "layer_norm_first": config.do_stable_layer_norm,
        "dropout": 0.1,
        "attention_dropout": 0.2,
        "activation_dropout": 0.3,
        "dropout_input": 0.4,
        "encoder_layerdrop": 0.05,
        "conv_pos": 16,
        "conv_pos_groups": 4,
    }
    if hasattr(config, "num_buckets"):
        settings |= {"relative_position_embedding": True, "num_buckets": 16, "max_distance": 30, "gru_rel_pos": True}
    return settings


def task_settings(model: PreTrainedModel) -> dict[str, typing.Any]:
    return {"normalize": model.config.feat_extract_norm == "layer", "sample_rate": 16000}


@pytest.fixture
def foreign(monkeypatch: pytest.MonkeyPatch) -> typing.Iterator[types.SimpleNamespace]:
    """Stand-ins for the classes that fairseq and omegaconf leave in files, importable only while a file is written."""

    def loaded() -> set[str]:
        return {name for name in sys.modules if name.startswith(("fairseq", "omegaconf"))}

    real = loaded()  # a plugin of pytest may have them
    for name in real:
        monkeypatch.delitem(sys.modules, name)

    def module(name: str, **members: typing.Any) -> None:
        made = types.ModuleType(name)
        for key, member in members.items():
            if isinstance(member, type):
                member.__module__, member.__qualname__ = name, key
            setattr(made, key, member)
        monkeypatch.setitem(sys.modules, name, made)

    class Node:
        def __init__(self, **state: typing.Any) -> None:
            self.__dict__.update(state)

    class ContainerMetadata(Node):
        pass

    class AnyNode(Node):
        pass

    class EnumNode(Node):
        pass

    class DictConfig(Node):
        pass

    class ListConfig(Node):
        pass

    class Wav2Vec2Config:
        pass

    class Dictionary(Node):
        pass

    class Choices(enum.Enum):
        default = "default"
        layer_norm = "layer_norm"

        def __reduce_ex__(self, protocol: typing.Any) -> tuple[type, tuple[str]]:
            return type(self), (self.value,)  # as every Python but 3.11.0 to 3.11.3 writes it

    module("omegaconf")
    module("omegaconf.base", ContainerMetadata=ContainerMetadata)
    module("omegaconf.nodes", AnyNode=AnyNode, EnumNode=EnumNode)
    module("omegaconf.dictconfig", DictConfig=DictConfig)
    module("omegaconf.listconfig", ListConfig=ListConfig)
    module("fairseq")
    module("fairseq.dataclass.constants", Choices=Choices)
    module("fairseq.models.wav2vec.wav2vec2", Wav2Vec2Config=Wav2Vec2Config)
    module("fairseq.data.dictionary", Dictionary=Dictionary)

    def omega(value: typing.Any, parent: typing.Any = None, key: str = "") -> typing.Any:
        annotation = typing.Dict[str, typing.Any]  # noqa: UP006  (the spelling in these files)
        cache = collections.defaultdict(dict, {"resolver": {"a": 1}})
        meta = ContainerMetadata(ref_type=annotation, object_type=Wav2Vec2Config, key=key, resolver_cache=cache)
        if isinstance(value, dict):
            node = DictConfig(_metadata=meta, _parent=parent)
            node._content = {name: omega(item, node, name) for name, item in value.items()}
            return node
        if isinstance(value, list):
            node = ListConfig(_metadata=meta, _parent=parent)
            node._content = [omega(item, node) for item in value]
            return node
        if key == "extractor_mode":
            return EnumNode(_metadata=meta, _parent=parent, _val=Choices(value))
        return AnyNode(_metadata=meta, _parent=parent, _val=value)

    yield types.SimpleNamespace(omega=omega, dictionary=lambda: Dictionary(symbols=["a", "b"], indices={"a": 0}))
    # Nothing that was read may have imported them again.
    monkeypatch.undo()
    assert loaded() == real


def namespace(**settings: typing.Any) -> argparse.Namespace:
    return argparse.Namespace(**settings)


def layout_args(original: PreTrainedModel, foreign: types.SimpleNamespace | None) -> dict[str, typing.Any]:
    args = namespace(arch="wav2vec2", **model_settings(original), **task_settings(original))
    heads = {"quantizer.vars": torch.ones(1, 2), "project_q.weight": torch.ones(2, 2), "final_proj.bias": torch.ones(2)}
    return {"args": args, "model": fairseq_state(original) | heads, "optimizer_history": [{"num_updates": 3}]}


def layout_cfg(original: PreTrainedModel, foreign: types.SimpleNamespace) -> dict[str, typing.Any]:
    cfg = {"_name": None, "model": {"_name": "hubert"} | model_settings(original), "task": task_settings(original)}
    heads = {
        "label_embs_concat": torch.ones(5, 2),
        "final_proj.weight": torch.ones(2, 24),
        "final_proj.bias": torch.ones(2),
    }
    task_state = {"dictionaries": [foreign.dictionary()]}
    return {"args": None, "cfg": cfg, "model": fairseq_state(original) | heads, "task_state": task_state}


def layout_omegaconf(original: PreTrainedModel, foreign: types.SimpleNamespace) -> dict[str, typing.Any]:
    checkpoint = layout_cfg(original, foreign)
    settings = checkpoint["cfg"] | {"common": {"fp16": True, "tags": ["a", "b"], "seed": "${missing}"}}
    return checkpoint | {"cfg": foreign.omega(settings)}


def layout_fine_tuned(original: PreTrainedModel, foreign: types.SimpleNamespace) -> dict[str, typing.Any]:
    inner = {"model": {"_name": "hubert"} | model_settings(original), "task": {"normalize": False}}
    model = {
        "_name": "hubert_ctc",
        "w2v_path": "x.pt",
        "normalize": "${task.normalize}",
        "dropout": 0.0,
        "w2v_args": inner,
    }
    cfg = foreign.omega({"model": model, "task": task_settings(original)})
    state = {f"w2v_encoder.w2v_model.{name}": tensor for name, tensor in fairseq_state(original).items()}
    return {"cfg": cfg, "model": state | {"w2v_encoder.proj.weight": torch.ones(5, 24)}}


def layout_fine_tuned_args(original: PreTrainedModel, foreign: types.SimpleNamespace) -> dict[str, typing.Any]:
    inner = namespace(arch="wav2vec2", **model_settings(original))
    args = namespace(arch="wav2vec_ctc", w2v_args=inner, **task_settings(original))
    state = {f"w2v_encoder.w2v_model.{name}": tensor for name, tensor in fairseq_state(original).items()}
    return {"args": args, "model": state | {"w2v_encoder.proj.bias": torch.ones(5)}}


def layout_unilm(original: PreTrainedModel, foreign: types.SimpleNamespace) -> dict[str, typing.Any]:
    return {
        "cfg": model_settings(original) | {"normalize": task_settings(original)["normalize"]},
        "model": fairseq_state(original),
    }


def layout_contentvec(original: PreTrainedModel, foreign: types.SimpleNamespace) -> dict[str, typing.Any]:
    """ContentVec's legacy file: its own settings under HuBERT's name, without the layers that know the speaker."""
    own = {"_name": "hubert", "encoder_layers_1": 3, "ctr_layers": [-6], "logit_temp_ctr": 0.1, "num_negatives": 100}
    task = {"_name": "hubert_pretraining", "labels": ["km"]} | task_settings(original)
    heads = {"final_proj.weight": torch.ones(2, 24), "label_embs_concat": torch.ones(5, 2)}
    cfg = {"model": own | {"untie_final_proj": True} | model_settings(original), "task": task}
    return {"args": None, "cfg": cfg, "model": fairseq_state(original) | heads}


def layout_unispeech_sat(original: PreTrainedModel, foreign: types.SimpleNamespace) -> dict[str, typing.Any]:
    """As the released files: the settings are those published beside them, but for the sizes."""
    own = {"_name": "bc_m_hubert", "structure_type": "transformer", "streaming": False, "spk_layer": 12}
    own |= {"relative_position_embedding": False, "gru_rel_pos": False, "expand_attention_head_size": -1}
    heads = {
        "quantizer.vars": torch.ones(1, 2),
        "spk_proj.weight": torch.ones(2, 24),
        "label_embs_concat": torch.ones(5),
    }
    heads["encoder.layer_norm_for_extract.weight"] = torch.ones(24)
    cfg = {"model": own | {"num_buckets": 320} | model_settings(original), "task": task_settings(original)}
    return {"args": None, "cfg": cfg, "model": fairseq_state(original) | heads, "task_state": {}}


def layout_unispeech(original: PreTrainedModel, foreign: types.SimpleNamespace) -> dict[str, typing.Any]:
    cfg = {"model": {"_name": "unispeech", "replace_prob": 0.5} | model_settings(original)}
    state = fairseq_state(original) | {"quantizer.vars": torch.ones(1, 2)}
    state = {f"w2v_encoder.w2v_model.{name}": tensor for name, tensor in state.items()}
    return {"cfg": cfg | {"task": task_settings(original)}, "model": state | {"w2v_encoder.proj.bias": torch.ones(5)}}


SPEAKER_HEADS = {"quantizer.vars", "spk_proj.weight", "label_embs_concat", "encoder.layer_norm_for_extract.weight"}
CASES = [
    ("wav2vec2", layout_args, {"quantizer.vars", "project_q.weight", "final_proj.bias"}),
    ("hubert", layout_cfg, {"label_embs_concat", "final_proj.weight", "final_proj.bias"}),
    ("hubert large", layout_omegaconf, {"label_embs_concat", "final_proj.weight", "final_proj.bias"}),
    ("hubert large", layout_fine_tuned, {"w2v_encoder.proj.weight"}),
    ("wav2vec2", layout_fine_tuned_args, {"w2v_encoder.proj.bias"}),
    ("wavlm", layout_unilm, set()),
    ("wavlm large", layout_unilm, set()),
    ("hubert", layout_contentvec, {"final_proj.weight", "label_embs_concat"}),
    ("unispeech-sat", layout_unispeech_sat, SPEAKER_HEADS),
    ("unispeech-sat large", layout_unispeech_sat, SPEAKER_HEADS),
    ("unispeech", layout_unispeech, {"w2v_encoder.proj.bias", "quantizer.vars"}),
]


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(("kind", "layout", "heads"), CASES)
def test_layouts_import_with_equal_outputs(
    kind: str, layout: Callable, heads: set[str], zipped: bool, foreign: types.SimpleNamespace, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    original = teacher(kind)
    path = tmp_path / "teacher.pt"
    torch.save(layout(original, foreign), path, _use_new_zipfile_serialization=zipped)
    monkeypatch.undo()  # from here on fairseq and omegaconf cannot be imported

    content = load_pickled(path)
    found = import_fairseq(content)
    assert recognise(content).name.startswith("WavLM of unilm" if layout is layout_unilm else "a model of fairseq")
    assert ("args" in recognise(content).name) == (layout in (layout_args, layout_fine_tuned_args))
    assert set(found.dropped) == heads
    assert torch.equal(found.mask_embedding, original.masked_spec_embed)
    large = original.config.feat_extract_norm == "layer"
    assert found.config["normalize_waveform"] is large
    names = ("projection_dropout", "attention_dropout", "ff_interm_dropout", "dropout", "layer_drop")
    assert [found.config[f"encoder_{name}"] for name in names] == [0.4, 0.2, 0.3, 0.1, 0.05]

    model = model_from_state(found.config, found.state_dict, source=path)
    waveform = torch.randn(1, 3000)
    inputs = torch.nn.functional.layer_norm(waveform, waveform.shape) if large else waveform  # as fairseq does
    with torch.no_grad():
        expected = original(inputs, output_hidden_states=True)
        hidden, _ = model.extract_features(waveform)
        output, _ = model(waveform)
    for ours, theirs in zip(hidden[1:], expected.hidden_states[1:], strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(output, expected.last_hidden_state, atol=2e-5, rtol=1e-5)


DATA2VEC = "five positional convolutions with layer norms, which models here have not"


def test_normalisation_can_be_overridden() -> None:
    checkpoint = {"cfg": {"model": {"_name": "hubert"} | model_settings(teacher("hubert")), "task": {}}, "model": {}}
    assert import_fairseq(checkpoint).config["normalize_waveform"] is False
    assert import_fairseq(checkpoint, normalize_waveform=True).config["normalize_waveform"] is True


@pytest.mark.parametrize(
    ("model", "task", "message"),
    [
        ({"layer_type": "conformer"}, {}, "layer_type='conformer' is not supported"),
        ({"pos_conv_depth": 5}, {}, "pos_conv_depth=5 is not supported"),
        ({"activation_fn": "relu"}, {}, "activation_fn='relu'"),
        ({"relative_position_embedding": True, "gru_rel_pos": False}, {}, "gru_rel_pos=False"),
        ({"structure_type": "conformer"}, {}, "structure_type='conformer'"),
        ({"streaming": True}, {}, "streaming=True"),
        ({"expand_attention_head_size": 96}, {}, "expand_attention_head_size=96"),
        ({"_name": "av_hubert"}, {}, "'av_hubert' is not supported; valid: wav2vec2, hubert, unispeech, unispeech_sat"),
        ({"_name": "data2vec_audio"}, {}, f"data2vec_audio: {DATA2VEC}; valid: wav2vec2, hubert"),
        ({"_name": "data2vec_multi"}, {}, f"data2vec_multi: {DATA2VEC}; valid: wav2vec2, hubert"),
        (
            {"_name": "wav2vec_ctc", "w2v_args": {"model": {"_name": "data2vec_audio"}}},
            {},
            f"architecture data2vec_audio: {DATA2VEC}",
        ),
        ({"_name": "contentvec"}, {}, "contentvec: its last layers want to know the speaker; take its legacy file"),
        ({"_name": "hubert_ctc"}, {}, "does not hold the settings of the pre-trained one"),
        ({"extractor_mode": "none"}, {}, "'none' is not supported; valid: default, layer_norm"),
        ({"encoder_layers": None}, {}, "no 'encoder_layers'"),
        ({"conv_feature_layers": "__import__('os').system('true')"}, {}, "is not a list of (channels, kernel, stride)"),
        ({"conv_feature_layers": "[(512, 10, 5)] * 1000000000"}, {}, "is not a list of (channels, kernel, stride)"),
        ({"conv_feature_layers": "[(512, 10)]"}, {}, "is not a list of (channels, kernel, stride)"),
        ({}, {"sample_rate": 8000}, "8000 Hz; only 16000 Hz"),
    ],
)
def test_other_architectures_are_refused_by_name(model: dict, task: dict, message: str) -> None:
    settings = {"_name": "hubert"} | model_settings(teacher("hubert")) | model
    with pytest.raises(CheckpointError) as error:
        import_fairseq({"cfg": {"model": settings, "task": task}, "model": {}})
    assert message in str(error.value)


@pytest.mark.parametrize(
    "name",
    ["encoder.layers.0.adapter.weight", "encoder.proj.bias", "layer_norm.scale", "mask_emb.x", "post_extract_proj"],
)
def test_unknown_tensors_inside_the_backbone_are_refused(name: str) -> None:
    original = teacher("hubert")
    cfg = {"model": {"_name": "hubert"} | model_settings(original), "task": {}}
    with pytest.raises(CheckpointError, match=f"'{name}' belongs to no known part"):
        import_fairseq({"cfg": cfg, "model": fairseq_state(original) | {name: torch.ones(1)}})


def test_a_head_of_unknown_name_is_dropped_by_name() -> None:
    original = teacher("hubert")
    cfg = {"model": {"_name": "hubert"} | model_settings(original), "task": {}}
    head = {"predictor.0.weight": torch.ones(2, 24), "predictor.count": torch.tensor(3), "note": "text", 5: None}
    found = import_fairseq({"cfg": cfg, "model": fairseq_state(original) | head})
    assert found.dropped == [str(name) for name in head]
    model_from_state(found.config, found.state_dict, source="test")


def test_tensors_that_would_grow_are_refused() -> None:
    """What takes one value in the file takes 4 bytes each in float32."""
    original = teacher("hubert")
    cfg = {"model": {"_name": "hubert"} | model_settings(original), "task": {}}
    huge = torch.zeros(1, dtype=torch.float16).expand(2**40)
    with pytest.raises(CheckpointError, match=r"'mask_emb' is no dense tensor with all of its 1099511627776 values"):
        import_fairseq({"cfg": cfg, "model": fairseq_state(original) | {"mask_emb": huge}})


def test_other_files_are_refused() -> None:
    for other in ({"state_dict": {}}, [1, 2], {"model": {}}):
        with pytest.raises(CheckpointError):
            import_fairseq(other)


class Evil:
    """Creates a file when it is unpickled."""

    def __init__(self, call: Callable, *args: typing.Any) -> None:
        self.call, self.args = call, args

    def __reduce__(self) -> tuple:
        return self.call, self.args


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("call", "named"),
    [
        (os.system, f"{os.name}.system"),
        (exec, "builtins.exec"),
        (eval, "builtins.eval"),
        (subprocess.check_call, "subprocess.check_call"),
    ],
)
def test_code_in_a_pickle_is_refused_and_not_run(call: Callable, named: str, zipped: bool, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    command: typing.Any = f"touch {witness}"
    if call in (exec, eval):
        command = f"open({str(witness)!r}, 'w')"
    path = tmp_path / "evil.pt"
    torch.save({"cfg": {}, "model": Evil(call, command)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as error:
        load_pickled(path)
    assert "refused, nothing was run" in str(error.value) and named in str(error.value)
    assert "\n" not in str(error.value) and not witness.exists()


class Loose:
    """An object of a class that no list of known ones names, with a state."""

    def __init__(self) -> None:
        self.steps = [1, 2]

    def method(self) -> None:
        """Pickled by ``getattr``."""


class Slotted:
    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 3


class Mapped(dict):
    """A kind of dict with attributes of its own."""


class Listed(list):
    """A kind of list."""


class Named(typing.NamedTuple):
    """A kind of tuple, which is made by its class."""

    value: int


def mapped() -> Mapped:
    made = Mapped(a=1)
    made.extra = 2  # type: ignore[attr-defined]
    return made


STRANGE = {
    "an object": Loose(),
    "slots": Slotted(),
    "kind of dict": mapped(),
    "kind of list": Listed([1, 2]),
    "kind of tuple": Named(1),
    "kinds of dict": collections.defaultdict(list, {"a": [1]}),
    "queue": collections.deque([1, 2], 5),
    "frozen set": frozenset((1, 2)),
    "class as key": {Loose: 1, Loose(): 2},
    "function": os.path.join,
    "partial": functools.partial(fairseq_state, 1),
    "numpy": np.float64(0.5),
    "array": np.arange(3),
    "namespace": argparse.Namespace(lr=0.1),
    "date": datetime.datetime(2026, 1, 2),
    "path": Path("a/b"),
    "method": Loose().method,
    "error": ValueError("nothing"),
    "of torch": torch.optim.SGD([torch.ones(1)]),
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("strange", STRANGE)
def test_objects_of_every_class_are_made_inert(
    strange: str, zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, ran = tmp_path / "model.pt", []
    torch.save({"model": torch.ones(2), "other": STRANGE[strange]}, path, _use_new_zipfile_serialization=zipped)
    for made in (Loose, Slotted, Mapped, Listed, Named):
        monkeypatch.setattr(made, "__setstate__", lambda *args: ran.append(args), raising=False)
        monkeypatch.setattr(made, "__new__", lambda *args: ran.append(args))
    content = load_pickled(path)
    assert torch.equal(content["model"], torch.ones(2)) and not ran
    kinds = {"kind of dict": {"a": 1}, "kinds of dict": {"a": [1]}, "kind of list": [1, 2], "queue": [1, 2]}
    expected = kinds.get(strange) or {"an object": {"steps": [1, 2]}, "namespace": {"lr": 0.1}}.get(strange)
    assert expected is None or plain(content["other"]) == expected


class Called:
    """What a function gives is called: pickled like that before protocol 4, where a class is made with keywords."""

    def __reduce__(self) -> tuple:
        return functools.partial(max, 1), (2,)


@pytest.mark.parametrize(
    ("value", "zipped", "reason"),
    [
        (Called(), True, "Trying to call reduce for unrecognized function"),
        (torch.nn.Linear(2, 2), False, "Only persistent_load of storage is allowed, but got"),
    ],
)
def test_what_no_stand_in_can_do_is_refused(value: object, zipped: bool, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save({"model": value}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as error:
        load_pickled(path)
    assert str(error.value).startswith(f"{path}: not a checkpoint, or refused by PyTorch's safe loader: {reason}")
    assert "\n" not in str(error.value)


def test_what_is_not_used_is_not_read(tmp_path: Path) -> None:
    """Nor copied: the tensors that are kept lie in the mapped file."""
    path, original = tmp_path / "teacher.pt", teacher("hubert")
    torch.save(layout_args(original, None), path)
    content = load_pickled(path)
    ranges = [
        line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines() if str(path) in line
    ]
    begin, end = (int(address, 16) for address in ranges[0])
    places = [tensor.data_ptr() for tensor in import_fairseq(content).state_dict.values()]
    assert all(begin <= place < end for place in places)
    assert {tensor.data_ptr() for tensor in content["model"].values()} >= set(places)


def test_a_compressed_or_damaged_file_is_refused(tmp_path: Path) -> None:
    """By the check that model files go through too."""
    path, original = tmp_path / "teacher.pt", teacher("hubert")
    torch.save(layout_args(original, None), path)
    content = path.read_bytes()
    with (
        zipfile.ZipFile(path) as plain_file,
        zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for member in plain_file.infolist():
            packed.writestr(member.filename, plain_file.read(member))
    with pytest.raises(CheckpointError, match=r"packed.pt: compressed, which torch.save never does; refused"):
        load_pickled(tmp_path / "packed.pt")
    weight = original.encoder.layers[0].attention.k_proj.weight.detach()
    at = content.index(weight.numpy().tobytes())
    path.write_bytes(content[:at] + bytes(4) + content[at + 4 :])
    with pytest.raises(CheckpointError, match=r"teacher.pt: damaged, its checksums do not fit"):
        load_pickled(path)


def test_hidden_calls_are_refused(tmp_path: Path) -> None:
    """Protocol 4 can put the name of a function on the stack, where a scan does not see it."""
    path, witness = tmp_path / "evil.pt", tmp_path / "witness"
    torch.save({"model": Evil(os.system, f"touch {witness}")}, path, pickle_protocol=4)
    with pytest.raises(CheckpointError, match="STACK_GLOBAL"):
        load_pickled(path)
    assert not witness.exists()


def test_a_plain_pickle_is_refused_and_not_run(tmp_path: Path) -> None:
    path, witness = tmp_path / "evil.pt", tmp_path / "witness"
    path.write_bytes(pickle.dumps(Evil(os.system, f"touch {witness}"), protocol=2))
    with pytest.raises(CheckpointError):
        load_pickled(path)
    assert not witness.exists()


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_download_gives_one_line(share: float, zipped: bool, foreign, tmp_path: Path) -> None:
    path = tmp_path / "teacher.pt"
    torch.save(layout_cfg(teacher("hubert"), foreign), path, _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match="download it again") as error:
        load_pickled(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_pickled(tmp_path / "none.pt")
    page = tmp_path / "page.pt"
    page.write_text("<html>Not found</html>")
    with pytest.raises(CheckpointError, match=r"not a (PyTorch )?checkpoint"):
        load_pickled(page)
