"""One chart as a file: a line per method over the teacher's layers, a band from its worst seed to its best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from evaluation.svg import nice_axis

WIDTH, HEIGHT = 760, 420  # pixels
LEFT, RIGHT, TOP, BOTTOM = 60, 210, 44, 48
COLORS = ("#0b6bcb", "#c8511b", "#1f8a4c", "#8e44ad", "#b8860b", "#d1366f", "#4a5568", "#008b8b", "#a0522d", "#6b8e23")


def draw(series: Mapping[str, Sequence[Sequence[float]]], steps: int) -> str:
    """SVG of runs [seeds][layers] per method, as shares of the variance."""
    num_layers = len(next(iter(series.values()))[0])
    highest = max(value for runs in series.values() for run in runs for value in run)
    ticks, _, top = nice_axis(0, 100 * highest)

    def place(layer: float, share: float) -> str:
        x = LEFT + layer / max(1, num_layers - 1) * (WIDTH - LEFT - RIGHT)
        y = HEIGHT - BOTTOM - 100 * share / top * (HEIGHT - TOP - BOTTOM)
        return f"{x:.1f},{y:.1f}"

    parts = []
    for tick, label in ticks:
        y = place(0, tick / 100).split(",")[1]
        parts.append(f'<path d="M{LEFT} {y}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{float(y) + 4:.1f}" text-anchor="end">{label}</text>')
    for layer in range(num_layers):
        x = place(layer, 0).split(",")[0]
        parts.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{layer}</text>')
    for i, (name, runs) in enumerate(series.items()):
        color, columns = COLORS[i % len(COLORS)], list(zip(*runs))
        band = [place(n, max(c)) for n, c in enumerate(columns)]
        band += [place(n, min(c)) for n, c in reversed(list(enumerate(columns)))]
        line = " ".join(place(n, sum(c) / len(c)) for n, c in enumerate(columns))
        y = TOP + 14 + 24 * i
        parts.append(f'<polygon points="{" ".join(band)}" fill="{color}" opacity="0.15"/>')
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts.append(f'<path d="M{WIDTH - RIGHT + 16} {y - 4}h22" stroke="{color}" stroke-width="3"/>')
        parts.append(f'<text x="{WIDTH - RIGHT + 46}" y="{y}">{escape(name)}</text>')
    seeds = len(next(iter(series.values())))
    title = f"Unexplained variance of each teacher layer, %; {steps} updates, " + (
        f"{seeds} seeds (bands: from best to worst)" if seeds > 1 else "1 seed"
    )
    axis = f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">teacher layer</text>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="13" fill="#222"><rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="{LEFT}" y="24" font-weight="bold">{escape(title)}</text>{"".join(parts)}{axis}</svg>'
    )
