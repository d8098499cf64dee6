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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torchaudio

from benchmarks.steps import BF16, Ours, Peer, Step, autocast, matmul_peak, num_macs, require_gpu, set_sparsity
from benchmarks.trial import SIZES, Size, fitted, write_noise
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
from evaluation.tables import markdown_table
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
SHORTEST = 1.0  # seconds of audio per step
UTTERANCE = 15.0  # seconds; LibriSpeech's mode
FRAME = 320  # samples


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


def varied(
    model: Ours | Peer, waveforms: torch.Tensor, step: Callable[[], object], turns: Iterator[int]
) -> Callable[[], object]:
    """The step of a model on these waveforms [B, N], each time with a number of frames that it has not had.

    A frame more, one less, two more, two less, ... than they have; kernels keep what they have planned for a size.

    Args:
        model: of the step.
        waveforms: [B, N].
        step: to run.
        turns: 0, 1, ..., going on over all steps of a process.
    """
    num_samples = waveforms.shape[1]

    def run() -> None:
        turn = next(turns)
        change = FRAME * (turn // 2 + 1) * (1 if turn % 2 == 0 else -1)
        longer = torch.cat([waveforms, waveforms], dim=1)
        model.waveforms = longer[:, : max(num_samples + change, num_samples // 2)].contiguous()
        step()

    return run


def check_effort(device: str, batch_seconds: float, rounds: int) -> None:
    """Look whether there is something to measure, and something to measure it on.

    Raises:
        UserError: there is not.
    """
    require_gpu(device)
    if rounds < 1:
        raise UserError(f"--rounds is {rounds}: it must be at least 1")
    if not batch_seconds >= SHORTEST:
        raise UserError(f"--batch_seconds is {batch_seconds:g}: it must be at least {SHORTEST:g}")


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


def utterances(count: int, device: str) -> torch.Tensor:
    """So many of 15 s."""
    return batch(count * UTTERANCE, device)


def loader_rate(seconds: float) -> float:
    """Seconds of audio per second that the training loader reads from FLAC files, for about so many seconds."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_noise(folder, folder / "train.tsv", [UTTERANCE] * 40)
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


class Costs:
    """The steps of the recipe on one device; what is known is not measured again.

    Args:
        config: flat config of the teacher.
        device: cuda, or cpu to try it.
        batch_seconds: of audio per step.
        rounds: timed steps of each variant.
        known: points that are measured already; gets the others.
    """

    def __init__(self, config: dict[str, Any], device: str, batch_seconds: float, rounds: int, known: Journal) -> None:
        self.device, self.batch_seconds, self.rounds, self.known = device, batch_seconds, rounds, known
        if "matmul peak" not in known:
            known["matmul peak"] = matmul_peak(BF16, 8192 if device == "cuda" else 256, device)
        self.peak: float = known["matmul peak"]
        recipe, _ = parse_recipe(fitted("dphubert_base", config))
        self.teacher = wav2vec2_model(**config).eval().to(device)
        self.masked = make_prunable(self.teacher, recipe.pruning).to(device)
        self.waveforms = batch(batch_seconds, device)
        self.full = num_macs(self.teacher, self.waveforms)
        self.ours = Ours(self.masked, self.teacher, self.waveforms, recipe.objective)
        self.has_peer = config is HUBERT_BASE
        self.points: list[Point] = []
        self.turns, self.peer_turns = itertools.count(), itertools.count()

    def timed(self, what: str, steps: dict[str, Step], macs: float, seconds: float) -> dict[str, float]:
        """Seconds of each variant of a step.

        Args:
            what: of all of them.
            steps: by their names; all but "ours" have the MACs of the dense step.
            macs: of ours.
            seconds: of audio.
        """
        if what not in self.known:
            peaks = {name: step_memory(step) if self.device == "cuda" else None for name, step in steps.items()}
            found = in_turns(steps, self.rounds, what)
            work = {name: macs if name == "ours" else 4 * self.full for name in steps}
            self.known[what] = {
                name: vars(Point(f"{what}, {name}", seconds, elapsed, peaks[name], work[name] / elapsed / self.peak))
                for name, elapsed in found.items()
            }
        rows = {name: Point(**point) for name, point in self.known[what].items()}
        self.points.extend(rows.values())
        return {name: point.seconds for name, point in rows.items()}

    def step_1(self) -> tuple[float, dict[str, float]]:
        """GPU-hours, and by sparsity how many times as long the dense step takes."""
        dense = self._dense() if self.has_peer else {}
        rates: dict[float, float] = {}
        ratios: dict[str, float] = {}
        for sparsity in SPARSITIES:
            set_sparsity(self.masked, sparsity)
            macs = self.full + 3 * num_macs(prune(self.masked)[0], self.waveforms)
            step = varied(self.ours, self.waveforms, lambda: self.ours.step(BF16), self.turns)
            steps: dict[str, Step] = {"ours": step, **dense}
            found = self.timed(f"step 1, {sparsity:.0%} pruned", steps, macs, self.batch_seconds)
            rates[sparsity] = self.batch_seconds / found["ours"]
            ratios |= {f"step 1, {sparsity:.0%}, {name}": found[name] / found["ours"] for name in dense}
        return hours(rates), ratios

    def _dense(self) -> dict[str, Step]:
        """The same on torchaudio's models in its best case, and as in training: what plans for a shape pays for it."""
        models = [torchaudio.models.hubert_base().to(self.device) for _ in range(2)]
        peer = Peer(models[0], models[1], self.waveforms)

        def step() -> None:
            with autocast(BF16, self.device):
                loss = peer.forward()
            peer.finish(loss)

        return {
            "dense": same_waveforms(peer, self.waveforms, step),
            "dense, new sizes": varied(peer, self.waveforms, step, self.peer_turns),
        }

    def step_2(self) -> float:
        """GPU-hours, on what the last sparsity of step 1 leaves."""
        pruned = prune(self.masked)[0].to(self.device)
        second = Ours(pruned, self.teacher, self.waveforms, self.ours.objective)
        macs = self.full + 3 * num_macs(pruned, self.waveforms)
        step = varied(second, self.waveforms, lambda: second.step(BF16), self.turns)
        seconds = self.timed("step 2", {"ours": step}, macs, self.batch_seconds)["ours"]
        return UPDATE_SECONDS * STEP2 / (self.batch_seconds / seconds) / 3600

    def largest(self) -> dict[str, Any]:
        """The largest batch that fits while all units are there, and GPU-hours of step 1 with nine tenths of it."""
        set_sparsity(self.masked, 0.0)
        if "largest batch" not in self.known:
            most = MOST_UTTERANCES if self.device == "cuda" else 2
            self.known["largest batch"] = largest_batch(lambda count: runs_in_memory(lambda: self._try(count)), most)
        count = max(1, self.known["largest batch"] * 9 // 10)
        waveforms, seconds = utterances(count, self.device), count * UTTERANCE
        rates: dict[float, float] = {}
        for sparsity in (SPARSITIES[0], SPARSITIES[-1]):
            set_sparsity(self.masked, sparsity)
            macs = num_macs(self.teacher, waveforms) + 3 * num_macs(prune(self.masked)[0], waveforms)
            step = varied(self.ours, waveforms, lambda: self.ours.step(BF16), self.turns)
            rates[sparsity] = (
                seconds / self.timed(f"largest batch, {sparsity:.0%} pruned", {"ours": step}, macs, seconds)["ours"]
            )
        return {"seconds": self.known["largest batch"] * UTTERANCE, "hours of step 1": hours(rates)}

    def _try(self, count: int) -> None:
        try:
            self.ours.waveforms = utterances(count, self.device)
            self.ours.step(BF16)
        finally:
            self.ours.optimizer.zero_grad(set_to_none=True)


def measure(
    config: dict[str, Any],
    device: str,
    batch_seconds: float,
    rounds: int,
    known: Journal,
    late: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """All that gpu.json holds of the measurement.

    Args:
        config: as of :class:`Costs`, as are the next.
        device: of the models.
        batch_seconds: of audio per step.
        rounds: timed steps of each variant.
        known: points that are measured already; gets the others.
        late: whether there is no time for another part; those after step 1 are then None.
    """
    costs = Costs(config, device, batch_seconds, rounds, known)
    hours_1, ratios = costs.step_1()
    result: dict[str, Any] = {
        "peak_tflops_bf16": 2 * costs.peak / 1e12,
        "dense_over_ours": ratios,
        "hours": {"step 1": hours_1, "step 2": None if late() else costs.step_2(), "paper, A100": PAPER_HOURS},
        "loader_audio_per_second": None if late() else loader_rate(10.0),
        "largest_batch": None if late() else largest_or_error(costs),
    }
    points = [{**vars(point), "audio_per_second": point.audio_per_second} for point in costs.points]
    return result | {"points": points}


def largest_or_error(costs: Costs) -> dict[str, Any]:
    """The largest batch; tensors of over 2^31 elements may break a kernel, and what is measured is not lost for it."""
    try:
        return costs.largest()
    except RuntimeError as error:
        return {"error": str(error).partition("\n")[0]}


def page(result: dict[str, Any]) -> str:
    """Tables of gpu.json for docs/benchmarks.md."""
    rows = [
        [point["what"], f"{point['batch_seconds']:g}", f"{point['seconds']:.4f}", f"{point['audio_per_second']:,.0f}",
         f"{point['share_of_peak']:.0%}", "" if point["peak_gib"] is None else f"{point['peak_gib']:.1f}"]
        for point in result["points"]
    ]  # fmt: skip
    steps = markdown_table(["what", "s of audio", "s a step", "s of audio per s", "of the peak", "GiB"], rows)
    ratios = [f"{what}: {ratio:.2f} x as long as ours" for what, ratio in result["dense_over_ours"].items()]
    found, largest = result["hours"], result["largest_batch"]
    of_paper = "{:g} + {:g}".format(*found["paper, A100"])
    totals = [f"peak of matrix products in bfloat16: {result['peak_tflops_bf16']:.0f} TFLOP/s"]
    if found["step 2"] is not None:
        totals.append(f"GPU-hours: {found['step 1']:.2f} + {found['step 2']:.2f}; of A100, as published: {of_paper}")
    if result["loader_audio_per_second"] is not None:
        totals.append(f"the loader gives {result['loader_audio_per_second']:,.0f} s of audio per second")
    if largest is None:
        totals.append("no time for all")
    elif "error" in largest:
        totals.append(f"the largest batch was not found: {largest['error']}")
    else:
        totals.append(f"largest batch: {largest['seconds']:g} s; step 1 with nine tenths of it: "
                      f"{largest['hours of step 1']:.2f} GPU-hours")  # fmt: skip
    return "\n".join([steps, "", *ratios, *totals])


def run(
    out: Path = Path("benchmarks/results/gpu.json"),
    batch_seconds: float = 160.0,
    rounds: int = 5,
    device: Literal["cuda", "cpu"] = "cuda",
    size: Size = "base",
    seconds: float = 330.0,
) -> None:
    """Measure, print and write.

    What is measured is kept, point by point, beside OUT until all is there.

    Args:
        out: JSON file.
        batch_seconds: of audio per step.
        rounds: timed steps of each variant.
        device: cuda; cpu takes hours at the published size.
        size: of the models, small or base; torchaudio's dense step is measured beside base alone.
        seconds: no part after step 1 is begun after so many.

    Raises:
        Stopped: a signal asked for it.
        UserError: there is no GPU, or nothing to measure.
    """
    check_effort(device, batch_seconds, rounds)
    begin = time.perf_counter()
    torch.manual_seed(0)
    of = conditions(device=device, batch_seconds=batch_seconds, rounds=rounds, size=size)
    known = Journal(out.with_name(f".{out.stem}.jsonl"), of, "points")
    with keeping(f"the points measured so far are in {known.path}"):
        result = measure(
            SIZES[size], device, batch_seconds, rounds, known, lambda: time.perf_counter() - begin > seconds
        )
    result |= {"date": str(date.today()), **of}
    print(page(result))
    write_text(out, json.dumps(result, indent=1) + "\n")
    known.remove()
    print(f"{of['gpu'] or of['cpu']}, {time.perf_counter() - begin:.0f} s -> {out}")


main = command_of(run, __doc__)

if __name__ == "__main__":
    main()
