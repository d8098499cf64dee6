"""How much more the recipes of a comparison keep than one of them: words per frame, with the interval of the gain.

    python -m benchmarks.compare_methods --demo demo_out --out demo_out/c388 --recipes '[dphubert,mine.yaml]' ...
    python -m benchmarks.gains --demo demo_out --compare '[demo_out/c388]' --against dphubert

The words are those of mini-SUPERB (benchmarks/minisuperb). Intervals are of 95 %; of words by bootstrap over test
speakers and seeds. A gain is measured on the same speakers and, of both recipes, the same seeds, and few seeds tell
little of how much they differ: so its interval adds to a bootstrap over speakers a t distribution over seeds. Its
spread is that of the row's own gains, or of all rows together where a row has one or two. Unexplained variance is that
of benchmarks/linear_distance.py, over all teacher layers and in the last, mean and standard deviation over seeds. What
is measured of a model is kept beside it. Writes gains.json and gains.svg.
"""

import math
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from benchmarks.compare_methods import Result, kept_result, minutes, spread
from benchmarks.minisuperb.evaluate import Counts, measured, rates, start
from benchmarks.plots import write
from benchmarks.runs import finals_in
from distillation.commandline import command_of
from distillation.errors import UserError
from distillation.stopping import keeping
from evaluation.tables import markdown_table

DRAWS = 10_000
ENOUGH = 3  # seeds to tell how much they differ
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

    def pairs(self, other: "Row") -> list[tuple[Counts, Counts]]:
        """What this and another recipe counted, of the seeds that both have.

        Raises:
            UserError: none.
        """
        theirs = {result.seed: counts for result, counts in other.runs}
        found = [(counts, theirs[result.seed]) for result, counts in self.runs if result.seed in theirs]
        if not found:
            raise UserError(f"{self.compare}: {self.recipe} and {other.recipe} have no seed in common")
        return found


def measure_gains(rows: list[Row], against: str) -> dict[str, list[float]]:
    """Points that the other rows of a comparison have more than one of them, with the interval.

    Of a single seed in all rows nothing is known about seeds: its interval is that of speakers alone.
    """
    (other,) = (row for row in rows if row.recipe == against)
    pairs = {row.recipe: row.pairs(other) for row in rows if row is not other}

    def difference(pairs: list[tuple[Counts, Counts]], draw: bool = False) -> np.ndarray:
        mine, theirs = (
            rates(list(counts), "words", np.random.default_rng(0) if draw else None, DRAWS, all_seeds=True)
            for counts in zip(*pairs)
        )
        return mine - theirs

    by_seed = {recipe: np.concatenate([difference([pair]) for pair in found]) for recipe, found in pairs.items()}
    gains = {}
    for recipe, found in pairs.items():
        drawn = difference(found, draw=True)
        told = [by_seed[recipe]] if len(found) >= ENOUGH else list(by_seed.values())
        if freedom := sum(len(values) - 1 for values in told):
            spread = math.sqrt(sum(((values - values.mean()) ** 2).sum() for values in told) / freedom)
            drawn = drawn + spread / math.sqrt(len(found)) * np.random.default_rng(1).standard_t(freedom, DRAWS)
        gains[recipe] = [float(difference(found)[0]), *np.percentile(drawn, [2.5, 97.5]).tolist()]
    return gains


def table(rows: list[Row], gains: dict[str, list[float]], against: str) -> str:
    """Markdown, one line per row of one comparison."""
    lines = []
    for row in rows:
        results = [result for result, _ in row.runs]
        unexplained = [
            [100 * statistics.mean(result.unexplained) for result in results],
            [100 * result.unexplained[-1] for result in results],
        ]
        gain = "{:+.1f} [{:+.1f}, {:+.1f}]".format(*gains[row.recipe]) if row.recipe in gains else ""
        lines.append([
            row.recipe, f"{statistics.mean(result.num_params for result in results):,.0f}", str(len(results)),
            minutes(results),
            "{:.1f} [{:.1f}, {:.1f}]".format(*row.words()), gain,
            *(f"{statistics.mean(values):.1f} ± {spread(values):.1f}" for values in unexplained),
        ])  # fmt: skip
    head = ["recipe", "parameters", "seeds", "minutes", "words", f"more than {against}", "unexplained", "last layer"]
    return markdown_table(head, lines)


def draw(gains: dict[str, dict[str, list[float]]], against: str) -> Figure:
    """Gains with their intervals [point, low, high], by folder and recipe: a panel per folder."""
    most = max(len(found) for found in gains.values())
    figure = Figure(figsize=(2.2 + 2.8 * len(gains), 1.2 + 0.28 * most), layout="constrained")
    for axis, (folder, found) in zip(figure.subplots(1, len(gains), squeeze=False, sharex=True)[0], gains.items()):
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
    if not compare:
        raise UserError("--compare is empty: name at least one folder")
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
        gains[str(folder)] = measure_gains(mine, against)
        print(table(mine, gains[str(folder)], against))
    content = [
        {"compare": str(row.compare), "recipe": row.recipe, "words": row.words(),
         "gain": gains[str(row.compare)].get(row.recipe), "runs": [asdict(result) for result, _ in row.runs]}
        for row in rows
    ]  # fmt: skip
    print(f"\n-> {write(out or demo, 'gains', content, draw(gains, against))}")


main = command_of(run, __doc__)

if __name__ == "__main__":
    main()
