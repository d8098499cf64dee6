"""Features of audio files, one file of features each.

    python extract_features.py final.pth AUDIO... --out feats/ [--layers all] [--format safetensors]

Reads what libsndfile reads (WAV, FLAC, OGG, MP3, ...) at any rate. .npy holds [T, D] for one layer and [S, T, D] for
several; .safetensors holds layer_0, layer_4, ... [T, D] each. 50 frames per second; frame i is centred at
0.0125 + 0.02 i seconds.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from distillation.commandline import make_parser, parse_arguments
from distillation.errors import UserError, command
from exporting.long_audio import AudioFile, extract, make_windows
from wav2vec2 import Wav2Vec2Model, load_model
from wav2vec2.checkpoint import replacing
from wav2vec2.embed import SAMPLE_RATE
from wav2vec2.safetensors import make_header

logger = logging.getLogger(__name__)


def run(
    model: str,
    audio: list[Path],
    out: Path,
    layers: str,
    format: Literal["npy", "safetensors"],
    window: float,
    context: float,
    device: str,
) -> None:
    """Extract; the arguments are the flags."""
    targets: dict[Path, Path] = {}
    for path in audio:
        target = out / f"{path.stem}.{format}"
        if target in targets:
            raise UserError(f"{path} and {targets[target]} would both become {target}; extract them to two folders")
        targets[target] = path
    try:
        torch.zeros(1, device=device).item()
        network = load_model(model, device=device)
    except RuntimeError as error:
        raise UserError(f"--device {device}: {str(error).splitlines()[0]}") from None
    chosen = parse_layers(layers, network.num_layers)
    files = [AudioFile(path) for path in audio]  # what cannot be opened is said before anything is computed
    total = sum(file.num_samples for file in files) / SAMPLE_RATE
    with tqdm(total=round(total, 1), unit="s", unit_scale=True, disable=None) as bar, logging_redirect_tqdm():
        for target, file in zip(targets, files):
            file.notice()
            num_frames = write_features(network, file, target, chosen, window, context, bar)
            logger.info("%s: %d frames -> %s", file.path, num_frames, target)


def write_features(
    model: Wav2Vec2Model, file: AudioFile, target: Path, layers: list[int], window: float, context: float, bar: tqdm
) -> int:
    """Write one file of features, atomically and as they come; returns the number of frames."""
    windows = make_windows(model, file.num_samples, window, context)
    num_frames = windows[-1].last
    if num_frames == 0:
        logger.warning("%s: too short for a single frame", file.path)
    shape = (len(layers), num_frames, model.embed_dim)
    with replacing(target) as temporary:
        offset = _write_header(temporary, target.suffix, layers, shape)
        if num_frames == 0:
            return 0
        values = np.memmap(temporary, np.float32, "r+", offset, shape)
        for part, features in extract(model, file, windows, layers):
            values[:, part.first : part.last] = features.numpy()
            bar.update(features.shape[1] / num_frames * file.num_samples / SAMPLE_RATE)
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


def parse_layers(text: str, num_layers: int) -> list[int]:
    """``all``, ``last``, or numbers with commas: 0 is the Transformer's input, L the last layer, as -1 is."""
    if text == "all":
        return list(range(num_layers + 1))
    try:
        layers = [num_layers] if text == "last" else [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(f"--layers {text}: give all, last, or numbers such as 0,4,{num_layers}") from None
    layers = [layer + num_layers + 1 if layer < 0 else layer for layer in layers]
    if len(set(layers)) != len(layers) or not all(0 <= layer <= num_layers for layer in layers):
        raise UserError(f"--layers {text}: the model has layers 0 (the Transformer's input) to {num_layers}, each once")
    return layers


@command
def main() -> None:
    """Parse the command line and run."""
    parser = make_parser(__doc__)
    parser.add_argument("model", type=str, help="Model: .pth, .safetensors, a folder of export.py, or a hub id.")
    parser.add_argument("audio", type=Path, nargs="+", help="Audio files.")
    parser.add_argument("--out", type=Path, required=True, help="Folder to write to.")
    parser.add_argument("--layers", type=str, default="last", help="all, last, or numbers such as 0,4,8,12.")
    parser.add_argument("--format", choices=["npy", "safetensors"], default="npy", help="Of the files written.")
    parser.add_argument("--window", type=float, default=40.0, help="Seconds run at once; longer files are cut.")
    parser.add_argument("--context", type=float, default=5.0, help="Seconds by which windows overlap on either side.")
    parser.add_argument("--device", type=str, default="cpu", help="cpu or cuda.")
    run(**vars(parse_arguments(parser)))


if __name__ == "__main__":
    main()
