"""A GPU for machines without one: tensors that say they are on it, and compute on the CPU.

    python -m tests.pretend_gpu

An operation on tensors of two devices is an error, as on a GPU; autocast is CUDA's own; and every place where the host
would wait for the GPU is noted. What a GPU's kernels compute cannot be tested so, nor a backward pass: torch's engine
wants a real one. Torch keeps what is done here to the end of the process, so tests start one of their own.
"""

from __future__ import annotations

import json
import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.trial import TOLERANCE, Trial, recipe_names, worst
from tests.configs import TINY
from tests.helpers import ROOT
from wav2vec2 import prune, wav2vec2_model

GPU = torch.device("cuda:0")
aten = torch.ops.aten
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default,
         aten.unique_dim.default, aten._unique2.default}  # fmt: skip
OTHER_CTC = {aten._use_cudnn_ctc_loss.Tensor, aten._use_miopen_ctc_loss.Tensor}  # take labels of 32 bits, ours have 64
MOVES = {aten.copy_.default, aten._to_copy.default}


class OnGpu(torch.Tensor):
    """Says it is on the GPU; ``inner`` holds the numbers."""

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> OnGpu:
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=GPU,
        )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return PretendGpu.current.run(func, args, kwargs or {})

    def tolist(self) -> Any:
        PretendGpu.current.note("tolist")
        return self.inner.tolist()


class PretendGpu(TorchDispatchMode):
    """While it is entered there is a GPU. ``waits`` tells where the host has waited for it."""

    current: PretendGpu

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        PretendGpu.current = self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.run(func, args, kwargs or {})

    def note(self, what: object) -> None:
        """The line of ours that waits."""
        places = tuple(f"{ROOT}/{folder}/" for folder in ("wav2vec2", "distillation"))
        ours = [frame for frame in traceback.extract_stack() if frame.filename.startswith(places)]
        line = f"{ours[-1].filename.removeprefix(f'{ROOT}/')}: {ours[-1].line}" if ours else "outside"
        self.waits.append(f"{what} in {line}")

    def run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """One operation, as on a GPU if a tensor or the result is there.

        Raises:
            RuntimeError: tensors of two devices, of which that on the CPU is no scalar.
        """
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        there = [x for x in tensors if isinstance(x, OnGpu)]
        here = [x for x in tensors if not isinstance(x, OnGpu) and x.dim() > 0]
        place = kwargs.get("device")
        gives_gpu = bool(there) if place is None else torch.device(place).type == "cuda"
        if func in OTHER_CTC:
            return False
        if there and here and func not in MOVES and func is not aten.index.Tensor:
            raise RuntimeError(f"{func}: tensors on {GPU} and on the CPU, {[tuple(x.shape) for x in here]}")
        by_mask = func is aten.index.Tensor and any(x.dtype == torch.bool for x in there)
        blocking_copy = func in MOVES and bool(here) and gives_gpu and not kwargs.get("non_blocking")
        if blocking_copy or (there and (func in WAITS or by_mask or not gives_gpu)):
            self.note(func)
        if func is aten._softmax.default and args[2]:  # from half to float, which the CPU has not
            args = (_inner(args[0]).float(), args[1], False)
        kwargs = {key: torch.device("cpu") if key == "device" and value else value for key, value in kwargs.items()}
        result = func(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if not gives_gpu:
            return result
        known = {id(x.inner): x for x in there}  # an operation in place gives its argument
        return tree_map(lambda x: known.get(id(x), OnGpu(x)) if isinstance(x, Tensor) else x, result)


def _inner(x: Any) -> Any:
    return x.inner if isinstance(x, OnGpu) else x


def _attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, **more: Any) -> Tensor:
    """Torch would choose between a real GPU's kernels."""
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(~attn_mask, -math.inf)
    return aten._scaled_dot_product_attention_math(q, k, v, attn_mask, dropout_p, **more)[0]


def _tensor(data: Any, *, device: Any = None, usual: Any = torch.tensor, **more: Any) -> Tensor:
    """Torch would fill it on a real GPU."""
    return usual(data, **more).to(device or "cpu")


@contextmanager
def pretend_gpu() -> Iterator[PretendGpu]:
    """As if torch had found a GPU."""
    torch._C._ensureCUDADeviceGuardSet()
    torch.cuda._lazy_init = lambda: None  # type: ignore[assignment]
    torch.cuda.is_available = lambda: True  # type: ignore[assignment]
    torch.cuda.is_bf16_supported = lambda **_: True  # type: ignore[assignment]
    torch.__future__.set_swap_module_params_on_conversion(True)
    F.scaled_dot_product_attention = _attention
    torch.tensor = _tensor
    with PretendGpu() as gpu:
        yield gpu


def training() -> Iterator[dict[str, Any]]:
    """Of every method that ships: the loss on the CPU in float32 and on the GPU in each precision, and its waits."""
    torch.manual_seed(1)
    waveforms, methods = 0.1 * torch.randn(3, 9000), set()
    for name in recipe_names():
        trial = Trial.of(name, TINY)
        if trial.method in methods:
            continue
        methods.add(trial.method)
        expected = trial.loss(waveforms).item()
        with pretend_gpu() as gpu:
            there = waveforms.to("cuda", non_blocking=True)
            for precision in TOLERANCE:
                trial.again(precision, "cuda")
                gpu.waits.clear()
                loss = trial.loss(there)
                waits, found = list(gpu.waits), loss.item()
                del loss  # its graph holds the parameters, which are to move
                yield {"recipe": name, "precision": precision, "expected": expected, "found": found, "waits": waits}


@torch.no_grad()
def inference() -> Iterator[dict[str, Any]]:
    """Largest differences of what a model with masks, and what is left of it, gives in eval."""
    torch.manual_seed(0)
    waveforms, lengths = 0.1 * torch.randn(2, 9000), torch.tensor([9000, 7000])
    common = ("extractor_prune_conv_channels", "encoder_prune_feed_forward_intermediate")
    for heads in ("encoder_prune_attention_heads", "encoder_prune_attention_head_channels"):
        masked = wav2vec2_model(**TINY, **dict.fromkeys((*common, heads), True)).eval()
        for mask in masked.masks().values():
            mask.log_alpha.data.normal_(0, 2)
        for kind, model in (("masked", masked), ("pruned", prune(masked)[0])):
            rows = [waveforms[0], waveforms[1, :5000]]
            expected = [model.extract_features(waveforms, lengths)[0][-1], *model.embed(rows)]
            with pretend_gpu() as gpu:
                model.to("cuda")
                there, ends = waveforms.to("cuda"), lengths.to("cuda")
                gpu.waits.clear()
                found = [model.extract_features(there, ends)[0][-1]]
                waits = list(gpu.waits)
                found += model.embed(rows)
            differences = [(a - b.inner).abs().max().item() for a, b in zip(expected, found)]
            yield {"model": kind, "masks": heads, "difference": worst(differences), "waits": waits}


def mistakes() -> Iterator[str]:
    """What two tensors that do not meet give, and what is said of a wait."""
    with pretend_gpu() as gpu:
        there = torch.ones(2).to("cuda")
        try:
            there + torch.ones(2)
        except RuntimeError as error:
            yield str(error)
        gpu.waits.clear()
        there.sum().item()
        there[there > 0]
        yield from gpu.waits


if __name__ == "__main__":
    print(json.dumps({"training": list(training()), "inference": list(inference()), "mistakes": list(mistakes())}))
