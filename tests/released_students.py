"""Stand-ins with the names, shapes and settings of the released students' files, and what their classes compute."""

from __future__ import annotations

import ast
import collections
import contextlib
import math
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

THIN = "[({}, 10, 5)] + [({}, 1, 1)] + [({}, 3, 2)] * 4 + [({}, 1, 1)] + [({}, 2, 2)] * 2"
SCHEDULE = "s3prl.optimizers.WarmupLinearSchedule"
FOREIGN: dict[str, type] = {}  # classes by their full names
EVERY_SECOND = str([layer % 2 == 0 for layer in range(12)])


def distiller(channels: int, width: int, ffn: int, heads: int, **extra: Any) -> dict[str, Any]:
    """Section of the YAML that describes the student, as published apart from the sizes."""
    first, middle = extra.pop("front", (128, 256))
    return {
        "extractor_mode": "default",
        "conv_feature_layers": THIN.format(first, middle, middle, channels, channels),
        "feature_grad_mult": 1.0,
        "conv_bias": False,
        "conv_pos": 128,
        "conv_pos_groups": 16,
        "pos_conv_depth": 1,
        "max_positions": 100000,
        "layer_type": "transformer",
        "encoder_layers": 12,
        "encoder_embed_dim": width,
        "encoder_ffn_embed_dim": ffn,
        "encoder_attention_heads": heads,
        "activation_fn": "gelu",
        "layer_norm_first": False,
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "activation_dropout": 0.1,
        "encoder_layerdrop": 0.0,
        "dropout_input": 0.05,
        "final_dim": 256,
        "checkpoint_activations": False,
        "required_seq_len_multiple": 1,
        "crop_seq_to_multiple": 1,
        "init_conv_layers": False,
        "init_encoder_layers": 0,
        **extra,
    }


def with_heads(reduced: bool = False, **extra: Any) -> dict[str, Any]:
    """Settings of those with heads; all of them have a section on time reduction."""
    heads = {"layerwise_proj": True, "pred_layer_id": "[11]", "pred_head_final_dim": 768, "pred_head_inter_dim": 0}
    reduction = {"tr_layer_type": "conv1d", "tr_layer_index": 0, "tr_reduce_factor": 2, "tr_conv1d_kernel": 2}
    return {**heads, **reduction, "enable_tr_layer": reduced, **extra}


MASKED = {"freeze_student_mask": False, "update_teacher_mask": False}
FULL_SIZE = {
    "fithubert": distiller(512, 480, 480, 12, **with_heads(True, n_mels=0, enable_log_mel=False)),
    "maskhubert": distiller(480, 480, 640, 12, **with_heads(**MASKED, layer_grad_scale=False)),
    "armhubert": distiller(480, 480, 864, 12, **with_heads(**MASKED, reuse_pattern=EVERY_SECOND)),
    "armhubert_s": distiller(432, 432, 816, 12, **with_heads(**MASKED, reuse_pattern=EVERY_SECOND)),
    "armwavlm_s": distiller(432, 432, 816, 12, **with_heads(**MASKED, reuse_pattern=EVERY_SECOND)),
    "starhubert": distiller(432, 432, 976, 8),
    "starhubert_l": distiller(480, 480, 1024, 8),
}
SMALL = {"front": (6, 8), "encoder_layers": 3, "conv_pos": 16, "conv_pos_groups": 4, "pred_head_final_dim": 20}
REUSED = {"reuse_pattern": "[True, False, True]"}
TINY = {
    "fithubert": distiller(20, 16, 16, 4, **with_heads(True) | SMALL),
    "maskhubert": distiller(16, 16, 20, 4, **with_heads(**MASKED) | SMALL),
    "armhubert": distiller(16, 16, 24, 4, **with_heads(**MASKED, **REUSED) | SMALL),
    "armwavlm": distiller(
        16,
        16,
        24,
        4,
        **with_heads(**MASKED, reuse_pattern="[True, False, False, True]") | SMALL | {"encoder_layers": 4},
    ),
    "starhubert": distiller(16, 16, 28, 2, **SMALL),
}


def conv_layers(settings: dict[str, Any]) -> list[tuple[int, int, int]]:
    found = re.findall(r"\((\d+), (\d+), (\d+)\)\](?: \* (\d+))?", settings["conv_feature_layers"])
    return [(int(c), int(k), int(s)) for c, k, s, times in found for _ in range(int(times or 1))]


