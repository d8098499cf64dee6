"""What each block of a model takes on a machine, as a function of its live units: the table of evaluation.latency.

A table is a JSON file of plain numbers, so that one measured elsewhere, by whatever runs the model there, does as well:

    {"model": "teacher.pth", "config": {...}, "seconds": 10.0, "fixed": 1.9,
     "conv": [{"inputs": [1], "units": [32, 128, 512], "ms": [[0.4, 1.1, 4.2]]}, ...],
     "projection": {"units": [32, 128, 512], "ms": [0.1, 0.2, 0.5]},
     "attention": [{"layers": [0, 1, ...], "units": [1, 4, 12], "ms": [0.9, 3.0, 8.1]}, ...],
     "feed_forward": [{"layers": [0, 1, ...], "units": [64, 1024, 3072], "ms": [0.5, 4.4, 12.8]}, ...]}

``config`` is the flat one of the model, ``fixed`` what runs whatever is pruned, all times are milliseconds. Between the
sizes that were measured, times are straight lines; on surfaces over input and output channels, in both directions.
More units must not take less, with one exception: all units, often a round number for which a machine has faster code,
may take less than all but one of them (all but 8, where the table has ``"multiple_of": 8``).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from distillation.errors import UserError
from wav2vec2 import Wav2Vec2Model
from wav2vec2.architecture import Architecture, architecture
from wav2vec2.hardconcrete import Alive, alive_probabilities

MAX_TABLE_BYTES = 10_000_000
MAX_NUMBER = 1e9  # milliseconds of eleven days
MEASURE = "measure this one: python -m evaluation.latency TEACHER --out latency.json"
# of the flat config: what decides about times besides how many units there are
FRAME = (
    "extractor_mode", "extractor_conv_bias", "encoder_embed_dim", "encoder_use_projection",
    "encoder_projection_layer_norm", "encoder_pos_conv_kernel", "encoder_pos_conv_groups", "encoder_time_reduction",
    "encoder_num_layers", "encoder_layer_norm_first", "encoder_head_dim", "encoder_total_num_heads",
    "encoder_num_buckets", "encoder_reuse_attention", "encoder_reuse_softmax",
)  # fmt: skip


def read_latency(path: Path) -> LatencyTable:
    """The table in a file.

    Raises:
        UserError: no such file, or another kind.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: no such latency table; make it with python -m evaluation.latency TEACHER --out {path}"
        )
    if path.stat().st_size > MAX_TABLE_BYTES:
        raise UserError(f"{path}: too large for a latency table")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        content = None
    return LatencyTable(content, path)


class Axis(nn.Module):
    """Sizes that times were measured at; straight lines between them and beyond.

    A short last step, to all units, that rises less than the line before it is taken at all units alone: below them the
    line goes on. So an expected number of units never gains by growing, which would hold a layer whole in training.

    Args:
        units: [K] ascending.
        multiple_of: a last step of no more units is short.
    """

    units: Tensor

    def __init__(self, units: Tensor, multiple_of: int) -> None:
        super().__init__()
        self.register_buffer("units", units, persistent=False)
        self.sizes: list[float] = units.tolist()  # for numbers of units that the host knows
        self.short = len(units) > 1 and self.sizes[-2] > 0 and self.sizes[-1] - self.sizes[-2] <= multiple_of

    def _with_longer_line(self, ms: Tensor) -> tuple[Tensor, Tensor]:
        """Times whose last one is at least on the line before it, and what is then too much at all units."""
        *_, below, last, whole = 0.0, *self.sizes
        before = ms[..., -3] if len(self.sizes) > 2 else torch.zeros_like(ms[..., -2])
        line = ms[..., -2] + (ms[..., -2] - before) * ((whole - last) / (last - below))
        top = torch.maximum(ms[..., -1], line)
        return torch.cat([ms[..., :-1], top[..., None]], dim=-1), top - ms[..., -1]

    def interpolate(self, ms: Tensor, at: Tensor | float) -> Tensor:
        """From ``ms`` [..., K] to [...], at a number of units; never negative, differentiable in ``at``.

        Nothing here waits for a GPU.
        """
        if len(self.sizes) == 1:
            return ms[..., 0]
        if self.short:
            ms, too_much = self._with_longer_line(ms)
        if isinstance(at, Tensor):
            cell = (self.units[1:-1] <= at).sum()
            ends = torch.stack([cell, cell + 1])  # to index with a scalar would wait
            (low, high), (first, last) = self.units.index_select(0, ends), ms.index_select(-1, ends).unbind(-1)
        else:
            i = sum(size <= at for size in self.sizes[1:-1])
            low, high, first, last = self.sizes[i], self.sizes[i + 1], ms[..., i], ms[..., i + 1]
        found = first + (last - first) * ((at - low) / (high - low))
        if self.short:
            found = found - too_much * (at >= self.sizes[-1])
        return found.clamp(min=0)


