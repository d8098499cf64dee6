"""Files of features: which layers, and .npy and .safetensors written whole or piece by piece."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
from torch import Tensor

from distillation.errors import UserError
from wav2vec2 import Wav2Vec2Model
from wav2vec2.feature_extractor import SAMPLE_RATE
from wav2vec2.safetensors import make_header
from wav2vec2.windows import Window, make_windows


@dataclass
class FeatureOptions:
    """What to extract, and how."""

    layers: str = "last"
    """all, last, or numbers such as 0,4,8,12."""
    format: Literal["npy", "safetensors"] = "npy"
    """Of the files written."""
    window: float = 40.0
    """Seconds computed at once, of one file or of several: bounds the memory, changes nothing."""
    span: float = 1800.0
    """Seconds in which all frames attend to each other; longer files are cut into spans, and time grows with it."""
    context: float = 300.0
    """Seconds by which spans overlap on either side."""

    def layer_numbers(self, num_layers: int) -> list[int]:
        """``layers`` as numbers: 0 is the Transformer's input, L the last layer, as -1 is."""
        text = self.layers
        if text == "all":
            return list(range(num_layers + 1))
        try:
            layers = [num_layers] if text == "last" else [int(word) for word in text.split(",")]
        except ValueError:
            raise UserError(f"--layers {text}: give all, last, or numbers such as 0,4,{num_layers}") from None
        layers = [layer + num_layers + 1 if layer < 0 else layer for layer in layers]
        if len(set(layers)) != len(layers) or not all(0 <= layer <= num_layers for layer in layers):
            raise UserError(
                f"--layers {text}: the model has layers 0 (the Transformer's input) to {num_layers}, each once"
            )
        return layers

    def check(self, model: Wav2Vec2Model) -> None:
        """Refuse what the model cannot do; UserError."""
        self.layer_numbers(model.num_layers)
        if not 0 < self.window < math.inf:
            raise UserError(f"--window {self.window:g}: must be a number of seconds")
        self.windows(model, round(min(self.span, 1e9) * SAMPLE_RATE) + SAMPLE_RATE)

    def windows(self, model: Wav2Vec2Model, num_samples: int) -> list[Window]:
        """Spans of so many samples."""
        try:
            return make_windows(model, num_samples, self.span, self.context)
        except ValueError as error:
            raise UserError(f"--span {self.span:g} --context {self.context:g}: {error}") from None


class FeatureFile:
    """A file of features as it is written: of several layers, ``[S, T, D]`` in .npy and one tensor each otherwise.

    Args:
        path: to write; nothing is there yet. The suffix of the final name decides.
        suffix: of the final name.
        layers: in the order that they stand in the file.
        num_frames: T.
        width: D.
    """

    def __init__(self, path: Path, suffix: str, layers: list[int], num_frames: int, width: int) -> None:
        self.layers, self.num_frames, self.width = layers, num_frames, width
        self._file: BinaryIO = path.open("wb")
        shape = (len(layers), num_frames, width)
        if suffix == ".npy":
            described = {"descr": "<f4", "fortran_order": False, "shape": shape if len(layers) > 1 else shape[1:]}
            np.lib.format.write_array_header_1_0(self._file, described)
        else:
            entries = {f"layer_{layer}": (torch.float32, list(shape[1:])) for layer in layers}
            self._file.write(make_header(entries, {"sample_rate": str(SAMPLE_RATE)}))
        self._offset = self._file.tell()
        self._file.truncate(self._offset + 4 * math.prod(shape))

    def __enter__(self) -> "FeatureFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, layer: int, first: int, values: Tensor) -> None:
        """Frames ``first`` to ``first + n`` of a layer: float32 [n, D] on the CPU."""
        position = (self.layers.index(layer) * self.num_frames + first) * self.width
        self._file.seek(self._offset + 4 * position)
        self._file.write(values.contiguous().numpy().data)
