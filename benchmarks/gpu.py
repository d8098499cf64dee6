"""What the published recipe costs on one GPU, in under nine minutes.

    python -m benchmarks.gpu [--out benchmarks/results/gpu.json]

Measures in bfloat16, beside the dense step on torchaudio's own HuBERT on the same card: the published batch of 160 s at
several sparsities, the largest batch that fits, what a step takes of the memory beside weights and optimizers, the
share of the measured matrix multiplication peak, and how many seconds of audio per second the loader gives. From these:
GPU-hours of both steps of the recipe, whose update is 4 x 160 s, against the paper's 18 + 6 hours of A100. As in
training, each step has another number of frames: kernels that plan for a shape pay for it here as there. Stopped and
run again, it goes on after the last point.
"""

import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import soundfile
import torch
import torchaudio

from benchmarks.steps import BF16, Ours, Peer, Step, autocast, matmul_peak, num_macs, set_sparsity
from benchmarks.trial import SIZES, Size, fitted
from distillation.commandline import command_of
from distillation.config import parse_recipe
from distillation.data.config import DataConfig
from distillation.data.loaders import Place, make_train_loader
from distillation.data.manifest import read_tsv
from distillation.errors import UserError
from distillation.journal import Journal
from distillation.sparsity import make_prunable
from distillation.stopping import keeping
from distillation.training.memory import largest_batch, runs_in_memory
from distillation.training.processes import outlive_stop_signal
from evaluation.conditions import conditions
from evaluation.timing import in_turns
from wav2vec2 import prune, wav2vec2_model
from wav2vec2.architecture import HUBERT_BASE
from wav2vec2.checkpoint import write_text
from wav2vec2.feature_extractor import SAMPLE_RATE

SPARSITIES = [0.0, 0.25, 0.5, 0.75]
UPDATE_SECONDS = 640.0  # 4 GPUs x 160 s, as published
STEP1, STEP2, WARMUP = 50_000, 25_000, 5_000  # updates, and those in which the target rises
PAPER_HOURS = (18.0, 6.0)
MOST_UTTERANCES = 256  # in the search for the largest batch
UTTERANCE = 15.0  # seconds; LibriSpeech's mode
FRAME, FRAMES_CUT = 320, 8  # samples; 1 % of an utterance at most


@dataclass
class Point:
    """One timed step."""

    what: str
    batch_seconds: float
    seconds: float
    peak_gib: float | None
    share_of_peak: float

    @property
    def audio_per_second(self) -> float:
        """Seconds of audio per second."""
        return self.batch_seconds / self.seconds


def varied(model: Ours | Peer, waveforms: torch.Tensor, step: Callable[[], object]) -> Callable[[], object]:
    """The step of a model on these waveforms [B, N], cut by another few frames each time."""
    turns = itertools.cycle(range(FRAMES_CUT))

    def run() -> None:
        model.waveforms = waveforms[:, : waveforms.shape[1] - FRAME * next(turns)].contiguous()
        step()

    return run


def same_waveforms(model: Ours | Peer, waveforms: torch.Tensor, step: Callable[[], object]) -> Callable[[], object]:
    """The step of a model on these waveforms [B, N], always the same."""

    def run() -> None:
        model.waveforms = waveforms
        step()

    return run


def step_memory(step: Callable[[], object]) -> float:
    """GiB that a step takes at most, above what was there before: weights and optimizers of all models measured."""
    step()  # makes the optimizer's state
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def batch(seconds: float, device: str) -> torch.Tensor:
    """As many utterances of 15 s as fill so many seconds, nothing padded."""
    count = max(1, round(seconds / UTTERANCE))
    return torch.randn(count, round(seconds / count * SAMPLE_RATE), device=device)


def loader_rate(folder: Path, seconds: float) -> float:
    """Seconds of audio per second that the training loader reads from FLAC files, for about so many seconds."""
    rng = np.random.default_rng(0)
    lines = [str(folder)]
    for i in range(40):
        noise = rng.normal(0, 0.1, round(UTTERANCE * SAMPLE_RATE)).clip(-1, 1)
        soundfile.write(folder / f"{i}.flac", noise, SAMPLE_RATE)
        lines.append(f"{i}.flac\t{len(noise)}")
    (folder / "train.tsv").write_text("\n".join(lines) + "\n")
    config = DataConfig(tsv_dir=folder, train="train.tsv", valid="train.tsv")
    place = Place(worker_init_fn=outlive_stop_signal)
    loader = iter(make_train_loader(read_tsv(folder / "train.tsv"), config, seed=0, place=place))
    for _ in range(3):
        next(loader)
    begin, read = time.perf_counter(), 0.0
    while time.perf_counter() - begin < seconds:
        read += float(next(loader).seconds)
    return read / (time.perf_counter() - begin)