class Curve(nn.Module):
    """Times over a number of units.

    Args:
        entry: of the table, ``{"units": [K], "ms": [K]}``.
        from_zero: begin at 0 units, by the line through the first two sizes.
        multiple_of: times may fall in a last step of so many units.
    """

    ms: Tensor

    def __init__(self, entry: Any, from_zero: bool = False, multiple_of: int = 1) -> None:
        super().__init__()
        units, ms = _numbers(entry["units"], 1), _numbers(entry["ms"], 1)
        _check(units, ms, multiple_of)
        if not units[-1] > 0:
            raise ValueError
        if from_zero and units[0] > 0:
            base = Axis(units, multiple_of).interpolate(ms, 0)
            units, ms = (
                torch.cat([first[None], rest]) for first, rest in ((torch.zeros_like(base), units), (base, ms))
            )
        self.axis = Axis(units, multiple_of)
        self.register_buffer("ms", ms, persistent=False)

    def forward(self, units: Tensor | float) -> Tensor:
        """Milliseconds of a number of units."""
        return self.axis.interpolate(self.ms, units)

    def expected(self, units: Tensor | float, exists: Tensor | float) -> Tensor:
        """Milliseconds of a block with an expected number of units that exists with a probability.

        What the curve has at 0 units is what the block takes as soon as it has one.
        """
        return self(units) - self.ms[0] + exists * self.ms[0]


class Surface(nn.Module):
    """Times over input and output channels.

    Args:
        entry: of the table, ``{"inputs": [I], "units": [K], "ms": [I][K]}``.
        multiple_of: times may fall in a last step of so many units.
    """

    ms: Tensor

    def __init__(self, entry: Any, multiple_of: int = 1) -> None:
        super().__init__()
        inputs, units, ms = _numbers(entry["inputs"], 1), _numbers(entry["units"], 1), _numbers(entry["ms"], 2)
        _check(units, ms, multiple_of)
        _check(inputs, ms.t(), multiple_of)
        self.inputs, self.units = Axis(inputs, multiple_of), Axis(units, multiple_of)
        self.register_buffer("ms", ms, persistent=False)

    def forward(self, num_in: Tensor | float, num_out: Tensor | float) -> Tensor:
        """Milliseconds of a convolution with so many input and output channels."""
        return self.units.interpolate(self.inputs.interpolate(self.ms.t(), num_in), num_out)


def _units(found: Architecture) -> list[int]:
    return [*found.conv, *found.heads, *found.interm]


def _numbers(values: Any, dims: int) -> Tensor:
    """Float64 with so many dimensions, none negative; ValueError or TypeError for anything else."""
    try:
        numbers = torch.tensor(values, dtype=torch.float64, device="cpu")
    except (OverflowError, RuntimeError):
        raise ValueError from None
    if numbers.dim() != dims or not (numbers <= MAX_NUMBER).all() or (numbers < 0).any():
        raise ValueError
    return numbers


def _check(units: Tensor, ms: Tensor, multiple_of: int) -> None:
    """Raises ValueError, unless sizes ascend, with a time for every one, and times fall in a short last step alone."""
    if not len(units) or ms.shape[-1] != len(units) or (units.diff() <= 0).any():
        raise ValueError
    if (ms[..., :-1] if Axis(units, multiple_of).short else ms).diff(dim=-1).lt(0).any():
        raise ValueError


