"""The report as one HTML page that needs nothing else: no network, no script, light and dark.

What the page says is chosen and formatted here; its markup is report.html.jinja in the frame of page.html.jinja, its
style report.css.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from evaluation.cost import MIB
from evaluation.report_data import BudgetReport, ModelReport, Page, Report, format_ms
from evaluation.subjects import FINAL, PRUNED, Step
from evaluation.svg import TEMPLATES, Series, bar_chart, line_chart
from wav2vec2.architecture import Architecture

Value = Callable[[ModelReport], float | None]
Row = tuple[str, list[tuple[str, str]]]  # name; per model a value, and how it differs from the teacher's
UNITS = (
    ("Convolution channels", "conv", "conv layer"),
    ("Attention heads", "heads", "Transformer layer"),
    ("Feed-forward units", "interm", "Transformer layer"),
)
CHANNELS = ("Channels of queries and values", "channels", "Transformer layer")
COSTS = {
    "params": ("parameters", "parameters, M", 1e6),
    "macs": ("multiply-accumulates", "GMACs", 1e9),
    "milliseconds": ("milliseconds", "ms", 1.0),
}  # name in recipes -> (in words, unit of its chart, how many make one)
RATES = {"wer": "word error rate", "cer": "character error rate"}
DEVICES = (("cpu", "CPU"), ("cuda", "GPU"))
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"


def render(report: Report) -> str:
    """The whole page."""
    architecture, outlined = _architecture(report)
    return TEMPLATES.get_template("report.html.jinja").render(
        report=report,
        teacher=report.teacher,
        summary=_summary(report),
        tiles=_tiles(report),
        rows=table_rows(report),
        architecture=architecture,
        outlined=outlined,
        layers=_layers(report),
        training=[(step, charts) for step in report.steps if (charts := _curves(step, report.budget))],
    )


def _summary(report: Report) -> str:
    teacher, result = report.teacher, report.models[-1]
    size = millions(result.cost.num_params)
    if teacher is None:
        return f"A model of {size} parameters."
    how = {PRUNED: " by distillation and pruning, without the final distillation",
           FINAL: " by joint distillation and pruning, followed by a final distillation"}.get(result.name)  # fmt: skip
    done = "compressed" if how else "distilled"
    budget = "" if report.budget is None else f" {report.budget.text}."
    return f"{millions(teacher.cost.num_params)} parameters {done} to {size}{how or ''}.{budget}"


def _tiles(report: Report) -> list[tuple[str, str]]:
    """The numbers at the top: name, value."""
    teacher, result = report.teacher, report.models[-1]
    cost, speed = result.cost, result.speed("cpu")
    if teacher is None:
        tiles = [("parameters", millions(cost.num_params)), ("MACs for 10 s of audio", f"{cost.macs_10s / 1e9:.2f} G")]
        if speed is not None:
            tiles.append(("CPU milliseconds, 10 s", format_ms(speed.milliseconds)))
            if speed.peak_bytes is not None:
                tiles.append(("memory for 10 s of audio", f"{speed.peak_bytes / MIB:.0f} MiB"))
        return tiles
    tiles = [("parameters", _change(cost.num_params, teacher.cost.num_params)),
             ("multiply-accumulates", _change(cost.macs_10s, teacher.cost.macs_10s))]  # fmt: skip
    before = teacher.speed("cpu")
    if speed is not None and before is not None:
        tiles.append(("CPU milliseconds, 10 s", _change(speed.milliseconds, before.milliseconds)))
    if result.loss is not None:
        best = "" if teacher.loss is None else f" (teacher {_signed(teacher.loss, 3)})"
        tiles.append((f"held-out loss{best}", _signed(result.loss, 3)))
    return tiles


def table_rows(page: Page, sparsity: bool = False) -> list[Row]:
    """The table of models side by side.

    Args:
        page: its models.
        sparsity: with a row of its own, instead of how the parameters changed.
    """
    rows = []

    def none(now: float, before: float) -> str:
        return ""

    def row(
        name: str, value: Value, text: Callable[[float], str], change: Callable[[float, float], str] = none
    ) -> None:
        """A row, unless no model has the value."""
        cells = []
        for model in page.models:
            now = value(model)
            teacher = page.model(model.teacher)
            before = value(teacher) if teacher is not None else None
            changed = "" if now is None or before is None else change(now, before)
            cells.append(("" if now is None else text(now), changed))
        if any(text for text, _ in cells):
            rows.append((name, cells))

    def speed(device: str, field: str) -> Value:
        return lambda model: getattr(model.speed(device), field, None)

    def term(name: str) -> Value:
        return lambda model: model.held_out.terms.get(name) if model.held_out else None

    def rate(name: str) -> Value:
        return lambda model: model.held_out.rates.get(name) if model.held_out else None

    def faster(now: float, before: float) -> str:
        return f"{before / now:.1f}{TIMES} faster"

    def mib(num_bytes: float) -> str:
        return f"{num_bytes / MIB:.1f}"

    row("Parameters", lambda m: m.cost.num_params, "{:,}".format, none if sparsity else _change)
    if sparsity:
        row("Sparsity (parameters)", lambda m: m.sparsity, lambda share: percent(100 * share))
    row("Distillation heads", lambda m: m.cost.num_head_params or None, "{:,}".format)
    row("Weights in memory, MiB", lambda m: m.cost.loaded_bytes, mib)
    row("GMACs, 10 s", lambda m: m.cost.macs_10s / 1e9, "{:.2f}".format, _change)
    row("GMACs, SUPERB protocol", lambda m: m.cost.macs_superb / 1e9, "{:.1f}".format, _change)
    for device, label in DEVICES:
        row(f"{label} milliseconds, 10 s", speed(device, "milliseconds"), format_ms, faster)
    row(f"Milliseconds by {page.latency}", lambda m: m.table_ms, format_ms, faster)
    for device, label in DEVICES:
        row(f"{label} peak memory, MiB", speed(device, "peak_bytes"), mib)
    row("Held-out loss", lambda m: m.loss, _signed)
    for name in dict.fromkeys(name for m in page.models if m.held_out for name in m.held_out.terms):
        row(f"Loss term {name}", term(name), _signed)
    for name, label in RATES.items():
        row(f"Held-out {label}", rate(name), percent)
    return rows


def _architecture(report: Report) -> tuple[list[str], bool]:
    """A chart per kind of unit, and whether one of them shows the teacher, too."""
    found, charts, outlined = report.models[-1].architecture, [], False
    for title, kind, x_label in units_of([found]):
        before = outline_of(report.teacher, found, kind)
        charts.append(bar_chart(title, getattr(found, kind), before, x_label=x_label))
        outlined = outlined or before is not None
    return charts, outlined


def units_of(found: Iterable[Architecture]) -> tuple[tuple[str, str, str], ...]:
    """What is drawn per layer: title, field of the architecture, label of the axis."""
    return (*UNITS[:2], CHANNELS, *UNITS[2:]) if any(one.uneven for one in found) else UNITS


def outline_of(teacher: ModelReport | None, found: Architecture, kind: str) -> list[int] | None:
    """Units that the teacher has per layer, where the student may have come from it.

    Args:
        teacher: if any.
        found: the student's.
        kind: of unit, a field of both.
    """
    values = getattr(found, kind)
    before = getattr(teacher.architecture, kind) if teacher is not None else None
    fits = before is not None and len(before) == len(values) and all(b >= v for b, v in zip(before, values))
    return before if fits else None


def _layers(report: Report) -> list[str]:
    """Charts of the distance per layer; the last model has the colour of its other charts."""
    colors = {model.name: int(model is not report.models[-1]) for model in report.models}
    return layer_charts(report.models, colors)


def layer_charts(models: Sequence[ModelReport], colors: Mapping[str, int | None], legend: bool = True) -> list[str]:
    """Charts of the distance per layer, where it is known of a model.

    Args:
        models: one line each.
        colors: by the names of the models.
        legend: in the charts.
    """

    def chart(title: str, field: str, unit: str = "") -> str:
        series = [Series(m.name, list(enumerate(getattr(m.held_out, field))), colors[m.name], markers=True)
                  for m in models if m.held_out is not None]  # fmt: skip
        return line_chart(title, series, x_label="layer (0: Transformer input)", unit=unit, from_zero=True,
                          legend=legend)  # fmt: skip

    charts = chart(f"1 {MINUS} cosine similarity", "cosine"), chart("L1", "l1", "mean absolute difference")
    return [chart for chart in charts if chart]


def _curves(step: Step, budget: BudgetReport | None) -> list[str]:
    """Charts of the metrics that the step has.

    Args:
        step: of training.
        budget: of the run, where it is known.
    """
    curves = step.curves

    def line(column: str, name: str, **style: Any) -> list[Series]:
        return [Series(name, curves[column], **style)] if column in curves else []

    train = (column.removeprefix("train/") for column in curves if column.startswith("train/"))
    terms = []
    for i, name in enumerate(name for name in train if name not in ("loss", "distill")):
        terms += line(f"train/{name}", name, color=i)
        terms += line(f"valid/{name}", f"{name}, held out", color=i, dashed=True, markers=True)
    rates: dict[str, list[str]] = {}  # groups with one curve share a line
    for column in curves:
        if column.startswith("lr/"):
            same = next((first for first in rates if curves[first] == curves[column]), column)
            rates.setdefault(same, []).append(column.removeprefix("lr/"))
    rate_lines = [Series(", ".join(groups), curves[first], color=i) for i, (first, groups) in enumerate(rates.items())]
    loss = line("train/distill", "train") + line("valid/distill", "held out", color=1, markers=True)
    sparsity = line("sparsity/expected", "expected") + line("sparsity/target", "target", color=1, dashed=True)
    cost = next((name for name in COSTS if f"cost/{name}" in curves), "params")  # older runs have no such column
    what, unit, scale = COSTS[cost]
    costs = [Series("expected", [(step, value / scale) for step, value in curves.get(f"cost/{cost}", [])])]
    if budget is not None and budget.cost == cost and costs[0].points:
        target = [(step, budget.before * (1 - share) / scale) for step, share in curves.get("sparsity/target", [])]
        costs.append(Series("target", target, color=1, dashed=True))
        unit = unit if cost == "params" else budget.unit
    lambdas = line("lagrangian/lambda1", "\u03bb1") + line("lagrangian/lambda2", "\u03bb2", color=1)
    errors = [s for i, name in enumerate(RATES) for s in line(f"valid/{name}", RATES[name], color=i, markers=True)]
    speed = line("speed/audio_seconds_per_second", "")
    chart = partial(line_chart, x_label="update")
    charts = (
        chart("Distillation loss", loss),
        chart("Loss terms", terms, unit="unweighted"),
        chart("Error rates, held out", errors, unit="%", from_zero=True),
        chart("Sparsity", sparsity, unit=f"share of the teacher's {what} that is gone", from_zero=True),
        chart("Expected cost", costs, unit=unit, from_zero=True),
        chart("Lagrange multipliers", lambdas),
        chart("Learning rates", rate_lines, log=True),
        chart("Throughput", speed, unit="seconds of audio per second", from_zero=True),
    )
    return [chart for chart in charts if chart]


def millions(count: int) -> str:
    """A number of parameters."""
    return f"{count / 1e6:.2f} M"


def _change(now: float, before: float) -> str:
    return percent(100 * (now / before - 1))


def percent(value: float) -> str:
    """With one decimal."""
    return _signed(value, 1) + "\N{NARROW NO-BREAK SPACE}%"


def _signed(value: float, decimals: int = 4) -> str:
    return f"{value:.{decimals}f}".replace("-", MINUS)
