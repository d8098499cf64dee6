"""Draw the picture of the two steps that the README shows, as an SVG that is legible in light and dark mode.

python -m docs.two_steps [--out docs/two_steps.svg]
"""

from pathlib import Path

import jinja2

from distillation.commandline import make_parser, parse_arguments
from distillation.errors import command
from wav2vec2.checkpoint import write_text

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

TEMPLATE = Path(__file__).with_name("two_steps.svg.jinja")


def height_of(layer: int) -> float:
    """Middle of the bar of a Transformer layer; layer 0 lies between the convolutions and layer 1."""
    if layer == 0:
        return height_of(1) + PITCH - 0.5
    return BOTTOM - (CONVS + layer) * PITCH - 8 + BAR / 2


def bars(left: float, kind: str) -> list[tuple[float, float, float, str]]:
    """Bars of a network, from the first convolution at the bottom to the last layer: x, y, width and colour of each.

    Args:
        left: x of its left edge.
        kind: "teacher", "masked" or "pruned".
    """
    found: list[tuple[float, float, float, str]] = []
    for i, live in enumerate((*CONV_LIVE, *LAYER_LIVE)):
        y = BOTTOM - (i + 1) * PITCH - (8 if i >= CONVS else 0)
        color = "teacher" if kind == "teacher" else ("conv" if i < CONVS else "layer")
        if kind == "masked":
            cell = FULL / UNITS
            alive = {(7 * k + 5 * i) % UNITS for k in range(live)}  # 7 and 12 have no common factor: all differ
            found += [(left + k * cell, y, cell - 1.5, color if k in alive else "off") for k in range(UNITS)]
        else:
            width = FULL if kind == "teacher" else FULL * live / UNITS
            found.append((left + (FULL - width) / 2, y, width - 1.5, color))
    return found


def draw() -> str:
    """The whole picture."""
    first, gap = 46, 104  # left edge of step 1; between teacher and student
    parts = [("CNN", BOTTOM - CONVS / 2 * PITCH), ("Transformer", BOTTOM - (2 * CONVS + LAYERS) / 2 * PITCH - 8)]
    return jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), keep_trailing_newline=True).render(
        width=WIDTH, height=HEIGHT, bottom=BOTTOM, full=FULL, bar=BAR, gap=gap, bars=bars, parts=parts, first=first,
        end=first + 2 * FULL + gap, second=WIDTH - 34 - 2 * FULL - gap, centre=(height_of(LAYERS) + BOTTOM) / 2,
        matched=[(layer, height_of(layer)) for layer in MATCHED],
    )  # fmt: skip


@command
def main() -> None:
    """Write the picture."""
    parser = make_parser(__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/two_steps.svg"), help="Where to write it.")
    write_text(parse_arguments(parser).out, draw())


if __name__ == "__main__":
    main()
