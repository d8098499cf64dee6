"""A latency table as a page: what blocks take by their units, and predictions against what whole models take."""

from typing import Any

from evaluation.report_data import Page, versions
from evaluation.svg import TEMPLATES, Series, line_chart


def render(content: dict[str, Any]) -> str:
    """The whole page, from the content of the table."""
    measured = content["measured"]
    where = measured["gpu"] if content["device"] == "cuda" else f"{measured['cpu']}, {measured['threads']} thread(s)"
    return TEMPLATES.get_template("latency.html.jinja").render(
        report=Page(content["model"], {}, versions=versions()),
        summary=f"One utterance of {content['seconds']:g} s on {where}, {measured['date']}.",
        check=_check(content["check"]),
        convolutions=_convolutions(content["conv"]),
        blocks=[chart for name, x_label in (("attention", "heads"), ("feed_forward", "FFN units"))
                for chart in _blocks(name, x_label, content[name])],
    )  # fmt: skip


def _check(pairs: list[list[float]]) -> str:
    """Predicted against measured; the line is where they are equal."""
    reach = max(max(pair) for pair in pairs)
    dots = [Series("", [(measured, predicted)], 0) for predicted, measured in pairs]
    diagonal = Series("", [(0.0, 0.0), (reach, reach)], None)
    return line_chart("Predicted", [diagonal, *dots], x_label="measured, ms", unit="ms, whole models of random sizes",
                      from_zero=True, x_reach=reach, legend=False)  # fmt: skip


def _convolutions(layers: list[dict[str, Any]]) -> str:
    """Each layer with all of its input channels."""
    lines = [Series(f"layer {i + 1}", list(zip(layer["units"], layer["ms"][-1])), i, markers=True)
             for i, layer in enumerate(layers)]  # fmt: skip
    return line_chart("Convolutions", lines, x_label="channels", unit="ms, with all channels below", from_zero=True)


def _blocks(name: str, x_label: str, kinds: list[dict[str, Any]]) -> list[str]:
    lines = [Series(f"layers {', '.join(str(i + 1) for i in kind['layers'])}",
                    list(zip(kind["units"], kind["ms"])), i, markers=True) for i, kind in enumerate(kinds)]  # fmt: skip
    title = name.replace("_", "-").capitalize()
    chart = line_chart(title, lines, x_label=x_label, unit="ms, one layer", from_zero=True)
    return [chart] if chart else []
