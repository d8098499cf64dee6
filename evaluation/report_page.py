"""The report as one HTML page that needs nothing else: no network, no script, light and dark."""

from __future__ import annotations

from collections.abc import Callable
from html import escape

from evaluation.cost import MIB, Speed
from evaluation.report_data import FINAL, PRUNED, TEACHER, ModelReport, Report, Step
from evaluation.svg import Series, bar_chart, line_chart

Value = Callable[[ModelReport], str | None]
MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--text:#1b1e23;--muted:#666f7a;--rule:#e3e6ea;--ghost:#f1f3f5;--outline:#b4bbc4;
--s0:#2f62c9;--s1:#c9661a;--s2:#2b8a57;--s3:#8a4fc2;--s4:#16808f;--s5:#c23a5c;--s6:#77756f;--s7:#94750f}
@media(prefers-color-scheme:dark){:root{--bg:#131519;--text:#e4e7eb;--muted:#98a1ac;--rule:#2a2f37;--ghost:#1d2127;
--outline:#5b6470;--s0:#7ba6f7;--s1:#eda063;--s2:#6cc795;--s3:#c29af0;--s4:#5dc3d1;--s5:#f28ba3;--s6:#b3b0a8;--s7:#dcbd5a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1128px;margin:0 auto;padding:44px 24px 64px}
.over{font-size:13px;color:var(--muted);margin-bottom:2px}
h1{font-size:26px;line-height:1.25;font-weight:650;letter-spacing:-.01em;margin:0 0 6px;overflow-wrap:anywhere}
h2{font-size:18px;font-weight:650;margin:44px 0 4px;padding-top:18px;border-top:1px solid var(--rule)}
h3{font-size:15px;font-weight:600;margin:22px 0 0}
p{margin:4px 0 0;color:var(--muted);max-width:74ch;overflow-wrap:anywhere}
.numbers{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:18px 24px;margin:26px 0 0;padding:0}
.numbers div{border-top:2px solid var(--text);padding-top:8px}
.numbers dd{margin:0;font-size:29px;line-height:1.2;font-weight:600;letter-spacing:-.02em;
font-variant-numeric:tabular-nums}
.numbers dt{font-size:13px;color:var(--muted)}
.numbers div{display:flex;flex-direction:column-reverse;justify-content:flex-end}
table{border-collapse:collapse;width:100%;margin-top:14px;font-variant-numeric:tabular-nums}
th,td{padding:7px 0 7px 14px;text-align:right;vertical-align:baseline;border-bottom:1px solid var(--rule);
font-weight:400}
th:first-child,td:first-child{text-align:left;padding-left:0}
thead th{font-weight:600;border-bottom-color:var(--outline)}
tbody th{color:var(--muted);overflow-wrap:anywhere}
.wide{overflow-x:auto}
td small{display:block;white-space:nowrap;color:var(--muted);font-size:12px;line-height:1.3}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,320px),1fr));gap:24px 24px;margin-top:16px}
figure{margin:0;min-width:0}
figcaption{font-size:14px}figcaption span{color:var(--muted)}
svg{display:block;width:100%;height:auto;margin-top:4px}
svg text{font-size:11px;fill:var(--muted);font-variant-numeric:tabular-nums}
svg text.value{font-size:9.5px;fill:var(--text)}
svg .grid{stroke:var(--rule);stroke-width:1}svg .zero{stroke:var(--outline)}
svg .line{fill:none;stroke-width:1.6;stroke-linejoin:round}svg .dashed{stroke-dasharray:4 3}
svg .outline{fill:var(--ghost);stroke:var(--outline);stroke-width:1}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;margin:4px 0 0;padding:0;list-style:none;font-size:12.5px;
color:var(--muted)}
.legend i{display:inline-block;width:16px;border-top:2px solid;vertical-align:middle;margin-right:6px}
.legend i.dashed{border-top-style:dashed}
.hash{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:12px;overflow-wrap:anywhere}
.files th:last-child,.files td:last-child{text-align:left}.files td:first-child{overflow-wrap:anywhere}
pre{margin:12px 0 0;padding:14px 16px;background:var(--ghost);overflow-x:auto;font:12.5px/1.5 ui-monospace,
SFMono-Regular,Menlo,Consolas,monospace}
details summary{cursor:pointer;margin-top:12px}
@media(max-width:520px){main{padding:26px 16px 44px}body{font-size:14px}.numbers{grid-template-columns:1fr 1fr}
.numbers dd{font-size:24px}table{font-size:13px}th,td{padding-left:8px}
td small{font-size:11px}}
"""


def render(report: Report) -> str:
    """The whole page."""
    sections = [
        _numbers(report),
        _before_after(report),
        _architecture(report),
        _layers(report),
        _training(report),
        _config(report),
        _provenance(report),
    ]
    notes = "".join(f"<p>{escape(note)}</p>" for note in report.notes)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(report.title)}: compression report</title><style>{STYLE}</style></head><body><main>"
        f"<div class=over>Compression report</div><h1>{escape(report.title)}</h1><p>{escape(_summary(report))}</p>"
        f"{notes}{''.join(sections)}</main></body></html>\n"
    )


def _result(report: Report) -> ModelReport:
    """The last model of the run."""
    return report.models[-1]


def _teacher(report: Report) -> ModelReport | None:
    return report.model(TEACHER)


def _summary(report: Report) -> str:
    teacher, result = _teacher(report), _result(report)
    if teacher is None:
        return f"A model of {_millions(result.cost.num_params)} parameters."
    text = f"{_millions(teacher.cost.num_params)} parameters compressed to {_millions(result.cost.num_params)}"
    how = {PRUNED: "by distillation and pruning, without the final distillation",
           FINAL: "by joint distillation and pruning, followed by a final distillation"}.get(result.name)  # fmt: skip
    if how is None:
        return f"{_millions(teacher.cost.num_params)} parameters distilled to {_millions(result.cost.num_params)}."
    return f"{text} {how}."


def _numbers(report: Report) -> str:
    teacher, result = _teacher(report), _result(report)
    entries = []
    speed = _speed(result, "cpu")
    if teacher is None:
        entries = [("parameters", _millions(result.cost.num_params)),
                   ("MACs for 10 s of audio", f"{result.cost.macs_10s / 1e9:.2f} G")]  # fmt: skip
        if speed is not None:
            entries.append(("CPU real-time factor", _factor(speed.real_time_factor)))
            if speed.peak_bytes is not None:
                entries.append(("memory for 10 s of audio", f"{speed.peak_bytes / MIB:.0f} MiB"))
    else:
        entries = [
            ("parameters", _change(result.cost.num_params, teacher.cost.num_params)),
            ("multiply-accumulates", _change(result.cost.macs_10s, teacher.cost.macs_10s)),
        ]
        before = _speed(teacher, "cpu")
        if speed is not None and before is not None:
            entries.append(("speed on the CPU", f"{before.real_time_factor / speed.real_time_factor:.1f}{TIMES}"))
        if (loss := _loss(result)) is not None:
            best = _loss(teacher)
            label = "held-out loss" if best is None else f"held-out loss (teacher {_signed(best, 3)})"
            entries.append((label, _signed(loss, 3)))
    tiles = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in entries)
    return f"<dl class=numbers>{tiles}</dl>"


def _before_after(report: Report) -> str:
    models = report.models
    teacher = _teacher(report)
    head = "".join(f"<th>{escape(model.name)}</th>" for model in models)
    rows: list[str] = []

    def row(name: str, value: Value, change: Value = lambda model: None) -> None:
        """A row, unless no model has the value; how it changed against the teacher below it."""
        cells = ""
        for model in models:
            note = change(model) if teacher is not None and model is not teacher else None
            cells += f"<td>{value(model) or ''}{f'<small>{note}</small>' if note else ''}</td>"
        if any(value(model) is not None for model in models):
            rows.append(f"<tr><th>{escape(name)}</th>{cells}</tr>")

    def relative(get: Callable[[ModelReport], float]) -> Value:
        return lambda model: _change(get(model), get(teacher)) if teacher is not None else None

    row("Parameters", lambda m: f"{m.cost.num_params:,}", relative(lambda m: m.cost.num_params))
    row("Distillation heads", lambda m: f"{m.cost.num_head_params:,}" if m.cost.num_head_params else None)
    row("Weights in memory, MiB", lambda m: f"{m.cost.loaded_bytes / MIB:.1f}")
    row("GMACs, 10 s", lambda m: f"{m.cost.macs_10s / 1e9:.2f}", relative(lambda m: m.cost.macs_10s))
    row("GMACs, SUPERB protocol", lambda m: f"{m.cost.macs_superb / 1e9:.1f}", relative(lambda m: m.cost.macs_superb))
    for device in dict.fromkeys(s.device for m in models for s in m.cost.speed):
        label = "CPU" if device == "cpu" else "GPU"

        def factor(m: ModelReport, device: str = device) -> str | None:
            speed = _speed(m, device)
            return _factor(speed.real_time_factor) if speed is not None else None

        def gain(m: ModelReport, device: str = device) -> str | None:
            old, new = _speed(teacher, device) if teacher is not None else None, _speed(m, device)
            return f"{old.real_time_factor / new.real_time_factor:.1f}{TIMES} faster" if old and new else None

        def memory(m: ModelReport, device: str = device) -> str | None:
            speed = _speed(m, device)
            return f"{speed.peak_bytes / MIB:.1f}" if speed is not None and speed.peak_bytes is not None else None

        row(f"{label} real-time factor", factor, gain)
        row(f"{label} peak memory, MiB", memory)
    row("Held-out loss", lambda m: _signed(loss, 4) if (loss := _loss(m)) is not None else None)
    for name in dict.fromkeys(name for m in models if m.held_out for name in m.held_out.terms):

        def term(m: ModelReport, name: str = name) -> str | None:
            return _signed(m.held_out.terms[name], 4) if m.held_out and name in m.held_out.terms else None

        row(f"Loss term {name}", term)
    text = f"Speed and memory for one utterance of 10 s; models timed in turns, medians; {report.versions['platform']}."
    if report.held_out_data is not None:
        text += f" Held-out loss: the objective of the recipe on {report.held_out_data}; lower is better"
        text += ", and the teacher has the lowest possible." if teacher and _loss(teacher) is not None else "."
    table = (
        f"<div class=wide><table><thead><tr><th></th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )
    return f"<h2>{'Before and after' if teacher else 'Cost'}</h2><p>{escape(text)}</p>{table}"


def _architecture(report: Report) -> str:
    teacher, found = _teacher(report), _result(report).architecture
    before = teacher.architecture if teacher is not None else None

    def bars(title: str, field: str, x_label: str) -> str:
        values = getattr(found, field)
        outline = getattr(before, field) if before is not None else None
        if outline is not None and (len(outline) != len(values) or any(o < v for o, v in zip(outline, values))):
            outline = None
        return bar_chart(title, values, outline, x_label=x_label)

    text = "Units per layer of the student"
    charts = (bars("Convolution channels", "conv", "conv layer") + bars("Attention heads", "heads", "Transformer layer")
              + bars("Feed-forward units", "interm", "Transformer layer"))  # fmt: skip
    text += "; outlines are the teacher." if 'class="outline"' in charts else "."
    return f"<h2>Architecture</h2><p>{text}</p><div class=grid>{charts}</div>"


def _layers(report: Report) -> str:
    compared = [m for m in report.models if m.held_out is not None and m.held_out.cosine]
    if not compared:
        return ""

    def chart(title: str, unit: str, get: Callable[[ModelReport], list[float]]) -> str:
        series = [
            Series(m.name, list(enumerate(get(m))), color=0 if m is compared[-1] else 1, markers=True) for m in compared
        ]
        return line_chart(title, series, x_label="layer (0: Transformer input)", unit=unit, from_zero=True)

    return (
        "<h2>Distance to the teacher, layer by layer</h2>"
        "<p>Hidden states as they are, without heads, on the held-out audio.</p><div class=grid>"
        + chart("1 \N{MINUS SIGN} cosine similarity", "", lambda m: m.held_out.cosine if m.held_out else [])
        + chart("L1", "mean absolute difference", lambda m: m.held_out.l1 if m.held_out else [])
        + "</div>"
    )


def _training(report: Report) -> str:
    parts = []
    for step in report.steps:
        charts = _curves(step)
        if charts:
            parts.append(f"<h3>{escape(step.name)}</h3><div class=grid>{charts}</div>")
    return f"<h2>Training</h2>{''.join(parts)}" if parts else ""


def _curves(step: Step) -> str:
    curves = step.curves

    def series(*names: tuple[str, str], color: int = 0) -> list[Series]:
        return [Series(label, curves[name], color=color + i) for i, (name, label) in enumerate(names) if name in curves]

    loss = series(("train/distill", "train"))
    if "valid/distill" in curves:
        loss.append(Series("held out", curves["valid/distill"], color=1, markers=True))
    terms = []
    names = [name.removeprefix("train/") for name in curves if name.startswith("train/")]
    for i, name in enumerate(n for n in names if n not in ("loss", "distill")):
        terms.append(Series(name, curves[f"train/{name}"], color=i))
        if f"valid/{name}" in curves:
            terms.append(Series(f"{name}, held out", curves[f"valid/{name}"], color=i, dashed=True, markers=True))
    sparsity = series(("sparsity/expected", "expected"))
    if "sparsity/target" in curves:
        sparsity.append(Series("target", curves["sparsity/target"], color=1, dashed=True))
    letter = "\u03bb"
    lambdas = series(("lagrangian/lambda1", f"{letter}1"), ("lagrangian/lambda2", f"{letter}2"))
    rates: dict[str, list[str]] = {}  # groups with one curve share a line
    for name in curves:
        if name.startswith("lr/"):
            same = next((first for first in rates if curves[first] == curves[name]), name)
            rates.setdefault(same, []).append(name.removeprefix("lr/"))
    rate_lines = [Series(", ".join(groups), curves[first], color=i) for i, (first, groups) in enumerate(rates.items())]
    return (
        line_chart("Distillation loss", loss, x_label="update")
        + line_chart("Loss terms", terms, x_label="update", unit="unweighted")
        + line_chart("Sparsity", sparsity, x_label="update", from_zero=True)
        + line_chart("Lagrange multipliers", lambdas, x_label="update")
        + line_chart("Learning rates", rate_lines, x_label="update", log=True)
        + line_chart("Throughput", series(("speed/audio_seconds_per_second", "")), x_label="update",
                     unit="seconds of audio per second", from_zero=True)
    )  # fmt: skip


def _config(report: Report) -> str:
    if report.config is None:
        return ""
    return (
        "<h2>Configuration</h2><details><summary>The resolved recipe</summary>"
        f"<pre>{escape(report.config)}</pre></details>"
    )


def _provenance(report: Report) -> str:
    versions = " \N{MIDDLE DOT} ".join(f"{name} {version}" for name, version in report.versions.items())
    rows = "".join(
        f"<tr><td>{escape(f.role)}</td><td>{f.num_bytes:,}</td><td><span class=hash>{f.sha256}</span></td></tr>"
        for f in report.files
    )
    table = f"<table class=files><thead><tr><th>file<th>bytes<th>SHA-256</tr></thead><tbody>{rows}</tbody></table>"
    return f"<h2>Versions and files</h2><p>{escape(versions)}</p>{table}"


def _loss(model: ModelReport) -> float | None:
    return model.held_out.loss if model.held_out is not None else None


def _speed(model: ModelReport, device: str) -> Speed | None:
    return next((speed for speed in model.cost.speed if speed.device == device), None)


def _factor(value: float) -> str:
    return f"{value:.4f}" if value >= 1e-3 else f"{value:.6f}"


def _millions(count: int) -> str:
    return f"{count / 1e6:.2f} M"


def _change(now: float, before: float) -> str:
    return _signed(100 * (now / before - 1), 1) + "\N{NARROW NO-BREAK SPACE}%"


def _signed(value: float, decimals: int) -> str:
    return f"{value:.{decimals}f}".replace("-", MINUS)
