"""A plan in numbers: data, updates, size, and memory and time from one measured update of each kind.

The models have random weights of the teacher's size, so nothing must be downloaded or converted first. Step 1 is
measured where it starts, with all units there, and where it ends, on a uniform slice of the final size, which is what
step 2 trains.

    python -m distillation.dry_run AUDIO_DIR [--adapt] --config conf/dphubert_base.yaml FLAGS...

takes what distillation.plan takes; nothing is written.
"""

from __future__ import annotations

import copy
import os
import resource
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from distillation.build import build_step, starting_student
from distillation.config import Recipe
from distillation.data.batching import select_utterances
from distillation.data.manifest import read_tsv
from distillation.data.preparation import survey
from distillation.errors import command
from distillation.optimisation import OptimConfig
from distillation.plan import Plan, read_words
from distillation.sparsity import PruningConfig, make_prunable
from distillation.students import StudentConfig, UniformSlice, build_student
from distillation.training.memory import TrialUpdates, runs_in_memory
from wav2vec2 import Wav2Vec2Model, wav2vec2_model
from wav2vec2.counting import count_params
from wav2vec2.feature_extractor import SAMPLE_RATE

GIB = 2**30
CPU_SECONDS = 20.0  # of audio that are measured on a CPU; longer micro-batches are multiples of it


@dataclass
class Measured:
    """A trial.

    Attributes:
        seconds: for one micro-batch of the recipe, with its share of an update.
        memory: bytes that training takes at most, everything included.
    """

    seconds: float
    memory: float


def print_plan(plan: Plan) -> None:
    """Measure and print; nothing is written."""
    recipe = plan.recipe
    assert plan.sizes is not None
    before, start, heads = plan.sizes
    pruning = recipe.pruning
    final = round((1 - pruning.target_sparsity) * before) if pruning.units else start
    hours, kept, conversion = _audio(plan)
    per_batch = _seconds_per_batch(recipe, kept)
    each = recipe.trainer.micro_batches(plan.world_size)
    first, last = measure(plan, final, kept, per_batch)
    name = "GPU" if recipe.trainer.accelerator == "gpu" else "CPU"

    rows = [
        ("teacher", f"{recipe.teacher_id or recipe.teacher_ckpt}, {before / 1e6:.2f} M parameters"),
        ("audio", f"{kept.sum() / 3600:.2f} h used of {hours:.2f} h in {recipe.data.train}{conversion}"),
        ("update", f"{recipe.trainer.batches_per_update} x {per_batch:.4g} s of audio, {each} on each of "
                   f"{plan.world_size} process(es), {name}, {recipe.trainer.precision}"),
    ]  # fmt: skip
    update_seconds = per_batch * recipe.trainer.batches_per_update
    for step, optim in (("step 1", recipe.optim), ("step 2", recipe.final if pruning.units else None)):
        if optim is None:
            continue
        resolved = optim.resolved(lambda epochs: max(1, round(epochs * kept.sum() / update_seconds)))
        text = f"{resolved.max_steps:,} updates, {_epochs(resolved.max_steps * update_seconds / kept.sum())} epochs"
        if first is not None and last is not None:
            ramp = min(pruning.warmup_steps, resolved.max_steps) if step == "step 1" and pruning.units else 0
            seconds = each * (ramp * (first.seconds + last.seconds) / 2 + (resolved.max_steps - ramp) * last.seconds)
            text += f", about {_duration(seconds)}"
        rows.append((step, text))
    if first is None or last is None:
        rows.append(("memory", f"micro-batches of {per_batch:.4g} s do not fit: FIT_BATCH=1 before the command"))
    else:
        room = (
            torch.cuda.mem_get_info()[1] if name == "GPU" else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        )
        rows.append(("memory", f"about {first.memory / GIB:.1f} of {room / GIB:.1f} GiB for each process"))
        rows.append(
            ("measured", f"a micro-batch takes {first.seconds:.3g} s at the start, {last.seconds:.3g} s at the end")
        )
    share = f", {final / before:.1%} of the teacher's" if pruning.units else ""
    rows.append(("result", f"{final / 1e6:.2f} M parameters{share}, {4 * (final + heads) / 1e6:.1f} MB with the heads"))
    rows.append(("folders", f"{recipe.data.tsv_dir} (lists), {recipe.teacher_ckpt} (teacher), {recipe.exp_dir} (run)"))
    print("\n".join(f"{label:<10}{text}" for label, text in rows))


