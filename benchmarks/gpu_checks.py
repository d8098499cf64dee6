"""Whether everything runs on a GPU and gives there what it gives on the CPU, in under four minutes.

    python -m benchmarks.gpu_checks [--out benchmarks/results/gpu_checks.json] [--seconds 210]

Small models first, then of HuBERT Base's size, all with random weights: three updates of every recipe in float32,
bfloat16 and float16 against the CPU in float32; models in eval against what is left of them when they are pruned, and
rows in a padded batch against the rows alone; the stages as processes, one of them killed; a GPU without room. What
does not hold is told, and the exit code is 1. What there is no time for is named; --only runs it alone.
"""

from __future__ import annotations

import functools
import json
import logging
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.gpu_stages import Stages, Values
from benchmarks.steps import require_gpu
from benchmarks.trial import (
    GRADIENT,
    SIZES,
    SMALL,
    TOLERANCE,
    Size,
    Trial,
    drawn_on_the_cpu,
    random_teacher,
    recipe_names,
    worst,
)
from distillation.commandline import command_of
from distillation.config import RECIPES, parse_recipe
from distillation.errors import Incomplete, UserError
from distillation.sparsity import make_prunable
from evaluation.conditions import conditions
from wav2vec2 import Wav2Vec2Model, prune
from wav2vec2.checkpoint import write_text

UPDATES = 3
EVAL = 1e-4  # of a model's largest value: float32 in another order
# one of each kind first; of HuBERT Base's size there may be time for no more
KINDS = ["dphubert_base", "dphubert_plus", "dpwavlm_base_plus", "armhubert_960h", "fithubert", "starhubert",
         "dphubert_mask", "dpctc_base", "distilhubert"]  # fmt: skip
SHAPES = {"small": (3, 24_000), "base": (2, 32_000)}  # rows and samples


def noise(size: Size) -> Tensor:
    """Waveforms [B, N]."""
    return 0.1 * torch.randn(*SHAPES[size], generator=torch.Generator().manual_seed(0))


@functools.cache
def methods() -> dict[str, list[str]]:
    """All recipes by the first of those that train alike on the same teacher."""
    found: dict[str, list[str]] = {}
    for name in recipe_names():
        found.setdefault(Trial.of(name, SMALL).method, []).append(name)
    return {same[0]: same for same in found.values()}


def updates(name: str, size: Size, device: str) -> Values:
    """The first losses and gradients of a recipe in each precision, against the CPU in float32.

    Raises:
        AssertionError: one differs by more than the tolerance.
    """
    waveforms, trial, found = noise(size), Trial.of(name, SIZES[size]), {}
    with drawn_on_the_cpu():
        expected = trial.updates(waveforms, UPDATES)
        for precision in TOLERANCE:
            made = trial.again(precision, device).updates(waveforms.to(device), UPDATES)
            found[precision], found[f"its gradient, {precision}"] = expected.difference(made)
    limits = TOLERANCE | {f"its gradient, {precision}": limit for precision, limit in GRADIENT.items()}
    bad = {what: value for what, value in found.items() if not value <= limits[what]}
    assert not bad, f"updates differ from the CPU's, whose losses are {expected.losses}, by {bad}"
    return found


def inference(name: str, size: Size, device: str) -> Values:
    """A model with masks in eval: against the CPU, against what is left of it, and rows against rows alone.

    Args:
        name: of the recipe that says what gets masks.
        size: of the teacher.
        device: of the models.

    Raises:
        AssertionError: a difference, relative to the largest value, beyond EVAL.
    """
    recipe, _ = parse_recipe(["--config", str(RECIPES / f"{name}.yaml")])
    torch.manual_seed(0)
    model = make_prunable(random_teacher(recipe, SIZES[size]), recipe.pruning).eval()
    for mask in model.masks().values():
        mask.log_alpha.data.normal_(0, 2)
    waveforms = noise(size)
    lengths = torch.tensor([waveforms.shape[1] - 3000 * row for row in range(len(waveforms))])
    waveforms *= torch.arange(waveforms.shape[1]) < lengths[:, None]

    @torch.no_grad()
    def states(model: Wav2Vec2Model, place: str, rows: slice = slice(None)) -> list[Tensor]:
        given, ends = waveforms[rows].to(place), lengths[rows].to(place)
        layers, frames = model.to(place).extract_features(given[:, : int(ends.max())], ends)
        assert frames is not None
        return [layers[-1][row, :count].cpu() for row, count in enumerate(frames.tolist())]

    expected = states(model, "cpu")
    there = states(model, device)
    alone = [states(model, device, slice(row, row + 1))[0] for row in range(len(waveforms))]
    left = states(prune(model)[0].eval(), device)
    scale = max(state.abs().max().item() for state in expected)
    found = {
        what: worst((a - b).abs().max().item() for a, b in zip(one, other)) / scale
        for what, one, other in (
            ("from the CPU", expected, there), ("from the pruned model", there, left), ("from rows alone", there, alone)
        )
    }  # fmt: skip
    assert worst(found.values()) <= EVAL, f"outputs differ {found}"
    return found


