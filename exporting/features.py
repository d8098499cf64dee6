"""Files of features: .npy and .safetensors, written window by window."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from distillation.data.resampling import AudioFile
from distillation.errors import UserError
from wav2vec2 import Wav2Vec2Model, load_model
from wav2vec2.checkpoint import replacing
from wav2vec2.feature_extractor import SAMPLE_RATE
from wav2vec2.safetensors import make_header
from wav2vec2.windows import Window, extract, make_windows


@dataclass
class FeatureOptions:
    """What to extract, and how."""

    layers: str = "last"
    """all, last, or numbers such as 0,4,8,12."""
    format: Literal["npy", "safetensors"] = "npy"
    """Of the files written."""
    window: float = 40.0
    """Seconds run at once; longer files are cut."""
    context: float = 5.0
    """Seconds by which windows overlap on either side."""

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

    def windows(self, model: Wav2Vec2Model, num_samples: int) -> list[Window]:
        """What is run at once, of so many samples."""
        try:
            return make_windows(model, num_samples, self.window, self.context)
        except ValueError as error:
            raise UserError(f"--window {self.window:g} --context {self.context:g}: {error}") from None


def load_on(model: str, device: str) -> Wav2Vec2Model:
    """A model on the device of ``--device``; UserError for one that does not exist."""
    try:
        torch.zeros(1, device=device).item()
        return load_model(model, device=device)
    except RuntimeError as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None


def write_features(
    model: Wav2Vec2Model, file: AudioFile, target: Path, options: FeatureOptions, progress: Callable[[float], object]
) -> int:
    """Write one file of features, atomically and as they come; returns the number of frames.

    Args:
        model: in eval mode.
        file: the audio.
        target: the file to write; its suffix decides.
        options: which layers, and the windows.
        progress: is told of every part's seconds of audio.
    """
    layers = options.layer_numbers(model.num_layers)
    windows = options.windows(model, file.num_samples)
    num_frames = windows[-1].last
    shape = (len(layers), num_frames, model.embed_dim)
    with replacing(target) as temporary:
        offset = _write_header(temporary, target.suffix, layers, shape)
        if num_frames == 0:
            return 0
        values = np.memmap(temporary, np.float32, "r+", offset, shape)
        for part, features in extract(model, file.read, windows, layers):
            values[:, part.first : part.last] = features.numpy()
            progress(features.shape[1] / num_frames * file.num_samples / SAMPLE_RATE)
        values.flush()
        del values
    return num_frames


def _write_header(path: Path, suffix: str, layers: list[int], shape: tuple[int, int, int]) -> int:
    """Start the file and give it its full size; returns where the values begin."""
    with path.open("wb") as file:
        if suffix == ".npy":
            described = {"descr": "<f4", "fortran_order": False, "shape": shape if len(layers) > 1 else shape[1:]}
            np.lib.format.write_array_header_1_0(file, described)
        else:
            entries = {f"layer_{layer}": (torch.float32, list(shape[1:])) for layer in layers}
            file.write(make_header(entries, {"sample_rate": str(SAMPLE_RATE)}))
        offset = file.tell()
        file.truncate(offset + 4 * int(np.prod(shape)))
    return offset
