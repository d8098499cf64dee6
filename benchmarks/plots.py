"""What the benchmarks that draw leave: their numbers as JSON, and the figure as SVG."""

import io
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from wav2vec2.checkpoint import write_text


def as_svg(figure: Figure) -> str:
    """The figure's file, without a date."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def write(folder: Path, name: str, content: Any, figure: Figure) -> str:
    """Write ``name``.json and ``name``.svg; where they are, in words."""
    files = {folder / f"{name}.json": json.dumps(content, indent=1) + "\n", folder / f"{name}.svg": as_svg(figure)}
    for path, text in files.items():
        write_text(path, text)
    return ", ".join(map(str, files))
