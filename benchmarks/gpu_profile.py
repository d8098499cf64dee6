"""Where one step of the published recipe goes on a GPU, and what would change that, in about a minute.

    python -m benchmarks.gpu_profile [--out benchmarks/results/gpu_profile.json]

At 70 % sparsity, in bfloat16: how many operations the host hands over, the kernels by the time that they take, how
long the GPU has nothing to do, the calls in which the host waits or allocates, what a step of new sizes costs beyond
one of the same sizes, and the step with one thing changed at a time. Then step 2, with sizes as they come and with
multiples of 8 at the same number of parameters. OUT is written again after each part; none is begun after SECONDS.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu import batch, check_effort, same_waveforms, varied
from benchmarks.steps import BF16, Operations, Ours, num_macs, set_sparsity
from benchmarks.trial import SIZES, Size, fitted
from distillation.commandline import command_of
from distillation.config import parse_recipe
from distillation.sparsity import make_prunable
from evaluation.conditions import conditions
from evaluation.tables import markdown_table
from evaluation.timing import in_turns
from wav2vec2 import Wav2Vec2Model, feature_extractor, hardconcrete, kernels, prune, wav2vec2_model
from wav2vec2.checkpoint import write_text
from wav2vec2.counting import count_params
from wav2vec2.kernels import usual_forms
from wav2vec2.pruning import survivors_for_size

SPARSITY = 0.7
STEPS = 3  # that are profiled
SHOWN = 15  # kernels
LAUNCHES = ("cudaLaunch", "cuLaunch")  # calls of the driver that only hand over work
Part = dict[str, Any]


@contextlib.contextmanager
def blas(library: str) -> Iterator[None]:
    """Torch's matrix products on a GPU go through another library for a while."""
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library(library)
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


def conv1d_by_products(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """`wav2vec2.kernels.conv1d` without cuDNN, which plans for each new shape.

    The taps that lie within one stride are next to each other in memory, so that they are one matrix product.
    """
    num_frames = (x.shape[1] - weight.shape[-1]) // stride + 1
    result: Tensor | None = None
    for first in range(0, weight.shape[-1], stride):
        taps = weight[..., first : first + stride]  # [C_out, C_in, n]
        windows = x[:, first:].unfold(1, taps.shape[-1], stride)[:, :num_frames]
        rows = windows.transpose(2, 3).flatten(2)  # [B, T', n C_in], a view
        matrix = taps.permute(2, 1, 0).flatten(0, 1).expand(len(x), -1, -1)
        result = torch.bmm(rows, matrix) if result is None else torch.baddbmm(result, rows, matrix)
    assert result is not None
    return result if bias is None else result + bias.to(result.dtype)


# what is changed, one at a time
CHANGES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "as it is": nullcontext,
    "convolutions as matrix products": lambda: patch.object(feature_extractor, "conv1d", conv1d_by_products),
    "convolutions with the channels first": lambda: usual_forms(["channels_last"]),
    "first norm apart from its convolution": lambda: usual_forms(["folded_norm"]),
    "attention by cuDNN": lambda: patch.object(kernels, "_without_cudnn_attention", nullcontext),
    "live units not rounded up": lambda: patch.object(hardconcrete, "GPU_MULTIPLE", 1),
    "live units in multiples of 16": lambda: patch.object(hardconcrete, "GPU_MULTIPLE", 16),
    "live units in multiples of 64": lambda: patch.object(hardconcrete, "GPU_MULTIPLE", 64),
    "matrix products by cuBLASLt": lambda: blas("cublaslt"),
}


def seeded(step: Callable[[], object]) -> Callable[[], object]:
    """The step with the same gates every time."""

    def run() -> None:
        torch.manual_seed(0)
        step()

    return run


def operations(ours: Ours) -> Part:
    """How many a step takes: the penalty alone, forth and back, is a part of all."""
    training, found = ours.training, {}
    assert training.lagrangian is not None

    def update() -> None:
        training.clip(ours.optimizer)
        ours.optimizer.step()

    with Operations() as counted:
        training.lagrangian(training.lagrangian.cost(training.student), 0).backward()
    found["expected size"] = counted.count
    ours.optimizer.zero_grad(set_to_none=True)
    with Operations() as counted:
        loss = ours.forward(BF16)
    found["forward"] = counted.count
    for what, run in (("backward", loss.backward), ("update", update)):
        with Operations() as counted:
            run()
        found[what] = counted.count
    ours.optimizer.zero_grad(set_to_none=True)
    return found