def hours(points: dict[float, float]) -> float:
    """GPU-hours of step 1 from seconds of audio per second by sparsity, which follows its published target."""
    sparsities, rates = zip(*sorted(points.items()))
    target = sparsities[-1]
    ramp = [1 / float(np.interp(target * i / 100, sparsities, rates)) for i in range(101)]
    cost = WARMUP * statistics.mean(ramp) + (STEP1 - WARMUP) / rates[-1]
    return UPDATE_SECONDS * cost / 3600


def measure(config: dict[str, Any], device: str, batch_seconds: float, rounds: int, known: Journal) -> dict[str, Any]:
    """All but the loader, what is not known; the keys of the result are those of gpu.json."""
    if "matmul peak" not in known:
        known["matmul peak"] = matmul_peak(BF16, 8192 if device == "cuda" else 256, device)
    peak = known["matmul peak"]
    teacher = wav2vec2_model(**config).eval().to(device)
    recipe, _ = parse_recipe(fitted("dphubert_base", config))
    waveforms = batch(batch_seconds, device)
    points: list[Point] = []

    def timed(
        what: str, steps: dict[str, Callable[[], object]], macs: dict[str, float], seconds: float
    ) -> dict[str, float]:
        if what not in known:
            peaks = {name: step_memory(step) if device == "cuda" else None for name, step in steps.items()}
            found = in_turns(steps, rounds, what)
            known[what] = {
                name: vars(Point(f"{what}, {name}", seconds, elapsed, peaks[name], macs[name] / elapsed / peak))
                for name, elapsed in found.items()
            }
        rows = {name: Point(**point) for name, point in known[what].items()}
        points.extend(rows.values())
        return {name: point.seconds for name, point in rows.items()}

    masked = make_prunable(teacher, recipe.pruning).to(device)
    ours = Ours(masked, teacher, waveforms, recipe.objective)
    dense = None
    if config is HUBERT_BASE:
        dense = Peer(torchaudio.models.hubert_base().to(device), torchaudio.models.hubert_base().to(device), waveforms)

    def dense_step() -> None:
        assert dense is not None
        with autocast(BF16, device):
            loss = dense.forward()
        dense.finish(loss)

    rates: dict[float, float] = {}
    ratios: dict[str, float] = {}
    full = num_macs(teacher, waveforms)
    for sparsity in SPARSITIES:
        set_sparsity(masked, sparsity)
        steps: dict[str, Step] = {"ours": varied(ours, waveforms, lambda: ours.step(BF16))}
        macs = {
            "ours": full + 3 * num_macs(prune(masked)[0], waveforms),
            "dense": 4 * full,
            "dense, new sizes": 4 * full,
        }
        if dense is not None:
            # its best case, and as in training: cuDNN's attention, torch's first choice on some GPUs, plans for a shape
            steps["dense"] = same_waveforms(dense, waveforms, dense_step)
            steps["dense, new sizes"] = varied(dense, waveforms, dense_step)
        found = timed(f"step 1, {sparsity:.0%} pruned", steps, macs, batch_seconds)
        rates[sparsity] = batch_seconds / found["ours"]
        if dense is not None:
            ratios[f"step 1, {sparsity:.0%}"] = found["dense"] / found["ours"]
    dense, steps = None, {}  # frees the dense student
    pruned = prune(masked)[0].to(device)
    second = Ours(pruned, teacher, waveforms, recipe.objective)
    macs = {"ours": full + 3 * num_macs(pruned, waveforms)}
    found = timed("step 2", {"ours": varied(second, waveforms, lambda: second.step(BF16))}, macs, batch_seconds)
    hours1, hours2 = hours(rates), UPDATE_SECONDS * STEP2 / (batch_seconds / found["ours"]) / 3600

    def step_of(count: int) -> None:
        try:
            ours.waveforms = torch.randn(count, round(UTTERANCE * SAMPLE_RATE), device=device)
            ours.step(BF16)
        finally:
            ours.optimizer.zero_grad(set_to_none=True)

    def fill() -> dict[str, Any]:
        set_sparsity(masked, 0.0)
        if "largest batch" not in known:
            most = MOST_UTTERANCES if device == "cuda" else 2
            known["largest batch"] = largest_batch(lambda count: runs_in_memory(lambda: step_of(count)), most)
        count = max(1, known["largest batch"] * 9 // 10)
        waveforms, seconds = torch.randn(count, round(UTTERANCE * SAMPLE_RATE), device=device), count * UTTERANCE
        largest: dict[float, float] = {}
        for sparsity in (SPARSITIES[0], SPARSITIES[-1]):
            set_sparsity(masked, sparsity)
            macs = {"ours": num_macs(teacher, waveforms) + 3 * num_macs(prune(masked)[0], waveforms)}
            steps = {"ours": varied(ours, waveforms, lambda: ours.step(BF16))}
            found = timed(f"largest batch, {sparsity:.0%} pruned", steps, macs, seconds)
            largest[sparsity] = seconds / found["ours"]
        return {
            "largest_batch_seconds": known["largest batch"] * UTTERANCE,
            "hours_step1_largest_batch": hours(largest),
        }

    try:
        result = fill()
    except RuntimeError as error:  # tensors of over 2^31 elements: what is measured by now is not lost for it
        result = {"largest_batch_seconds": None, "largest_batch_error": str(error).partition("\n")[0]}
    return result | {
        "peak_tflops_bf16": 2 * peak / 1e12,
        "points": [{**vars(point), "audio_per_second": point.audio_per_second} for point in points],
        "dense_over_ours": ratios,
        "hours": {"step 1": hours1, "step 2": hours2, "paper, A100": PAPER_HOURS},
    }


def run(
    out: Path = Path("benchmarks/results/gpu.json"),
    batch_seconds: float = 160.0,
    rounds: int = 5,
    device: Literal["cuda", "cpu"] = "cuda",
    size: Size = "base",
) -> None:
    """Measure, print and write.

    What is measured is kept, point by point, beside OUT until all is there.

    Args:
        out: JSON file.
        batch_seconds: of audio per step.
        rounds: timed steps of each variant.
        device: cuda; cpu takes hours at the published size.
        size: of the models, small or base; torchaudio's dense step is measured beside base alone.

    Raises:
        Stopped: a signal asked for it.
        UserError: there is no GPU.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU is visible; this measures one (benchmarks.speed measures the CPU)")
    begin = time.perf_counter()
    torch.manual_seed(0)
    of = conditions(device=device, batch_seconds=batch_seconds, rounds=rounds, size=size)
    known = Journal(out.with_name(f".{out.stem}.jsonl"), of, "points")
    with keeping(f"the points measured so far are in {known.path}"), tempfile.TemporaryDirectory() as folder:
        result = measure(SIZES[size], device, batch_seconds, rounds, known)
        result["loader_audio_per_second"] = loader_rate(Path(folder), 10.0)
    result |= {"date": str(date.today()), **of}
    for point in result["points"]:
        memory = "" if point["peak_gib"] is None else f", {point['peak_gib']:.1f} GiB"
        print(f"{point['what']}: {point['seconds']:.3f} s for {point['batch_seconds']:g} s of audio, "
              f"{point['share_of_peak']:.0%} of the peak{memory}")  # fmt: skip
    for what, ratio in result["dense_over_ours"].items():
        print(f"{what} pruned: {ratio:.2f} x as fast as the dense step")
    if "largest_batch_error" in result:
        print(f"the largest batch was not found: {result['largest_batch_error']}")
    print(f"GPU-hours: {result['hours']}; largest batch {result['largest_batch_seconds']} s; the loader gives "
          f"{result['loader_audio_per_second']:.0f} s of audio per second")  # fmt: skip
    write_text(out, json.dumps(result, indent=1) + "\n")
    known.remove()
    print(f"{of['gpu'] or of['cpu']}, {time.perf_counter() - begin:.0f} s -> {out}")


main = command_of(run, __doc__)

if __name__ == "__main__":
    main()
