"""Latency tables for tiny models, made from a formula instead of a machine, and every cost of such a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distillation.budget import Cost, Milliseconds, MultiplyAccumulates, Parameters
from distillation.latency import LatencyTable
from wav2vec2.architecture import architecture

LENGTHS = [500, 333]  # samples of the utterances whose multiply-accumulates count


def latency_content(config: dict[str, Any]) -> dict[str, Any]:
    """A table in which blocks take some time by themselves, and each further unit takes more than the last.

    Args:
        config: flat, of the model that it is of.
    """
    found = architecture(config)
    channels = [1, *found.conv]
    conv = []
    for num_in, num_out in zip(channels, found.conv):
        inputs, units = _sizes(num_in), _sizes(num_out)
        conv.append(
            {"inputs": inputs, "units": units, "ms": [[0.3 + (a * b) ** 1.2 / 50 for b in units] for a in inputs]}
        )
    blocks = {}
    for name, counts, each in (("attention", found.heads, 0.4), ("feed_forward", found.interm, 0.03)):
        layers = {n: [i for i, count in enumerate(counts) if count == n] for n in counts if n}
        blocks[name] = [
            {"layers": which, "units": _sizes(n), "ms": [0.2 + each * units**1.1 for units in _sizes(n)]}
            for n, which in layers.items()
        ]
    last = _sizes(found.conv[-1])
    projection = {"units": last, "ms": [0.1 + n / 40 for n in last]}
    return {
        "model": "tiny",
        "config": config,
        "seconds": 1.0,
        "fixed": 0.7,
        "conv": conv,
        "projection": projection,
        **blocks,
    }


def _sizes(num_units: int) -> list[int]:
    return sorted({max(1, num_units // 4), max(1, num_units // 2), num_units})


def write_latency(path: Path, config: dict[str, Any], factor: float = 1.0) -> Path:
    """The same as a file; ``factor`` scales what runs whatever is pruned, so that the file is another."""
    content = latency_content(config)
    path.write_text(json.dumps({**content, "fixed": factor * content["fixed"]}))
    return path


def costs_of(config: dict[str, Any]) -> dict[str, Cost]:
    """Every cost by its name, for models with the blocks of ``config``."""
    table = LatencyTable(latency_content(config), "latency.json")
    costs = (Parameters(), MultiplyAccumulates(LENGTHS), Milliseconds(table))
    return {cost.name: cost for cost in costs}
