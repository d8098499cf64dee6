"""Several runs and models on one HTML page, in the frame and the style of the report.

What the page says is chosen and formatted here; its markup is compare.html.jinja. Every model has one colour.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from evaluation.compare_data import Comparison
from evaluation.report_page import COSTS, DEVICES, MINUS, layer_charts, millions, outline_of, table_rows, units_of
from evaluation.subjects import ONE_STEP, STEP_1, STEP_2, Curve
from evaluation.svg import TEMPLATES, Series, bar_chart, line_chart


def render(page: Comparison) -> str:
    """The whole page."""
    colors: dict[str, int | None] = {model.name: None for model in page.models}  # grey for teachers
    colors.update((name, i) for i, name in enumerate(page.students))

    def lines(names: Iterable[str]) -> list[Series]:
        """Of a legend."""
        return [Series(name, [], colors[name]) for name in names]

    return TEMPLATES.get_template("compare.html.jinja").render(
        report=page,
        summary=_summary(page),
        rows=table_rows(page, sparsity=True),
        colors=colors,
        quality_lines=lines(name for name in colors if page.quality_of(name) is not None),
        layer_lines=lines(model.name for model in page.models if model.held_out and model.held_out.cosine),
        run_lines=lines(page.runs),
        quality=_quality(page, colors),
        layers=layer_charts(page.models, colors, legend=False),
        architecture=_architecture(page, colors),
        training=_training(page, colors),
        settings=[(name, [_value(values.get(run, "")) for run in page.runs]) for name, values in page.settings.items()],
    )


def _summary(page: Comparison) -> str:
    num_runs = len(page.runs)
    num_files = len(page.students) - num_runs
    counts = [f"{count} {what}{'s' if count > 1 else ''}"
              for count, what in ((num_runs, "run"), (num_files, "model file")) if count]  # fmt: skip
    by = ", each run by its last model" if num_runs else ""
    sizes = [model.cost.num_params for model in page.models if model.name in page.students]
    return f"{' and '.join(counts)}{by}: {millions(min(sizes))} to {millions(max(sizes))} parameters."


def _quality(page: Comparison, colors: dict[str, int | None]) -> list[str]:
    """Charts of what the models are worth: the loss or the distance against every cost, loss terms against size."""

    def chart(title: str, values: Mapping[str, float | None], unit: str, x_label: str) -> str:
        at = costs[x_label]
        known = {name: value for name, value in values.items() if value is not None and name in at}
        reach = max((at[name] for name in at if page.quality_of(name) is not None), default=None)
        dots = [Series(name, [(at[name], value)], colors[name]) for name, value in known.items()]
        family = sorted((at[name], known[name]) for name in page.runs if name in known)
        joined = [Series("", family, color=None)] if page.one_objective and len(family) > 1 else []
        return line_chart(title, joined + dots, x_label=x_label, unit=unit, x_reach=reach, legend=False)

    if page.quality is None:
        return []
    size = "parameters, M"
    costs = {size: {model.name: model.cost.num_params / 1e6 for model in page.models}}
    costs["GMACs, 10 s"] = {model.name: model.cost.macs_10s / 1e9 for model in page.models}
    for device, label in DEVICES:
        speeds = {model.name: model.speed(device) for model in page.models}
        costs[f"{label} milliseconds, 10 s"] = {name: s.milliseconds for name, s in speeds.items() if s is not None}
    costs[f"milliseconds by {page.latency}"] = {m.name: m.table_ms for m in page.models if m.table_ms is not None}
    title = "Held-out loss" if page.quality == "loss" else f"1 {MINUS} cosine similarity, mean over layers"
    quality = {model.name: page.quality_of(model.name) for model in page.models}
    charts = [chart(title, quality, "lower is better", x_label) for x_label in costs]
    if page.quality == "loss":
        held_out = {model.name: model.held_out for model in page.models if model.held_out is not None}
        for term in dict.fromkeys(term for distance in held_out.values() for term in distance.terms):
            values = {name: distance.terms.get(term) for name, distance in held_out.items()}
            charts.append(chart(f"Loss term {term}", values, "unweighted", size))
    return [chart for chart in charts if chart]


def _architecture(page: Comparison, colors: dict[str, int | None]) -> list[tuple[str, list[str]]]:
    """Per kind of unit a chart for every model, all on one scale."""
    found = []
    models = [model for model in page.models if model.name in page.students]
    for title, kind, x_label in units_of(model.architecture for model in models):
        outlines = [outline_of(page.model(model.teacher), model.architecture, kind) for model in models]
        highest = max(max(row) for model, outline in zip(models, outlines)
                      for row in (getattr(model.architecture, kind), outline or [1]))  # fmt: skip
        charts = [
            bar_chart(model.name, getattr(model.architecture, kind), outline, x_label=x_label,
                      color=colors[model.name] or 0, highest=highest)
            for model, outline in zip(models, outlines)
        ]  # fmt: skip
        found.append((title, charts))
    return found


def _training(page: Comparison, colors: dict[str, int | None]) -> list[tuple[str, list[str]]]:
    """Per training step the charts of all runs that have it."""
    found = []
    of = f"the teacher's {COSTS[page.costs[0]][0]}" if len(page.costs) == 1 else "each run's own cost"
    for name in (STEP_1, STEP_2, ONE_STEP):
        curves = {run: step.curves for run, steps in page.steps.items() for step in steps if step.name == name}

        def lines(column: str, curves: dict[str, dict[str, Curve]] = curves, **style: Any) -> list[Series]:
            return [Series(run, own[column], colors[run], **style) for run, own in curves.items() if column in own]

        charts = [
            line_chart("Distillation loss", lines("train/distill"), x_label="update", unit="training", legend=False),
            line_chart("Distillation loss", lines("valid/distill", markers=True), x_label="update", unit="held out",
                       legend=False),
            line_chart("Sparsity", lines("sparsity/target", dashed=True) + lines("sparsity/expected"),
                       x_label="update", unit=f"share of {of}; dashed: its target", from_zero=True,
                       legend=False),
        ]  # fmt: skip
        if any(charts):
            found.append((name, [chart for chart in charts if chart]))
    return found


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
