"""Score against size, one point with its interval per method."""

from typing import Any

from matplotlib.figure import Figure

CONTROLS = ("teacher", "filter banks, 11 frames", "random weights", "teacher's layer 0")


def label_heights(rows: list[dict[str, Any]], task: str) -> list[tuple[dict[str, Any], float]]:
    """Where the names of the methods go: at their scores, but no two of one size closer than they are high."""
    shown = [row for row in rows if row["name"] not in CONTROLS]
    scores = [row["scores"][task][0] for row in rows]
    gap = 0.045 * (max(scores) - min(scores))
    result: list[tuple[dict[str, Any], float]] = []
    for row in sorted(shown, key=lambda row: row["scores"][task][0]):
        below = [height for other, height in result if abs(other["num_params"] / row["num_params"] - 1) < 0.1]
        result.append((row, max([row["scores"][task][0], *(height + gap for height in below)])))
    return result


def draw(rows: list[dict[str, Any]]) -> Figure:
    """Words and phones of rows {name, num_params, scores: {task: [score, low, high]}}."""
    figure = Figure(figsize=(9.6, 4.2), layout="constrained")
    names = list(dict.fromkeys(row["name"] for row in rows if row["name"] not in CONTROLS))
    for axis, task in zip(figure.subplots(1, 2, sharex=True), ("words", "phones")):
        for row in rows:
            score, low, high = row["scores"][task]
            if row["name"] in CONTROLS:
                style = "-" if row["name"] == "teacher" else ":"
                axis.axhline(score, color="0.5", linestyle=style, linewidth=1)
                axis.annotate(row["name"], (0.01, score), xycoords=("axes fraction", "data"), fontsize=7.5,
                              color="0.35", va="bottom")  # fmt: skip
                continue
            color = f"C{names.index(row['name'])}"
            spread = [[score - low], [high - score]]
            axis.errorbar(row["num_params"] / 1e6, score, spread, fmt="o", capsize=3, color=color)
        for row, height in label_heights(rows, task):
            axis.annotate(row["name"], (row["num_params"] / 1e6, height), (7, 0), textcoords="offset points",
                          fontsize=7.5, va="center", color=f"C{names.index(row['name'])}")  # fmt: skip
        axis.set_title(f"{task} per frame, %", fontsize=10)
        axis.set_xlabel("parameters, millions")
        axis.margins(x=0.5)
        axis.grid(alpha=0.2)
    return figure
