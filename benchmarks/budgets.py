"""The demo's teacher pruned to half of its parameters, of its MACs, and of its milliseconds: what each budget leaves.

    scripts/demo.sh demo_out                            # once: the corpus and the tiny teacher
    python -m benchmarks.budgets --demo demo_out        # then 40 minutes on two cores; run again to resume

Every run is the demo recipe with another pruning.cost, half of the audio in an update, and twice the rate of the
multipliers. The latency table is of one CPU thread of this machine and 10 s of audio. Prints what models cost, what is
left of each kind of unit and mini-SUPERB's words with intervals over speakers and seeds; writes budgets.json and
budgets.svg.
"""

import logging
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.latency import measured_table
from benchmarks.minisuperb.evaluate import Row, measured, scores, start
from benchmarks.plots import write
from benchmarks.runs import train
from distillation.budget import MACS_SECONDS
from distillation.commandline import command_of
from distillation.config import RECIPES
from distillation.errors import UserError
from distillation.stopping import keeping
from evaluation.block_times import whole_times
from evaluation.tables import machine, markdown_table
from wav2vec2 import load_model
from wav2vec2.architecture import architecture
from wav2vec2.counting import count_params
from wav2vec2.feature_extractor import SAMPLE_RATE

BUDGETS = {"params": "parameters", "macs": "MACs", "milliseconds": "milliseconds"}  # pruning.cost -> of the row
KINDS = {"conv": "conv channels", "heads": "heads", "interm": "FFN units"}
SPARSITY = 0.5
ROUNDS = 5  # of timing
PROBE_STEPS = 600


@dataclass
class Result:
    """One finished run.

    Attributes:
        budget: name of its cost; None for the teacher.
        seed: of the run.
        params: counted.
        macs: of 10 s.
        predicted: milliseconds by the table.
        ms: measured as for the table, in turns with all others.
        units: per kind, by layer.
        words: mini-SUPERB's counts by speaker, of all tasks.
    """

    budget: str | None
    seed: int
    params: int
    macs: float
    predicted: float
    ms: float
    units: dict[str, list[int]]
    words: dict[str, Any]


def recipe_of(demo: Path, table: Path, budget: str, seed: int) -> dict[str, Any]:
    """What differs from the demo recipe."""
    return {
        "base": str(RECIPES / "demo.yaml"),
        "teacher_ckpt": str(demo / "teacher.pth"),
        "seed": seed,
        "data": {"tsv_dir": str(demo / "data"), "seconds_per_batch": 10.0},
        "pruning": {
            "cost": budget,
            "latency": str(table),
            "target_sparsity": SPARSITY,
            "lr_lagrangian": 0.03,  # twice the demo's: the multipliers forget sooner what the ramp has taught them
        },
    }


def format_results(results: list[Result]) -> str:
    """Two tables: costs and words, and what is left of each kind of unit."""
    teacher = results[0]
    reference = Row("teacher", teacher.params, [teacher.words])
    costs, units = [], []
    for name in (None, *BUDGETS):
        runs = [result for result in results if result.budget == name]
        title = "teacher" if name is None else f"half the {BUDGETS[name]}"

        def cell(field: str, scale: float, digits: str, runs: list[Result] = runs) -> str:
            value = statistics.mean(getattr(run, field) for run in runs)
            share = value / getattr(teacher, field)
            return f"{value / scale:{digits}}" + ("" if runs[0] is teacher else f" ({share:.0%})")

        point, low, high = scores(Row(title, 0, [run.words for run in runs]), reference)["words"]
        costs.append([title, cell("params", 1, ",.0f"), cell("macs", 1e9, ".3f"), cell("predicted", 1, ".1f"),
                      cell("ms", 1, ".1f"), f"{point:.1f} [{low:.1f}, {high:.1f}]"])  # fmt: skip
        if name is not None:
            shares = {kind: [sum(run.units[kind]) / sum(teacher.units[kind]) for run in runs] for kind in KINDS}
            units.append(
                [title, *(f"{statistics.mean(s):.0%} ({min(s):.0%} to {max(s):.0%})" for s in shares.values())]
            )
    header = ["budget", "parameters", "GMACs, 10 s", "ms by the table", "ms measured", "words per frame, %"]
    return f"{markdown_table(header, costs)}\n\n{markdown_table(['left of', *KINDS.values()], units)}"


def draw(results: list[Result]) -> Figure:
    """Units per layer, means over seeds, one colour per budget; the teacher in grey."""
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    for axis, (kind, title) in zip(figure.subplots(1, len(KINDS)), KINDS.items()):
        whole = results[0].units[kind]
        layers = np.arange(1, len(whole) + 1)
        axis.bar(layers, whole, 0.86, color="0.9")
        for i, (name, label) in enumerate(BUDGETS.items()):
            runs = [result.units[kind] for result in results if result.budget == name]
            axis.bar(layers + 0.27 * (i - 1), np.mean(runs, axis=0), 0.25, color=f"C{i}", label=label)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("conv layer" if kind == "conv" else "Transformer layer")
        axis.set_xticks(layers)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", title="half of the", fontsize=9)
    return figure


def run(demo: Path = Path("demo_out"), out: Path | None = None, seeds: int = 3) -> None:
    """Train, measure, print and plot.

    Args:
        demo: folder that scripts/demo.sh has left: teacher.pth, its corpus and data/.
        out: folder of the runs; DEMO/budgets by default.
        seeds: runs per budget.

    Raises:
        Stopped: a signal asked for it.
        UserError: a setting or a file that does not fit.
    """
    if seeds < 1:
        raise UserError(f"--seeds {seeds}: at least one is needed")
    demo = demo.resolve()
    out = demo / "budgets" if out is None else out.resolve()
    _, data = start(demo, demo / "minisuperb", "teacher.pth", "data/valid.tsv")
    file = out / "latency.json"
    logging.getLogger("distillation.data.loaders").setLevel(logging.WARNING)
    with keeping(f"what is finished, and the run that was training, is in {out}"):
        table = measured_table(demo / "teacher.pth", file)
        files: dict[tuple[str | None, int], Path] = {(None, 0): demo / "teacher.pth"}
        runs = [(name, seed) for seed in range(1, seeds + 1) for name in BUDGETS]
        for name, seed in tqdm(runs, desc="budgets", unit="run", dynamic_ncols=True):
            exp = out / name / f"seed{seed}"
            files[name, seed] = train(exp, recipe_of(demo, file, name, seed))
        probed = {key: measured(path, data, PROBE_STEPS)[1]
                  for key, path in tqdm(files.items(), desc="probing", unit="model")}  # fmt: skip
    models = {key: load_model(path) for key, path in files.items()}
    torch.set_num_threads(1)
    times = whole_times(models, "cpu", table.seconds, ROUNDS)
    results = [
        Result(
            *key, count_params(model), model.get_num_macs(MACS_SECONDS * SAMPLE_RATE).item(), table(model).item(),
            times[key], {kind: getattr(architecture(model.config), kind) for kind in KINDS}, probed[key],
        )
        for key, model in models.items()
    ]  # fmt: skip
    written = write(out, "budgets", [asdict(result) for result in results], draw(results))
    print(f"{seeds} seeds; {machine()}\n\n{format_results(results)}\n\n-> {written}")


main = command_of(run, __doc__)

if __name__ == "__main__":
    main()