def _audio(plan: Plan) -> tuple[float, np.ndarray, str]:
    """Hours of the training list, seconds of what is used of it, and what is to be converted first, in words."""
    data, conversion = plan.recipe.data, ""
    path = data.tsv_dir / data.train
    if path.is_file():
        manifest = read_tsv(path)
    else:
        found = survey(plan.audio)
        manifest = found.lists[data.train]
        if found.num_converted:
            conversion = f"; copies at 16 kHz first: {found.hours_converted:.2f} h in {found.gigabytes:.3f} GB"
        if found.num_foreign:
            conversion += f"; {found.num_foreign} files more by ffmpeg"
    kept = select_utterances(manifest, data).num_frames / SAMPLE_RATE
    return manifest.num_frames.sum() / SAMPLE_RATE / 3600, kept, conversion


def _seconds_per_batch(recipe: Recipe, kept: np.ndarray) -> float:
    """Seconds of audio in a micro-batch; in a small corpus at most all of it."""
    data = recipe.data
    if data.utterances_per_batch is not None:
        return float(data.utterances_per_batch * kept.mean())
    return float(min(data.seconds_per_batch, kept.sum()))


def _epochs(count: float) -> str:
    return f"{count:,.0f}" if count >= 10 else f"{count:.2g}"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def measure(plan: Plan, final: int, kept: np.ndarray, per_batch: float) -> tuple[Measured | None, Measured | None]:
    """A trial where step 1 starts, and one at the final size; None where the memory is too small.

    Args:
        plan: what will run.
        final: parameters of the result.
        kept: seconds of the utterances.
        per_batch: seconds of audio in a micro-batch.
    """
    recipe = plan.recipe
    assert plan.teacher is not None
    torch.manual_seed(0)
    teacher = wav2vec2_model(**copy.deepcopy(plan.teacher)).eval()
    teacher.mask_embedding = torch.zeros(teacher.embed_dim)
    students: list[tuple[Wav2Vec2Model, OptimConfig, PruningConfig | None]] = [
        (make_prunable(starting_student(recipe, teacher), recipe.pruning), recipe.optim, recipe.pruning)
    ]
    if recipe.pruning.units:
        small = build_student(StudentConfig(slice=UniformSlice(num_params=final)), teacher)
        students.append((small, recipe.final or recipe.optim, None))
    row = float(kept.mean())
    found = [
        _trial(recipe, student, optim, pruning, teacher, row, per_batch)
        for student, optim, pruning in tqdm(students, "measuring", unit="step", disable=None, leave=False)
    ]
    return found[0], found[-1]


def _trial(
    recipe: Recipe, student: Wav2Vec2Model, optim: OptimConfig, pruning: PruningConfig | None, teacher: Wav2Vec2Model,
    row: float, per_batch: float,
) -> Measured | None:  # fmt: skip
    """One update of a student on rows of so many seconds."""
    on_gpu = recipe.trainer.accelerator == "gpu"
    audio = per_batch if on_gpu else min(per_batch, max(CPU_SECONDS, row))
    step = build_step(recipe, optim.resolved(lambda epochs: 10**6), student, teacher, pruning)
    device = step.to("cuda:0" if on_gpu else "cpu")
    update = TrialUpdates(step, recipe.trainer.dtype, recipe.data)
    waveforms = 0.1 * torch.randn(max(1, int(audio / row)), int(row * SAMPLE_RATE), device=device)
    scale = per_batch / (waveforms.numel() / SAMPLE_RATE)
    kept = 12 * count_params(step.trained)  # gradients and the optimizer's two moments
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    before = _resident()
    if not on_gpu:
        update(waveforms)
    elif not runs_in_memory(lambda: update(waveforms)):
        return None
    peak = float(torch.cuda.max_memory_allocated()) if on_gpu else _peak()
    seconds = _timed(update, waveforms)
    if not on_gpu:  # what the step keeps for its backward pass grows with the audio
        peak = before + kept + max(0.0, peak - before - kept) * scale
    step.to("cpu")
    return Measured(seconds * scale, peak)


def _timed(update: TrialUpdates, waveforms: Tensor) -> float:
    if waveforms.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    update(waveforms)
    if waveforms.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _resident() -> float:
    """Bytes of memory that this process has now."""
    with open("/proc/self/statm", encoding="ascii") as file:  # noqa: PTH123
        return float(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _peak() -> float:
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)


@command
def main() -> None:
    """Print the plan for people."""
    print_plan(read_words(sys.argv[1:]))


if __name__ == "__main__":
    main()
