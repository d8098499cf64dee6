"""Tables as text, for the terminal and in Markdown."""

import os
import platform
from collections.abc import Iterable, Sequence
from datetime import date

import torch


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Plain table: the first column flush left, the others flush right."""
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [[h.ljust(w) if i == 0 else h.rjust(w) for i, (h, w) in enumerate(zip(row, widths))]
             for row in (header, ["-" * w for w in widths], *rows)]  # fmt: skip
    return "\n".join("  ".join(line).rstrip() for line in lines)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Table in Markdown."""
    head, *lines = (f"| {' | '.join(row)} |" for row in (header, *rows))
    return "\n".join([head, "|---" * len(header) + "|", *lines])


def machine() -> str:
    """What the figures of a table come from: the date, cores and versions."""
    return f"{date.today()}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}"
