"""A plan in numbers: data, updates, size, and memory and time from one measured update of each kind.

The models have random weights of the teacher's size, so nothing must be downloaded or converted first. Step 1 is
measured where it starts, with all units there, and where it ends, on a uniform slice of the final size, which is what
step 2 trains.

    python -m distillation.dry_run AUDIO_DIR [--adapt] --config conf/dphubert_base.yaml FLAGS...

takes what distillation.plan takes; nothing is written.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from distillation.budget import Parameters
from distillation.build import build_step, planned_student, starting_student, with_stand_in
from distillation.config import Recipe, TrainerConfig
from distillation.data.batching import BatchStream, ValidationBatches, select_utterances
from distillation.data.manifest import read_tsv
from distillation.data.preparation import survey
from distillation.errors import UserError, command
from distillation.lists import read_lists
from distillation.optimisation import OptimConfig
from distillation.plan import Plan, read_words
from distillation.sparsity import PruningConfig, make_prunable
from distillation.students import uniform_slice
from distillation.training.memory import TrialUpdates, runs_in_memory
from wav2vec2 import Wav2Vec2Model, wav2vec2_model
from wav2vec2.counting import count_params
from wav2vec2.feature_extractor import SAMPLE_RATE

GIB = 2**30
TRIAL_SECONDS = 20.0  # of audio that are measured on a CPU; longer micro-batches are multiples of it
NO_ROOM = "not enough for micro-batches of {:.4g} s: FIT_BATCH=1 before the command finds smaller ones"


@dataclass
class Measured:
    """One update of one micro-batch.

    Attributes:
        seconds: that it takes.
        memory: bytes that the GPU's or this process's memory holds at most; of the first trial, the larger.
    """

    seconds: float
    memory: float


def print_plan(plan: Plan) -> None:
    """Measure and print; nothing is written."""
    recipe, trainer, pruning, budget = plan.recipe, plan.recipe.trainer, plan.recipe.pruning, plan.budget
    assert plan.sizes is not None
    before, start, heads = plan.sizes
    hours, kept, remarks = _audio(plan)
    per_batch = _seconds_per_batch(recipe, kept)
    each = trainer.micro_batches(plan.world_size)
    small, first, last = measure(plan, kept, per_batch)

    table = {
        "teacher": f"{recipe.teacher_id or recipe.teacher_ckpt}, {before / 1e6:.2f} M parameters",
        "audio": f"{kept.sum() / 3600:.2f} h used of {hours:.2f} h in {recipe.data.train}{remarks}",
        "update": f"{trainer.batches_per_update} x {per_batch:.4g} s of audio, {each} in each of {plan.world_size} "
        f"process(es), {trainer.accelerator.upper()}, {trainer.precision}",
    }
    update_seconds = per_batch * trainer.batches_per_update
    steps = {"step 1": (recipe.optim, pruning.warmup_steps), "step 2": (recipe.final, 0)}
    for name, (optim, ramp) in steps.items() if pruning.units else [("training", (recipe.optim, 0))]:
        if optim is None:
            continue
        updates = optim.resolved(lambda epochs: max(1, round(epochs * kept.sum() / update_seconds))).max_steps
        table[name] = f"{updates:,} updates, {_count(updates * update_seconds / kept.sum())} epochs"
        if first is not None and last is not None:
            ramp = min(ramp, updates)
            seconds = each * (ramp * (first.seconds + last.seconds) / 2 + (updates - ramp) * last.seconds)
            table[name] += f", about {_duration(seconds)}"
    table["memory"] = NO_ROOM.format(per_batch)
    if first is not None and last is not None:
        table["memory"] = f"about {first.memory / GIB:.1f} of {_room(trainer) / GIB:.1f} GiB for each process"
        ends = f" at the start, {last.seconds:.3g} s at the final size" if pruning.units else ""
        table["measured"] = f"a micro-batch takes {first.seconds:.3g} s{ends}"
    if budget is not None:
        table["budget"] = f"{budget.cost.text(budget.target)} of {budget.cost.text(budget.before)}"
    final: int | None = start
    about = ""
    if budget is not None and isinstance(budget.cost, Parameters):
        final = round(budget.target)
    elif budget is not None:
        final, about = None if small is None else count_params(small), "about "
    if final is not None:
        share = f", {final / before:.1%} of the teacher's" if pruning.units else ""
        megabytes = 4 * (final + heads) / 1e6
        table["result"] = f"{about}{final / 1e6:.2f} M parameters{share}, {megabytes:.1f} MB with the heads"
    table["folders"] = f"{recipe.data.tsv_dir} (lists), {recipe.teacher_ckpt} (teacher), {recipe.exp_dir} (run)"
    for name, text in table.items():
        print(f"{name:<10}{text}")


def _audio(plan: Plan) -> tuple[float, np.ndarray, str]:
    """Hours of the training list, seconds of what is used of it, and what is done first, in words.

    Raises:
        UserError: the lists give nothing to train on or to validate on, or utterances longer than a batch.
    """
    data, remarks = plan.recipe.data, ""
    if plan.transcripts and plan.has_lists:
        assert plan.teacher is not None
        start = starting_student(plan.recipe, wav2vec2_model(**copy.deepcopy(plan.teacher)))
        lists = read_lists(plan.recipe, start, None)
        manifest, validation = lists.train, lists.valid
    elif plan.has_lists:
        manifest, validation = map(read_tsv, plan.lists)
    else:
        found = survey(plan.audio)
        if plan.transcripts:  # recordings may be of many utterances, whose lengths are not known yet
            data = dataclasses.replace(data, transcripts=None, crop=True, long="split")
        manifest, validation = found.lists[data.train], found.lists[data.valid]
        if found.num_converted:
            remarks = f"; copies at 16 kHz first: {found.hours_converted:.2f} h in {found.gigabytes:.3f} GB"
        if found.num_foreign:
            remarks += f"; {found.num_foreign} files more by ffmpeg"
        if found.num_unreadable:
            remarks += f"; {found.num_unreadable} files cannot be read"
    selection = select_utterances(manifest, data)
    BatchStream(selection, data, seed=0)
    ValidationBatches(select_utterances(validation, data), data)
    return manifest.num_frames.sum() / SAMPLE_RATE / 3600, selection.num_frames / SAMPLE_RATE, remarks


def _seconds_per_batch(recipe: Recipe, kept: np.ndarray) -> float:
    """Seconds of audio in a micro-batch; in a small corpus at most all of it."""
    data = recipe.data
    if data.utterances_per_batch is not None:
        return float(data.utterances_per_batch * kept.mean())
    return float(min(data.seconds_per_batch, kept.sum()))


def _count(count: float) -> str:
    return f"{count:,.0f}" if count >= 10 else f"{count:.2g}"


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} s"


def measure(
    plan: Plan, kept: np.ndarray, per_batch: float
) -> tuple[Wav2Vec2Model | None, Measured | None, Measured | None]:
    """A trial where step 1 starts, and one at the final size; None where the memory is too small.

    Args:
        plan: what will run.
        kept: seconds of the utterances.
        per_batch: seconds of audio in a micro-batch.

    Returns:
        What is taken for the final model, a uniform slice that meets the budget, if there is one; the trials.
    """
    recipe, small = plan.recipe, None
    assert plan.teacher is not None
    torch.manual_seed(0)
    teacher = wav2vec2_model(**copy.deepcopy(plan.teacher)).eval()
    teacher.mask_embedding = torch.zeros(teacher.embed_dim)
    students: list[tuple[Wav2Vec2Model, OptimConfig, PruningConfig | None]] = [
        (make_prunable(planned_student(recipe, teacher), recipe.pruning), recipe.optim, recipe.pruning)
    ]
    if plan.budget is not None:
        with contextlib.suppress(UserError):  # smaller than any slice: what the start takes is then said of the end
            small = with_stand_in(recipe, uniform_slice(teacher, plan.budget.cost, plan.budget.target))
            students.append((small, recipe.final or recipe.optim, None))
    row = float(kept.mean())
    found = [
        _trial(recipe, student, optim, pruning, teacher, row, per_batch)
        for student, optim, pruning in tqdm(students, "measuring", unit="step", disable=None, leave=False)
    ]
    return small, found[0], found[-1]


def _trial(
    recipe: Recipe, student: Wav2Vec2Model, optim: OptimConfig, pruning: PruningConfig | None, teacher: Wav2Vec2Model,
    row: float, per_batch: float,
) -> Measured | None:  # fmt: skip
    """One update of a student on rows of so many seconds, after one that warms up and shows the memory."""
    on_gpu = recipe.trainer.accelerator == "gpu"
    step = build_step(recipe, optim.resolved(lambda epochs: 10**6), student, teacher, pruning)
    device = step.to("cuda:0" if on_gpu else "cpu")
    update = TrialUpdates(step, recipe.trainer.dtype, recipe.data)
    audio = per_batch if on_gpu else min(per_batch, max(TRIAL_SECONDS, row))
    waveforms = 0.1 * torch.randn(max(1, int(audio / row)), int(row * SAMPLE_RATE), device=device)
    scale = per_batch / (waveforms.numel() / SAMPLE_RATE)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        if not runs_in_memory(lambda: update(waveforms)):
            step.to("cpu")
            return None
        memory = float(torch.cuda.max_memory_allocated())
    else:
        fixed = _resident() + 12 * count_params(step.trained)  # with gradients and the optimizer's two moments
        update(waveforms)
        peak = 1024.0 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        memory = fixed + max(0.0, peak - fixed) * scale  # what is kept for the backward pass grows with the audio
    _synchronize(on_gpu)
    begin = time.perf_counter()
    update(waveforms)
    _synchronize(on_gpu)
    seconds = time.perf_counter() - begin
    step.to("cpu")
    return Measured(seconds * scale, memory)


def _synchronize(on_gpu: bool) -> None:
    if on_gpu:
        torch.cuda.synchronize()


def _resident() -> float:
    """Bytes of memory that this process has now."""
    return float(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _room(trainer: TrainerConfig) -> float:
    """Bytes of memory of the GPU or the machine."""
    if trainer.accelerator == "gpu":
        return float(torch.cuda.mem_get_info()[1])
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


@command
def main() -> None:
    """Print the plan for people."""
    print_plan(read_words(sys.argv[1:]))


if __name__ == "__main__":
    main()
