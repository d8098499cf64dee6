"""HuBERT Base's size with random weights: milliseconds predicted, asked for and got, and what round sizes are worth.

    python -m benchmarks.latency --out latency_out [--threads 1] [--device cpu]      # 13 minutes; run again to resume

Measures a latency table, prunes random masks to several shares of the time and to the published size in multiples of
1, 8, 16 and 32, and times all of them in turns. The machine should have nothing else to do. Prints tables, writes
times.json and times.svg.
"""

import copy
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure

from benchmarks.plots import write
from benchmarks.runs import ROOT
from distillation.budget import Budget, Cost, Milliseconds, Parameters
from distillation.commandline import command_of
from distillation.errors import UserError
from distillation.journal import Journal
from distillation.latency import LatencyTable, read_latency
from distillation.sparsity import PruningConfig, make_prunable
from distillation.stopping import keeping, run_child
from evaluation.block_times import whole_times
from evaluation.conditions import conditions
from evaluation.latency import errors_of
from evaluation.tables import machine, markdown_table
from wav2vec2 import Wav2Vec2Model, load_model, prune, save_model, wav2vec2_model
from wav2vec2.architecture import HUBERT_BASE
from wav2vec2.counting import count_params
from wav2vec2.pruning import survivors_for_cost

SHARES = (0.25, 0.375, 0.5, 0.625, 0.75)  # of the teacher's time, asked for
MULTIPLES = (1, 8, 16, 32)
SPARSITY = 0.75  # of the parameters, for the multiples
DRAWS = 3  # of masks
SPREAD = 2.0  # of log_alpha, between layers and within them: every layer keeps another share
TEACHER = "teacher"


@dataclass
class Timed:
    """A pruned model: what was asked for, and what it is."""

    what: float  # share of the teacher's time, or the multiple
    asked: float  # milliseconds, or parameters
    predicted: float  # milliseconds
    params: int
    ms: float


def measured_table(model: Path, file: Path, device: str = "cpu", threads: int = 1) -> LatencyTable:
    """The latency table in a file, measured now where there is none.

    Raises:
        UserError: it could not be measured, or the file holds one of another model or of other conditions.
    """
    if not file.is_file():
        command = [sys.executable, "-m", "evaluation.latency", str(model.resolve()), "--out", str(file.resolve())]
        if run_child([*command, "--threads", str(threads), "--device", device], cwd=ROOT):
            raise UserError(f"{file}: could not be measured")
    table = read_latency(file)
    table.check(load_model(model))
    made = table.content["device"], table.content["measured"]["threads"]
    if made != (device, threads):
        raise UserError(f"{file}: measured with --device {made[0]} --threads {made[1]}: use another --out")
    return table


def masked_at_random(teacher: Wav2Vec2Model, draw: int) -> Wav2Vec2Model:
    """The teacher with masks whose ranking is random."""
    student = make_prunable(teacher, PruningConfig())
    generator = torch.Generator().manual_seed(draw)
    for mask in student.masks().values():
        rank = torch.randn(len(mask), generator=generator) + torch.randn(1, generator=generator)
        mask.log_alpha.data = SPREAD * rank
    return student


def pruned(student: Wav2Vec2Model, cost: Cost, target: float, multiple_of: int = 1) -> Wav2Vec2Model:
    """To a budget, as prune.py does."""
    return prune(student, survivors_for_cost(student, partial(cost, student), target, multiple_of))[0]


def timed(
    models: dict[tuple[float, int], tuple[float, Wav2Vec2Model]], teacher: Wav2Vec2Model, table: LatencyTable,
    device: str, rounds: int,
) -> dict[str, Any]:  # fmt: skip
    """All models and the teacher in turns, in plain types."""
    all_models: dict[Any, Wav2Vec2Model] = {TEACHER: teacher, **{key: model for key, (_, model) in models.items()}}
    ms = whole_times(all_models, device, table.seconds, rounds)
    return {
        TEACHER: ms[TEACHER],
        "models": [
            vars(Timed(key[0], asked, table(model).item(), count_params(model), ms[key]))
            for key, (asked, model) in models.items()
        ],
    }


def format_asked(rows: list[Timed], before: float, now: float) -> str:
    """Milliseconds asked and got; what the teacher takes, then and now, shows whether the machine's speed changed."""
    lines = []
    for share in SHARES:
        found = [row for row in rows if row.what == share]
        off = [row.ms / row.asked - 1 for row in found]
        lines.append([f"{found[0].asked:.0f}", ", ".join(f"{row.predicted:.1f}" for row in found),
                      ", ".join(f"{row.ms:.0f}" for row in found), ", ".join(f"{error:+.1%}" for error in off),
                      ", ".join(f"{row.params / 1e6:.1f}" for row in found)])  # fmt: skip
    head = ["asked, ms", "by the table", "measured", "off", "parameters, M"]
    errors = [abs(row.ms / row.asked - 1) for row in rows]
    worst, typical = max(errors), statistics.median(errors)
    return (
        f"{markdown_table(head, lines)}\n\nOff by {typical:.1%} (median), at most {worst:.1%}. The teacher took "
        f"{before:.0f} ms when the table was made, {now:.0f} ms now."
    )