def student_shapes(settings: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Every tensor of the released student by its name there."""
    width, ffn = settings["encoder_embed_dim"], settings["encoder_ffn_embed_dim"]
    kernel, groups = settings["conv_pos"], settings["conv_pos_groups"]
    reduced, layers = settings.get("enable_tr_layer", False), settings["encoder_layers"]
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes.update({f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)})

    def norm(name: str, size: int) -> None:
        shapes.update({f"{name}.weight": (size,), f"{name}.bias": (size,)})

    channels = 1
    for i, (out, size, _) in enumerate(conv_layers(settings)):
        shapes[f"feature_extractor.conv_layers.{i}.0.weight"] = (out, channels, size)
        if i == 0:
            norm("feature_extractor.conv_layers.0.2", out)
        channels = out
    if channels != width:
        linear("post_extract_proj", channels, width)
    norm("layer_norm", channels)
    shapes["encoder.pos_conv.0.bias"] = (width,)
    shapes["encoder.pos_conv.0.weight_g"] = (1, 1, kernel)
    shapes["encoder.pos_conv.0.weight_v"] = (width, width // groups, kernel)
    norm("encoder.layer_norm", width)
    pattern = ast.literal_eval(settings.get("reuse_pattern", "None")) or [True] * layers
    if reduced:
        shapes |= {"encoder.layers.0.weight": (width, width, 2), "encoder.layers.0.bias": (width,)}
        shapes |= {"upsampler.weight": (width, width, 2), "upsampler.bias": (width,)}
    for i, computes in enumerate(pattern):
        layer = f"encoder.layers.{i + reduced}"
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            if computes or projection in ("v_proj", "out_proj"):
                linear(f"{layer}.self_attn.{projection}", width, width)
        norm(f"{layer}.self_attn_layer_norm", width)
        linear(f"{layer}.fc1", width, ffn)
        linear(f"{layer}.fc2", ffn, width)
        norm(f"{layer}.final_layer_norm", width)
        if settings.get("layerwise_proj"):
            linear(f"proj_head.{i}.lin_proj", width, settings["pred_head_final_dim"])
            if reduced:
                shapes |= {
                    f"proj_head.{i}.upsampler.weight": (width, width, 2),
                    f"proj_head.{i}.upsampler.bias": (width,),
                }
    if "freeze_student_mask" in settings:
        shapes["mask_emb"] = (width,)
    return shapes


def student_state(settings: dict[str, Any]) -> dict[str, Tensor]:
    """Random tensors, none of them at its start value."""
    torch.manual_seed(0)
    return {
        name: torch.randn(shape) * 0.3 + ("norm.weight" in name or name.endswith(".2.weight"))
        for name, shape in student_shapes(settings).items()
    }


def foreign(name: str, *bases: type) -> Any:
    """A class of a package that is not installed; :func:`importable` lets its objects be pickled."""
    if name not in FOREIGN:
        module, _, short = name.rpartition(".")
        FOREIGN[name] = type(short, bases, {"__module__": module})
    return FOREIGN[name]


@contextlib.contextmanager
def importable() -> Iterator[None]:
    """While a file is written its classes can be imported; while it is read they cannot."""
    with pytest.MonkeyPatch.context() as patch:
        for name, made in FOREIGN.items():
            parts = name.split(".")
            for path in (".".join(parts[:end]) for end in range(1, len(parts))):
                if path not in sys.modules:
                    patch.setitem(sys.modules, path, types.ModuleType(path))
            patch.setattr(sys.modules[made.__module__], made.__name__, made, raising=False)
        yield


def lightning(state: dict[str, Tensor], **others: Tensor) -> dict[str, Any]:
    """What Lightning writes around the tensors: the teacher, and an optimizer that holds the object of its schedule.

    Save it while :func:`importable`.
    """
    teacher = {"teacher_model.model.mask_emb": torch.ones(4), "teacher_model.model.final_proj.weight": torch.ones(2, 4)}
    states = collections.OrderedDict(teacher | {f"student_model.{k}": tensor for k, tensor in state.items()} | others)
    vars(states)["_metadata"] = collections.OrderedDict({"": {"version": 1}})
    moments = {"step": 7, "next_m": torch.ones(3), "next_v": torch.ones(3)}
    schedule = foreign(SCHEDULE)()
    vars(schedule).update(warmup=0.05, t_total=1000.0, warned_for_t_total_at_progress=-1)
    group = {"lr": 5e-4, "betas": [0.9, 0.98], "schedule": schedule, "weight_decay": 0.01, "params": [0]}
    monitor = {
        "monitor": "v_loss",
        "best_model_score": torch.tensor(0.5),
        "best_k_models": {"a.ckpt": torch.tensor(0.5)},
    }
    return {
        "epoch": 199,
        "global_step": 1000,
        "pytorch-lightning_version": "1.6.5",
        "state_dict": states,
        "callbacks": {"ModelCheckpoint{'monitor': 'v_loss'}": monitor},
        "optimizer_states": [{"state": {0: moments}, "param_groups": [group, group | {"weight_decay": 0.0}]}],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"cfg": {"train": {"gpus": 2}}},
    }


def settings_file(section: dict[str, Any]) -> dict[str, Any]:
    return {"teacher": {"teacher_model": "hubert_base_ls960.pt"}, "train": {"gpus": 2}, "distiller": section}


def released_states(tensors: dict[str, Tensor], settings: dict[str, Any], waveforms: Tensor) -> list[Tensor]:
    """The released class's forward pass of one utterance [1, N], one formula a line: Transformer input, then layers.

    A reusing layer puts the map that an earlier one computed through a softmax of its own; the strided convolution of
    time reduction leaves out an odd last frame.
    """
    assert len(waveforms) == 1  # at more the released code mixes rows and heads

    def affine(name: str, x: Tensor) -> Tensor:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    x = waveforms[:, None]
    for i, (_, _, stride) in enumerate(conv_layers(settings)):
        name = f"feature_extractor.conv_layers.{i}"
        x = F.conv1d(x, tensors[f"{name}.0.weight"], stride=stride)
        if i == 0:  # one group per channel: over time
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
            x = x * tensors[f"{name}.2.weight"][:, None] + tensors[f"{name}.2.bias"][:, None]
        x = F.gelu(x)
    x = norm("layer_norm", x.transpose(1, 2))
    if "post_extract_proj.weight" in tensors:
        x = affine("post_extract_proj", x)
    states = [x]
    kernel, v = settings["conv_pos"], tensors["encoder.pos_conv.0.weight_v"]
    weight = tensors["encoder.pos_conv.0.weight_g"] * v / v.square().sum((0, 1), keepdim=True).sqrt()
    bias, groups = tensors["encoder.pos_conv.0.bias"], settings["conv_pos_groups"]
    position = F.conv1d(x.transpose(1, 2), weight, bias, padding=kernel // 2, groups=groups)[..., :-1]
    x = norm("encoder.layer_norm", x + F.gelu(position).transpose(1, 2))
    first = 0
    if "encoder.layers.0.weight" in tensors:
        first = 1
        weight, bias = tensors["encoder.layers.0.weight"], tensors["encoder.layers.0.bias"]
        pairs = x[:, : x.shape[1] // 2 * 2].unflatten(1, (-1, 2))
        x = torch.einsum("btkd,edk->bte", pairs, weight) + bias
    heads, attention = settings["encoder_attention_heads"], None
    for i in range(first, settings["encoder_layers"] + first):
        layer = f"encoder.layers.{i}"

        def by_head(name: str, x: Tensor = x, layer: str = layer) -> Tensor:
            return affine(f"{layer}.self_attn.{name}", x).unflatten(-1, (heads, -1)).transpose(1, 2)

        if f"{layer}.self_attn.q_proj.weight" in tensors:
            q, k = by_head("q_proj", x), by_head("k_proj", x)
            mixing = attention = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        else:
            mixing = attention.exp() / attention.exp().sum(-1, keepdim=True)
        mixed = (mixing @ by_head("v_proj", x)).transpose(1, 2).flatten(2)
        x = norm(f"{layer}.self_attn_layer_norm", x + affine(f"{layer}.self_attn.out_proj", mixed))
        x = norm(f"{layer}.final_layer_norm", x + affine(f"{layer}.fc2", F.gelu(affine(f"{layer}.fc1", x))))
        states.append(x)
    return states


def released_heads(tensors: dict[str, Tensor], layers: list[Tensor]) -> list[Tensor]:
    """What the released class shows of its layers [1, T', D]: through the head of each, [1, T, E]."""
    shown = []
    for i, x in enumerate(layers):
        head = f"proj_head.{i}"
        if f"{head}.upsampler.weight" in tensors:  # every frame becomes two
            weight, bias = tensors[f"{head}.upsampler.weight"], tensors[f"{head}.upsampler.bias"]
            x = (torch.einsum("btd,dek->btke", x, weight) + bias).flatten(1, 2)
        shown.append(x @ tensors[f"{head}.lin_proj.weight"].T + tensors[f"{head}.lin_proj.bias"])
    return shown
