"""Draw the picture of the two steps that the README shows, as an SVG that is legible in light and dark mode.

python -m docs.two_steps [--out docs/two_steps.svg]
"""

from __future__ import annotations

from pathlib import Path

from distillation.commandline import make_parser, parse_arguments
from distillation.errors import command
from wav2vec2.checkpoint import replacing

WIDTH, HEIGHT = 980, 456
BAR, PITCH = 10, 15  # height of a layer, and from one layer to the next
FULL = 132  # width of an unpruned layer
UNITS = 12  # cells that stand for the units of a layer
BOTTOM = 372  # lower end of the networks
CONVS, LAYERS = 7, 12
MATCHED = (0, 4, 8, 12)
# Cells that live per layer, for the eye only; the first and last convolutions are pruned most, as in the paper.
CONV_LIVE = (3, 8, 10, 11, 10, 8, 4)
LAYER_LIVE = (4, 5, 3, 7, 3, 4, 3, 7, 3, 2, 3, 6)

STYLE = """
svg{--bg:#fff;--text:#1b1e23;--muted:#666f7a;--teacher:#aab2bc;--conv:#2b8a57;--layer:#2f62c9;--off:#e6eaee;--match:#c9661a}
@media(prefers-color-scheme:dark){svg{--bg:#131519;--text:#e4e7eb;--muted:#98a1ac;--teacher:#59626d;--conv:#6cc795;
--layer:#7ba6f7;--off:#262b32;--match:#eda063}}
text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;font-size:13px;
fill:var(--muted);text-anchor:middle}
.head{font-size:17px;font-weight:600;fill:var(--text)}.name{font-weight:600;fill:var(--text)}
.part{font-size:11.5px}.formula{fill:var(--text)}.index{font-size:11px;fill:var(--match)}
.match{stroke:var(--match);stroke-width:1.4;stroke-dasharray:4 3;fill:none}.tip{fill:var(--match)}
.flow{stroke:var(--muted);stroke-width:1.4;fill:none}.flowtip{fill:var(--muted)}
"""


def height_of(layer: int) -> float:
    """Middle of the bar of a Transformer layer; layer 0 lies between the convolutions and layer 1."""
    if layer == 0:
        return height_of(1) + PITCH - 0.5
    return BOTTOM - (CONVS + layer) * PITCH - 8 + BAR / 2


def network(left: float, kind: str) -> str:
    """One network, from the first convolution at the bottom to the last layer at the top.

    Args:
        left: x of its left edge.
        kind: "teacher", "masked" or "pruned".
    """
    parts = []
    for i in range(CONVS + LAYERS):
        live = (*CONV_LIVE, *LAYER_LIVE)[i]
        y = BOTTOM - (i + 1) * PITCH - (8 if i >= CONVS else 0)
        color = "teacher" if kind == "teacher" else ("conv" if i < CONVS else "layer")
        if kind == "masked":
            cell = FULL / UNITS
            alive = {(7 * k + 5 * i) % UNITS for k in range(live)}  # 7 and 12 have no common factor: all differ
            for k in range(UNITS):
                fill = color if k in alive else "off"
                parts.append(_rect(left + k * cell, y, cell - 1.5, f"var(--{fill})"))
        else:
            width = FULL if kind == "teacher" else FULL * live / UNITS
            parts.append(_rect(left + (FULL - width) / 2, y, width - 1.5, f"var(--{color})"))
    return "".join(parts)


def step(left: float, title: str, student: str, kind: str, formula: str) -> str:
    """One step: teacher, student, matched layers and loss."""
    right = left + FULL + 104
    parts = [
        _text(left + (right - left + FULL) / 2, 38, title, "head"),
        _text(left + FULL / 2, 66, "Teacher, frozen", "name"),
        _text(right + FULL / 2, 66, student, "name"),
        network(left, "teacher"),
        network(right, kind),
    ]
    for word, low, high in (("CNN", 0, CONVS), ("Transformer", CONVS, CONVS + LAYERS)):
        y = BOTTOM - (low + high) / 2 * PITCH - (8 if low else 0)
        parts.append(f'<g transform="translate({left - 12} {y}) rotate(-90)">{_text(0, 0, word, "part")}</g>')
    for layer in MATCHED:
        y = height_of(layer)
        end = right - 8
        parts.append(f'<path class="match" d="M{left + FULL + 6} {y}H{end - 6}"/>')
        parts.append(f'<path class="tip" d="M{end} {y}l-8-4v8z"/>')
        parts.append(_text(left + FULL + 50, y - 5, f"layer {layer}", "index"))
    middle = left + FULL + 52
    parts.append(_text(middle, BOTTOM + 34, "unlabelled speech"))
    for x in (left + FULL / 2, right + FULL / 2):
        turn = middle + (-66 if x < middle else 66)
        parts.append(f'<path class="flow" d="M{turn} {BOTTOM + 30}H{x}V{BOTTOM + 14}"/>')
        parts.append(f'<path class="flowtip" d="M{x} {BOTTOM + 6}l-4 8h8z"/>')
    parts.append(_text(middle, BOTTOM + 66, formula, "formula"))
    return "".join(parts)


def draw() -> str:
    """The whole picture."""
    lam = "\u03bb"
    minus = "\N{MINUS SIGN}"
    penalty = f"{lam}\u2081(s {minus} t) + {lam}\u2082(s {minus} t)\u00b2"
    first, second = 46, WIDTH - 34 - 2 * FULL - 104
    gap = (first + 2 * FULL + 104, second)
    y = (height_of(LAYERS) + BOTTOM) / 2
    body = (
        step(
            first,
            "1  Distil and prune jointly",
            "Student with masks",
            "masked",
            f"loss = L1 {minus} cosine + {penalty}",
        )
        + step(second, "2  Distil again", "Pruned student", "pruned", f"loss = L1 {minus} cosine")
        + f'<path class="flow" d="M{gap[0] + 24} {y}H{gap[1] - 32}"/>'
        + f'<path class="flowtip" d="M{gap[1] - 24} {y}l-9-4.5v9z"/>'
        + _text((gap[0] + gap[1]) / 2, y - 10, "prune", "name")
    )
    label = "Step 1 distils and prunes a copy of the teacher jointly; step 2 distils the pruned student again."
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">'
        f'<style>{STYLE}</style><rect width="{WIDTH}" height="{HEIGHT}" rx="8" style="fill:var(--bg)"/>{body}</svg>\n'
    )


def _rect(x: float, y: float, width: float, fill: str) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{BAR}" rx="1.5" style="fill:{fill}"/>'


def _text(x: float, y: float, text: str, style: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}"{f" class={style!r}" if style else ""}>{text}</text>'


@command
def main() -> None:
    """Write the picture."""
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/two_steps.svg"), help="Where to write it.")
    with replacing(parse_arguments(parser).out) as temporary:
        temporary.write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    main()
