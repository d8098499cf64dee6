"""How much more the recipes of a comparison keep than one of them: words per frame, with the interval of the gain.

    python -m benchmarks.compare_methods --demo demo_out --out demo_out/c388 --recipes '[dphubert,mine.yaml]' ...
    python -m benchmarks.gains --demo demo_out --compare '[demo_out/c388]' --against dphubert

The words are those of mini-SUPERB (benchmarks/minisuperb). Intervals are of 95 %, by bootstrap over test speakers and
seeds; a gain is measured on the same speakers and, of both recipes, the same seeds. Unexplained variance is that of
benchmarks/linear_distance.py, over all teacher layers and in the last, mean and standard deviation over seeds. What is
measured of a model is kept beside it. Writes gains.json and gains.svg.
"""

import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.compare_methods import Result, kept_result, spread
from benchmarks.minisuperb.evaluate import Counts, measured, rates, start
from benchmarks.plots import write
from benchmarks.runs import finals_in
from distillation.commandline import command_of
from distillation.errors import UserError
from distillation.stopping import keeping
from evaluation.tables import markdown_table

DRAWS = 2000
PROBE_STEPS = 600


@dataclass
class Row:
    """One recipe of one comparison: its runs, by seed."""

    compare: Path
    recipe: str
    runs: list[tuple[Result, Counts]]

    def words(self) -> list[float]:
        """Share of the words and its interval, in per cent."""
        counts = [counts for _, counts in self.runs]
        drawn = rates(counts, "words", np.random.default_rng(0), DRAWS)
        return [float(rates(counts, "words", None, 0)[0]), *np.percentile(drawn, [2.5, 97.5]).tolist()]

    def gain(self, other: "Row") -> list[float]:
        """Points more than another recipe with the seeds that both have, and the interval."""
        both = {result.seed for result, _ in self.runs} & {result.seed for result, _ in other.runs}
        mine, theirs = ([counts for result, counts in row.runs if result.seed in both] for row in (self, other))
        if not both:
            raise UserError(f"{self.compare}: {self.recipe} and {other.recipe} have no seed in common")
        point = rates(mine, "words", None, 0) - rates(theirs, "words", None, 0)
        drawn = [rates(counts, "words", np.random.default_rng(0), DRAWS) for counts in (mine, theirs)]
        return [float(point[0]), *np.percentile(drawn[0] - drawn[1], [2.5, 97.5]).tolist()]


def table(rows: list[Row], against: str) -> str:
    """Markdown, one line per row of one comparison."""
    (other,) = (row for row in rows if row.recipe == against)
    lines = []
    for row in rows:
        results = [result for result, _ in row.runs]
        unexplained = [
            [100 * statistics.mean(result.unexplained) for result in results],
            [100 * result.unexplained[-1] for result in results],
        ]
        gain = "" if row is other else "{:+.1f} [{:+.1f}, {:+.1f}]".format(*row.gain(other))
        lines.append([
            row.recipe, f"{statistics.mean(result.num_params for result in results):,.0f}", str(len(results)),
            f"{statistics.mean(result.cpu_seconds for result in results) / 60:.1f}",
            "{:.1f} [{:.1f}, {:.1f}]".format(*row.words()), gain,
            *(f"{statistics.mean(values):.1f} ± {spread(values):.1f}" for values in unexplained),
        ])  # fmt: skip
    head = ["recipe", "parameters", "seeds", "minutes", "words", f"more than {against}", "unexplained", "last layer"]
    return markdown_table(head, lines)


def draw(gains: dict[str, dict[str, list[float]]], against: str) -> Figure:
    """Gains with their intervals [point, low, high], by folder and recipe: a panel per folder."""
    most = max(len(found) for found in gains.values())
    figure = Figure(figsize=(2.2 + 2.8 * len(gains), 1.2 + 0.28 * most), layout="constrained")
    for axis, (folder, found) in zip(figure.subplots(1, len(gains), squeeze=False)[0], gains.items()):
        ordered = sorted(found, key=lambda recipe: found[recipe][0])
        for height, (point, low, high) in enumerate(found[recipe] for recipe in ordered):
            axis.errorbar(point, height, xerr=[[point - low], [high - point]], fmt="o", capsize=3, color="C0")
            axis.annotate(f"{point:+.1f}", (high, height), (5, 0), textcoords="offset points", va="center", fontsize=8)
        axis.set_yticks(range(len(ordered)), ordered)
        axis.grid(axis="y", alpha=0.2)
        axis.axvline(0, color="0.5", linewidth=1)
        axis.set_title(folder, loc="left", fontsize=10)
        axis.set_xlabel(f"points of words over {against}", fontsize=9)
        axis.margins(x=0.2, y=0.15)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(labelsize=8.5)
    return figure


def run(
    compare: list[Path],
    demo: Path = Path("demo_out"),
    out: Path | None = None,
    against: str = "dphubert",
    threads: int = 2,
) -> None:
    """Measure what has not been measured, print and plot.

    Args:
        compare: folders of benchmarks.compare_methods.
        demo: folder that scripts/demo.sh has left: teacher.pth and its corpus.
        out: folder of gains.json and gains.svg; DEMO by default.
        against: recipe in each of them that the others are compared with.
        threads: of torch.

    Raises:
        Stopped: a signal asked for it.
        UserError: a folder without what it should hold.
    """
    torch.set_num_threads(threads)
    finals = {folder: finals_in(folder) for folder in compare}
    for folder, found in finals.items():
        if against not in found:
            raise UserError(f"{folder}: no finished run of {against}; there are {', '.join(found)}")
    _, data = start(demo, None, "teacher.pth")
    rows = []
    with (
        keeping("what was measured of a model is beside it"),
        tqdm(total=sum(len(files) for found in finals.values() for files in found.values()), unit="model") as bar,
    ):
        for folder, found in finals.items():
            for recipe, files in found.items():
                runs = []
                for file in files:
                    runs.append((kept_result(file), measured(file, data, PROBE_STEPS, ["words"])[1]))
                    bar.update()
                rows.append(Row(folder, recipe, runs))
    gains: dict[str, dict[str, list[float]]] = {}
    for folder in compare:
        mine = [row for row in rows if row.compare == folder]
        print(f"\n{folder}: words per frame in %, unexplained variance in %, minutes of one core to train\n")
        print(table(mine, against))
        (other,) = (row for row in mine if row.recipe == against)
        gains[folder.name] = {row.recipe: row.gain(other) for row in mine if row is not other}
    content = [
        {"compare": row.compare.name, "recipe": row.recipe, "words": row.words(),
         "gain": gains[row.compare.name].get(row.recipe), "runs": [asdict(result) for result, _ in row.runs]}
        for row in rows
    ]  # fmt: skip
    print(f"\n-> {write(out or demo, 'gains', content, draw(gains, against))}")


main = command_of(run, __doc__)

if __name__ == "__main__":
    main()
