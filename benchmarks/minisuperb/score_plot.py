"""Score against size, one point with its interval per method."""

from __future__ import annotations

import io
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt

CONTROLS = ("teacher", "filter banks, 11 frames", "random weights", "teacher's layer 0")


def draw(rows: list[dict[str, Any]]) -> str:
    """SVG of the words and phones of rows {name, num_params, scores: {task: [score, low, high]}}."""
    figure, axes = plt.subplots(1, 2, figsize=(9.6, 4.2), sharex=True, layout="constrained")
    for axis, task in zip(axes, ("words", "phones")):
        color = 0
        for row in rows:
            score, low, high = row["scores"][task]
            if row["name"] in CONTROLS:
                style = "-" if row["name"] == "teacher" else ":"
                axis.axhline(score, color="0.5", linestyle=style, linewidth=1)
                axis.annotate(row["name"], (0.01, score), xycoords=("axes fraction", "data"), fontsize=7.5,
                              color="0.35", va="bottom")  # fmt: skip
                continue
            size = row["num_params"] / 1e6
            axis.errorbar(size, score, [[score - low], [high - score]], fmt="o", capsize=3, color=f"C{color}")
            axis.annotate(row["name"], (size, score), (7, 0), textcoords="offset points", fontsize=7.5, va="center",
                          color=f"C{color}")  # fmt: skip
            color += 1
        axis.set_title(f"{task} per frame, %", fontsize=10)
        axis.set_xlabel("parameters, millions")
        axis.margins(x=0.5)
        axis.grid(alpha=0.2)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    plt.close(figure)
    return text.getvalue()