def _by_layer(entries: Any, multiple_of: int) -> nn.ModuleDict:
    """Curves by the layers that they hold for."""
    found: dict[str, nn.Module] = {}
    for entry in entries:
        curve = Curve(entry, from_zero=True, multiple_of=multiple_of)
        if not all(type(layer) is int for layer in entry["layers"]):
            raise TypeError
        found |= {str(layer): curve for layer in entry["layers"]}
    return nn.ModuleDict(found)


class LatencyTable(nn.Module):
    """Milliseconds of a model, from those of its blocks.

    Args:
        content: of the file.
        source: the file, for messages.

    Raises:
        UserError: it is none.
    """

    def __init__(self, content: Any, source: object) -> None:
        super().__init__()
        self.content, self.source = content, source
        try:
            self.config: dict[str, Any] = dict(content["config"])
            self.seconds, self.fixed = _numbers([content["seconds"], content["fixed"]], 1).tolist()
            multiple_of = content.get("multiple_of", 1)
            if type(multiple_of) is not int or multiple_of < 1:
                raise ValueError
            self.conv = nn.ModuleList([Surface(entry, multiple_of) for entry in content["conv"]])
            self.projection = Curve(content["projection"], multiple_of=multiple_of)
            self.attention = _by_layer(content["attention"], multiple_of)
            self.feed_forward = _by_layer(content["feed_forward"], multiple_of)
            shapes = architecture(self.config)
            complete = (
                len(self.conv) == len(shapes.conv)
                and all(type(n) is int for n in _units(shapes))
                and all(
                    str(layer) in blocks or not units
                    for blocks, layers in ((self.attention, shapes.heads), (self.feed_forward, shapes.interm))
                    for layer, units in enumerate(layers)
                )
            )
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            complete = False
        if not complete:
            raise UserError(
                f"{source}: not a latency table, damaged, or with times that fall where units are added; {MEASURE}"
            )

    def check(self, model: Wav2Vec2Model) -> None:
        """Look whether the blocks of a model are those that were measured, or have fewer units.

        Raises:
            UserError: they are not.
        """
        own, other = self.config, model.config
        differ = [f"{key} {own.get(key)}, not {other.get(key)}" for key in FRAME if own.get(key) != other.get(key)]
        strides = [[list(layer[1:]) for layer in config["extractor_conv_layer_config"]] for config in (own, other)]
        if strides[0] != strides[1]:
            differ.append("other kernels or strides")
        if architecture(other).uneven:
            differ.append("heads of unequal width, whose times are not measured")
        if not differ:
            measured, found = architecture(own), architecture(other)
            for what in ("conv", "heads", "interm"):
                sizes, wanted = getattr(measured, what), getattr(found, what)
                if any(n > most for n, most in zip(wanted, sizes)):
                    differ.append(f"{what} of {sizes}, not {wanted}")
        if differ:
            raise UserError(f"{self.source} is of another model ({'; '.join(differ)}): {MEASURE}")

    def forward(self, model: Wav2Vec2Model, alive: Alive | None = None) -> Tensor:
        """Expected milliseconds as a float64 scalar, differentiable in every ``log_alpha``: rising never makes it less.

        At 0/1 masks it is what the table says of the pruned model. In between the straight lines are taken at the
        expected numbers of units, and what a block takes by itself counts with the probability that it exists.
        """
        alive = alive or alive_probabilities(model.masks().values())
        channels = model.feature_extractor.num_live(alive)
        attention, feed_forward = cast(dict[str, Curve], self.attention), cast(dict[str, Curve], self.feed_forward)
        total = self.projection(channels[-1]) + self.fixed
        for surface, num_in, num_out in zip(self.conv, [1, *channels], channels):
            total = total + surface(num_in, num_out)
        transformer = model.encoder.transformer
        for i, (layer, source) in enumerate(zip(transformer.layers, transformer.attention_sources())):
            if layer.attention is not None and source is not None and layer.attention.num_heads:
                total = total + attention[str(i)].expected(*layer.attention.num_live(alive, source))
            if layer.feed_forward is not None:
                total = total + feed_forward[str(i)].expected(*layer.feed_forward.num_live(alive))
        return total
