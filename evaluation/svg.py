"""Small charts as inline SVG, without a script or a font of their own: colours and text styles come from the page.

Drawn at the size at which they are shown, so that text stays legible on a phone.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

WIDTH, HEIGHT = 344, 210  # CSS pixels
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 16, 34
COLORS = 8  # the page defines --s0 .. --s7
MOST_MARKERS = 60  # more would touch
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters["px"] = "{:.1f}".format
TEMPLATES.filters["breakable"] = lambda name: Markup(re.sub(r"([_/.-])", r"\1<wbr>", str(escape(name))))
TEMPLATES.filters["paint"] = lambda color: "var(--outline)" if color is None else f"var(--s{color % COLORS})"


@dataclass
class Series:
    """One line of a chart."""

    name: str  # in the legend; without a name it is not there
    points: Sequence[tuple[float, float]]
    color: int | None = 0  # index of the page's palette; None for the grey of what others are compared with
    dashed: bool = False
    markers: bool = False


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    unit: str = "",
    log: bool = False,
    from_zero: bool = False,
    x_reach: float | None = None,
    legend: bool = True,
) -> str:
    """A figure with a caption, a legend and lines, or nothing where no line has a point.

    Args:
        title: caption.
        series: lines; one point alone is a dot.
        x_label: of the axis from 0 on.
        unit: after the caption.
        log: logarithmic scale; values that are not positive are left out.
        from_zero: show 0 on the other axis, too.
        x_reach: x is no whole number, and the axis ends with a round number beyond this one, so that several charts
            share one scale.
        legend: name the lines, where there are several.
    """
    lines = [(s, [(x, y) for x, y in s.points if y > 0 or not log]) for s in series]
    lines = [(s, points) for s, points in lines if points]
    if not lines:
        return ""
    xs = [x for _, points in lines for x, _ in points]
    ys = [math.log10(y) if log else y for _, points in lines for _, y in points]
    y_low, y_high = (min(0.0, *ys), max(0.0, *ys)) if from_zero else (min(ys), max(ys))
    if log:
        y_low, y_high = float(math.floor(y_low)), float(max(math.ceil(y_high), math.floor(y_low) + 1))
        y_ticks = [(float(t), f"1e{t}") for t in range(int(y_low), int(y_high) + 1, 1 + int(y_high - y_low) // 6)]
    else:
        y_ticks, y_low, y_high = nice_axis(y_low, y_high)
    x_ticks, x_low, x_end = nice_axis(0, max(x_reach or 0.0, *xs), 5, integers=x_reach is None)
    x_high = max(1.0, *xs) if x_reach is None else x_end

    def place(x: float, y: float) -> tuple[float, float]:
        y = math.log10(y) if log else y
        return (
            LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT),
            HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM),
        )

    return _draw(
        title=title,
        unit=unit,
        x_label=x_label,
        y_ticks=[(place(x_low, 10**tick if log else tick)[1], label, tick == 0 and not log) for tick, label in y_ticks],
        x_ticks=[(place(tick, 10**y_low if log else y_low)[0], label) for tick, label in x_ticks if tick <= x_high],
        lines=[(s, [(*place(x, y), x, y) for x, y in points]) for s, points in lines],
        named=[s for s, _ in lines if s.name] if legend else [],
    )


def bar_chart(
    title: str,
    values: Sequence[int],
    outline: Sequence[int] | None,
    *,
    x_label: str,
    color: int = 0,
    unit: str = "",
    highest: int = 1,
) -> str:
    """A figure with one bar per layer, and behind each the outline of what it had before.

    Args:
        title: caption.
        values: one per layer.
        outline: as many, or None.
        x_label: name of a layer.
        color: index of the page's palette.
        unit: after the caption.
        highest: value that the axis reaches at least, so that several charts share one scale.
    """
    ticks, _, top = nice_axis(0, max([highest, *values, *(outline or [])]), 4, integers=True)
    pitch = (WIDTH - LEFT - RIGHT) / len(values)
    centers = [LEFT + (i + 0.5) * pitch for i in range(len(values))]
    outlines: Sequence[int | None] = outline or [None] * len(values)
    every = 1 if len(values) <= 14 else 2  # labels would touch

    def height(value: float) -> float:
        return value / top * (HEIGHT - TOP - BOTTOM)

    return _draw(
        title=title,
        unit=unit,
        x_label=x_label,
        color=color,
        y_ticks=[(HEIGHT - BOTTOM - height(tick), label, tick == 0) for tick, label in ticks],
        x_ticks=[(center, i + 1) for i, center in enumerate(centers) if i % every == 0],
        bars=[
            (center, value, height(value), before, height(before or 0))
            for center, value, before in zip(centers, values, outlines)
        ],
        bar_width=min(0.72 * pitch, 34.0),
    )


def nice_axis(
    low: float, high: float, count: int = 4, integers: bool = False
) -> tuple[list[tuple[float, str]], float, float]:
    """About ``count`` round ticks that cover [low, high]: (tick, label) pairs, and the first and the last tick."""
    if high - low < 1e-9 * max(1.0, abs(high)):
        low, high = low - 0.5 * abs(low or 1), high + 0.5 * abs(high or 1)
    raw = (high - low) / count
    magnitude = 10 ** math.floor(math.log10(raw))
    multiples = (1, 2, 5, 10) if integers else (1, 2, 2.5, 5, 10)
    step = magnitude * next(m for m in multiples if m * magnitude >= raw * (1 - 1e-9))
    if integers:
        step = max(1, round(step))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    decimals = next((d for d in range(5) if math.isclose(round(step, d), step)), None)
    ticks = [(i * step, _label(i * step, decimals)) for i in range(first, last + 1)]
    return ticks, first * step, last * step


def _label(value: float, decimals: int | None) -> str:
    if abs(value) >= 10000:
        text = f"{value / 1000:g}k"
    elif decimals is None:  # a range of less than a thousandth
        text = f"{value:g}"
    else:
        text = f"{value + 0.0:.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def _draw(**content: Any) -> str:
    places = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": WIDTH - RIGHT, "base": HEIGHT - BOTTOM}
    blank = {"bars": (), "lines": (), "named": (), "most_markers": MOST_MARKERS}
    return TEMPLATES.get_template("chart.svg.jinja").render({**places, **blank, **content})
