"""What students leave unexplained of each teacher layer: a line per method, a band from its worst seed to its best."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure


def draw(series: Mapping[str, Sequence[Sequence[float]]], steps: int) -> Figure:
    """Runs [seeds][layers] per method, as shares of the variance."""
    figure = Figure(figsize=(7.6, 4.2), layout="constrained")
    axis = figure.subplots()
    for name, runs in series.items():
        percent = 100 * np.array(runs)
        layers = np.arange(percent.shape[1])
        (line,) = axis.plot(layers, percent.mean(0), label=name)
        axis.fill_between(layers, percent.min(0), percent.max(0), color=line.get_color(), alpha=0.15, linewidth=0)
    num_seeds = len(next(iter(series.values())))
    seeds = f"{num_seeds} seeds (bands: from best to worst)" if num_seeds > 1 else "1 seed"
    title = f"Unexplained variance of each teacher layer, %; {steps} updates, {seeds}"
    axis.set_title(title, loc="left", fontsize=10)
    axis.set(xlabel="teacher layer", xticks=layers, ylim=(0, None))
    axis.grid(axis="y", alpha=0.2)
    axis.spines[["top", "right"]].set_visible(False)
    axis.margins(x=0)
    axis.legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=9, frameon=False)
    return figure