def checks(stages: Stages, sizes: Sequence[Size], device: str) -> dict[str, Callable[[], Values]]:
    """All of them, by name, the most telling first."""
    firsts = {next((kind for kind in KINDS if kind in same), same[0]): same for same in methods().values()}
    others = [name for name in firsts if name not in KINDS]
    found: dict[str, Callable[[], Values]] = {}

    def of(size: Size, names: list[str]) -> None:
        for name in names:
            label = ", ".join([name, *(other for other in firsts[name] if other != name)])
            found[f"{size}: {label}"] = lambda name=name: updates(name, size, device)  # type: ignore[misc]

    for size in sizes:
        for name in ("dphubert_base", "dphubert_plus", "dpwavlm_base_plus"):
            found[f"{size}: {name}, eval"] = lambda name=name, size=size: inference(name, size, device)  # type: ignore[misc]
        of(size, [*KINDS, *others] if size == "small" else KINDS)
    found |= stages.checks() | (stages.checks_of_memory() if device == "cuda" else {})
    for size in sizes:
        of(size, others)
    return found


def attempt(check: Callable[[], Values]) -> Values:
    """What a check found, or ``error``, and its seconds."""
    begin = time.perf_counter()
    try:
        row: Values = {"found": check()}
    except Exception as error:
        said = str(error).splitlines() or [type(error).__name__]
        row = {"error": said[0], "traceback": traceback.format_exc()}
    return row | {"seconds": time.perf_counter() - begin}


def attempt_here(check: Callable[[], Values], device: str) -> Values:
    """:func:`attempt`, with the most memory of the GPU that this process took for it."""
    if device == "cpu":
        return attempt(check)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return attempt(check) | {"peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def attempted(
    todo: dict[str, Callable[[], Values]], beside: Collection[str], device: str, late: Callable[[], bool]
) -> Iterator[tuple[str, Values]]:
    """The checks in order, one by one, as they are made.

    Args:
        todo: by their names.
        beside: those which other processes do: one after another, while the others run.
        device: of the models.
        late: whether no more is begun.
    """
    pool = ThreadPoolExecutor(1)
    running = {name: pool.submit(attempt, check) for name, check in todo.items() if name in beside}
    try:
        for name, check in tqdm(todo.items(), unit="check", disable=None):
            if is_late := late():
                for one in running.values():
                    one.cancel()  # if it has not begun
            future = running.get(name)
            if is_late if future is None else future.cancelled():
                yield name, {"left_out": True}
            else:
                yield name, attempt_here(check, device) if future is None else future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def line(name: str, row: Values) -> str:
    """Of the log."""
    if "left_out" in row:
        return f"no time for {name}"
    values = {k: f"{v:.1e}" if isinstance(v, float) else v for k, v in row.get("found", {}).items()}
    text = row.get("error") or ", ".join(f"{key} {value}" for key, value in values.items())
    memory = f", {row['peak_gib']:.2f} GiB" if "peak_gib" in row else ""
    return f"{'FAILED' if 'error' in row else 'holds'}  {row['seconds']:5.1f} s  {name}: {text}{memory}"


def run(
    out: Path = Path("benchmarks/results/gpu_checks.json"),
    seconds: float = 210.0,
    device: Literal["cuda", "cpu"] = "cuda",
    size: Size = "base",
    only: str | None = None,
) -> None:
    """Check, print and write; OUT is written again after each check.

    Args:
        out: JSON file.
        seconds: no check is begun after so many.
        device: cuda; cpu compares the CPU with itself, to try the checks.
        size: of the largest models, small or base.
        only: the checks whose names hold this, e.g. "base: dphubert".

    Raises:
        Incomplete: something does not hold.
        UserError: there is no GPU, or no such check.
    """
    require_gpu(device)
    begin = time.perf_counter()
    result: Values = {"date": str(date.today()), **conditions(device=device), "checks": {}}
    with tempfile.TemporaryDirectory() as folder, exact_convolutions(), quiet():
        stages = Stages(Path(folder), device)
        todo = checks(stages, ["small"] if size == "small" else ["small", "base"], device)
        todo = {name: check for name, check in todo.items() if only is None or only in name}
        if not todo:
            raise UserError(f"--only {only}: no check has this in its name")
        try:
            for name, row in attempted(todo, stages.checks(), device, lambda: time.perf_counter() - begin > seconds):
                result["checks"][name] = row
                tqdm.write(line(name, row) + ("\n" + row["traceback"] if "error" in row else ""))
                write_text(out, json.dumps(result, indent=1) + "\n")
        finally:  # also when it is stopped
            rows, took = result["checks"], time.perf_counter() - begin
            failed = [name for name, row in rows.items() if "error" in row]
            left_out = sum("left_out" in row for row in rows.values()) + len(todo) - len(rows)
            print(f"{result['gpu'] or result['cpu']}, {took:.0f} s: {len(todo) - len(failed) - left_out} checks hold, "
                  f"{len(failed)} do not, {left_out} left out -> {out}")  # fmt: skip
    if failed:
        raise Incomplete(f"{len(failed)} of {len(rows)} checks do not hold: {', '.join(failed)}")


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing is told of every student that is built."""
    logger = logging.getLogger("distillation")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Torch lets convolutions round float32 to 10 bits of mantissa; runs in float32 do not."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


main = command_of(run, __doc__)

if __name__ == "__main__":
    main()