def profiled(step: Callable[[], object], device: str) -> Part:
    """The kernels of a step, and where its host is."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]

    def several() -> None:
        for _ in range(STEPS):
            step()
        if device == "cuda":
            torch.cuda.synchronize()

    several()
    begin = time.perf_counter()
    several()
    seconds = (time.perf_counter() - begin) / STEPS
    with profile(activities=activities) as found:
        several()
    events = [event for event in found.key_averages() if not event.is_user_annotation]
    if device == "cuda":
        times = {e.key: (e.count, e.self_device_time_total) for e in events if e.device_type == DeviceType.CUDA}
    else:
        times = {e.key: (e.count, e.self_cpu_time_total) for e in events}
    calls = {
        e.key: (e.count, e.self_cpu_time_total) for e in events
        if e.key.startswith("cu") and not e.key.startswith(LAUNCHES) and e.device_type == DeviceType.CPU
    }  # fmt: skip
    total = sum(spent for _, spent in times.values())
    return {
        "seconds": seconds,
        "busy": total / 1e6 / STEPS / seconds,
        "launches": sum(e.count for e in events if e.key.startswith(LAUNCHES)) / STEPS,
        "kernels": rows(times, total),
        "calls": rows(calls, sum(spent for _, spent in calls.values())),
    }


def rows(times: dict[str, tuple[int, float]], total: float) -> list[Part]:
    """The longest, per step: how often, milliseconds, and the share of all."""
    longest = sorted(times.items(), key=lambda item: -item[1][1])[:SHOWN]
    return [
        {"name": name, "count": count / STEPS, "ms": spent / 1e3 / STEPS, "share": spent / total if total else 0.0}
        for name, (count, spent) in longest
    ]


def changed(ours: Ours, step: Callable[[], object], rounds: int, device: str) -> Part:
    """Seconds of the step with each of CHANGES."""
    found: dict[str, Callable[[], object]] = {}
    for name, change in CHANGES.items():

        def run(change: Callable[[], AbstractContextManager[Any]] = change) -> None:
            with change():
                step()

        found[name] = run
    if device != "cuda":
        del found["matrix products by cuBLASLt"]
    return dict(in_turns(found, rounds, "changes"))


def second_step(masked: Wav2Vec2Model, teacher: Wav2Vec2Model, ours: Ours, rounds: int, turns: Iterator[int]) -> Part:
    """Step 2 of models of one number of parameters, whose conv channels and FFN units come one by one or by eight."""
    budget = round((1 - SPARSITY) * count_params(teacher))
    steps: dict[int, Callable[[], object]] = {}
    sizes: dict[int, Part] = {}
    waveforms = ours.waveforms
    for multiple in (1, 8):
        student = prune(masked, survivors_for_size(masked, budget, multiple))[0].to(waveforms.device)
        sizes[multiple] = {"parameters": count_params(student), "macs": num_macs(student, waveforms)}
        second = Ours(student, teacher, waveforms, ours.objective)
        steps[multiple] = varied(second, waveforms, lambda second=second: second.step(BF16), turns)
    times = in_turns(steps, rounds, "step 2")
    names = {1: "sizes as they come", 8: "multiples of 8"}
    return {names[multiple]: {**sizes[multiple], "seconds": times[multiple]} for multiple in steps}


def run(
    out: Path = Path("benchmarks/results/gpu_profile.json"),
    seconds: float = 100.0,
    batch_seconds: float = 160.0,
    rounds: int = 5,
    device: Literal["cuda", "cpu"] = "cuda",
    size: Size = "base",
) -> None:
    """Measure, print and write.

    Args:
        out: JSON file.
        seconds: no part is begun after so many.
        batch_seconds: of audio per step.
        rounds: timed steps of each variant.
        device: cuda; cpu tries the parts without one.
        size: of the models, small or base.

    Raises:
        UserError: there is no GPU, or nothing to measure.
    """
    check_effort(device, batch_seconds, rounds)
    begin = time.perf_counter()
    torch.manual_seed(0)
    recipe, _ = parse_recipe(fitted("dphubert_base", SIZES[size]))
    teacher = wav2vec2_model(**SIZES[size]).eval().to(device)
    masked = make_prunable(teacher, recipe.pruning).to(device)
    set_sparsity(masked, SPARSITY)
    waveforms = batch(batch_seconds, device)
    ours = Ours(masked, teacher, waveforms, recipe.objective)
    turns = itertools.count()
    step = varied(ours, waveforms, lambda: ours.step(BF16), turns)
    same = seeded(same_waveforms(ours, waveforms, lambda: ours.step(BF16)))
    parts: dict[str, Callable[[], Part]] = {
        "operations": lambda: operations(ours),
        "profile": lambda: profiled(step, device),
        "sizes": lambda: dict(in_turns({"new in every step": step, "the same in every step": same}, rounds, "sizes")),
        "changes": lambda: changed(ours, step, rounds, device),
        "step 2": lambda: second_step(masked, teacher, ours, rounds, turns),
    }
    result: Part = {"date": str(date.today()), **conditions(device=device, batch_seconds=batch_seconds, rounds=rounds)}
    for name, part in parts.items():
        late = time.perf_counter() - begin > seconds
        result[name] = None if late else part()
        print(f"no time for: {name}" if late else text(name, result[name]))
        write_text(out, json.dumps(result, indent=1) + "\n")
    print(f"{result['gpu'] or result['cpu']}, {time.perf_counter() - begin:.0f} s -> {out}")


def text(name: str, part: Part) -> str:
    """A part as a page shows it."""
    if name == "profile":
        head = (f"{part['seconds']:.4f} s a step, {part['launches']:.0f} launches; "
                f"the device works {part['busy']:.0%} of it")  # fmt: skip
        return "\n\n".join([head, *(_table(what, part[what]) for what in ("kernels", "calls") if part[what])])
    if name == "step 2":
        table = [[key, f"{row['parameters']:,}", f"{row['macs'] / 1e9:.1f}", f"{row['seconds']:.4f}",
                  f"{row['seconds'] / row['macs'] * 1e12:.3f}"] for key, row in part.items()]  # fmt: skip
        return markdown_table(["step 2", "parameters", "GMACs", "s a step", "ms per GMAC"], table)
    if name == "operations":
        return markdown_table([name, "a step"], [[key, f"{count:,}"] for key, count in part.items()])
    first = next(iter(part.values()))
    table = [[key, f"{seconds:.4f}", f"{seconds / first:.3f}"] for key, seconds in part.items()]
    return markdown_table([name, "s a step", "of the first"], table)


def _table(what: str, found: list[Part]) -> str:
    table = [[row["name"][:70], f"{row['count']:.1f}", f"{row['ms']:.3f}", f"{row['share']:.1%}"] for row in found]
    return markdown_table([what, "a step", "ms", "of all"], table)


main = command_of(run, __doc__)

if __name__ == "__main__":
    main()