def format_multiples(rows: list[Timed]) -> str:
    """Round sizes at one number of parameters."""
    base = [row.ms for row in rows if row.what == 1]
    lines = []
    for multiple in MULTIPLES:
        found = [row for row in rows if row.what == multiple]
        gain = statistics.mean(before / row.ms for before, row in zip(base, found))
        lines.append([str(multiple), f"{statistics.mean(row.params for row in found):,.0f}",
                      ", ".join(f"{row.ms:.0f}" for row in found), f"{gain:.2f}"])  # fmt: skip
    return markdown_table(["multiple of", "parameters", "ms", "times as fast"], lines)


def draw(check: list[list[float]], asked: list[Timed]) -> Figure:
    """Predicted against measured, and asked against got; on the line both are equal, between the dotted ones by 5 %."""
    figure = Figure(figsize=(8.4, 4.0), layout="constrained")
    predicted, got = figure.subplots(1, 2)
    for axis, points, title, label in (
        (predicted, [(ms, by) for by, ms in check], "predicted: models of random sizes", "ms by the table"),
        (got, [(row.ms, row.asked) for row in asked], "asked for: pruned to a budget", "ms asked for"),
    ):
        reach = 1.05 * max(map(max, points))
        axis.plot([0, reach], [0, reach], color="0.6", linewidth=1)
        for factor in (0.95, 1.05):
            axis.plot([0, reach], [0, factor * reach], color="0.7", linewidth=0.8, linestyle=":")
        axis.plot(*zip(*points), "o", markersize=4)
        axis.set(xlabel="ms measured", ylabel=label, xlim=(0, reach), ylim=(0, reach))
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def run(
    out: Path = Path("latency_out"), threads: int = 1, device: Literal["cpu", "cuda"] = "cpu", rounds: int = 5
) -> None:
    """Measure, print and plot.

    Args:
        out: folder for the model, the table and the results.
        threads: of the CPU.
        device: to measure on.
        rounds: visits to each model; the fastest run counts, as in the table.

    Raises:
        Stopped: a signal asked for it.
        UserError: the table could not be measured.
    """
    torch.set_num_threads(threads)
    path = out / "base.pth"
    if not path.is_file():
        torch.manual_seed(0)
        save_model(path, wav2vec2_model(**copy.deepcopy(HUBERT_BASE)).eval())
    with keeping(f"what is measured is in {out}"):
        table, teacher = measured_table(path, out / "latency.json", device, threads), load_model(path)
        of = conditions(device=device, rounds=rounds, table=table.content)
        known = Journal(out / "times.jsonl", of, "times")
        cost, params = Milliseconds(table), Parameters()
        students = [masked_at_random(teacher, number) for number in range(DRAWS)]
        before = table.content["check"][0][1]
        if "asked" not in known:
            known["asked"] = timed(
                {(share, i): (share * before, pruned(student, cost, share * before))
                 for share in SHARES for i, student in enumerate(students)}, teacher, table, device, rounds,
            )  # fmt: skip
        if "multiples" not in known:
            target = Budget.of_share(params, count_params(teacher), SPARSITY).target
            known["multiples"] = timed(
                {(multiple, i): (target, pruned(student, params, target, multiple))
                 for multiple in MULTIPLES for i, student in enumerate(students)}, teacher, table, device, rounds,
            )  # fmt: skip
    asked, multiples = ([Timed(**row) for row in known[name]["models"]] for name in ("asked", "multiples"))
    check = table.content["check"]
    errors = errors_of(check[1:])
    content = {"check": check, **{name: known[name] for name in ("asked", "multiples")}}
    written = write(out, "times", content, draw(check, asked))
    print(f"{table.content['measured']['cpu']}, {threads} thread(s), {table.seconds:g} s of audio; {machine()}\n")
    off = f"{statistics.median(errors):.1%} off (median), at most {max(errors):.1%}"
    print(f"{len(errors)} models of random sizes: predictions are {off}.\n")
    print(format_asked(asked, before, known["asked"][TEACHER]), format_multiples(multiples), sep="\n\n")
    print(f"\n-> {written}")


main = command_of(run, __doc__)

if __name__ == "__main__":
    main()
