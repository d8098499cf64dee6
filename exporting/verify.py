"""Runs an exported model in a fresh process and compares it with PyTorch.

Shapes: S states, B batch, T frames, D width.
"""

import itertools
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distillation.errors import UserError
from wav2vec2 import Wav2Vec2Model
from wav2vec2.feature_extractor import SAMPLE_RATE

logger = logging.getLogger(__name__)
TOLERANCE = 1e-4  # of relative_difference
# seconds of each row of a batch, from what a keyword spotter sees to LibriSpeech's longest utterance, padded and not
BATCHES = [[0.05], [0.05, 1.0, 0.31], [2.345], [35.0], [9.1, 35.0, 0.05]]
RUNNER = Path(__file__).with_name("runner.py")


class ExportedOutputs(torch.nn.Module):
    """A model with the outputs that exported files have.

    Args:
        model: dense, in eval mode.
        last: give the last layer alone.
    """

    def __init__(self, model: Wav2Vec2Model, last: bool) -> None:
        super().__init__()
        self.model, self.last = model, last

    @property
    def names(self) -> list[str]:
        """Of the outputs, in order."""
        return ["hidden_states", "frames", *(["logits"] if self.model.aux is not None else [])]

    def forward(self, waveforms: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, ...]:
        """Waveforms [B, N], lengths [B] -> states [S, B, T, D] or the last [B, T, D], frames [B], logits [B, T, V].

        Without lengths, where nothing is padded, there are no frames among the outputs.
        """
        states, frames = self.model.extract_features(waveforms, lengths)
        outputs = [states[-1] if self.last else torch.stack(states), *([] if frames is None else [frames])]
        if self.model.aux is not None:
            transformer = self.model.encoder.transformer
            x = transformer.layer_norm(states[-1]) if transformer.layer_norm_first else states[-1]
            outputs.append(self.model.aux(x))
        return tuple(outputs)


def make_batches(padded: bool = True, bounds: tuple[float, float] | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
    """Waveforms [B, N] in float32 and lengths [B] in samples: low-passed noise of speech-like level.

    Args:
        padded: some rows are shorter than others; otherwise the same durations come one at a time, the shortest first
            and the longest next, and so on: what a runtime keeps of one of them must not show in another.
        bounds: shortest and longest row in seconds, which are among the durations then; only where nothing is padded.
    """
    random = np.random.default_rng(0)
    batches = []
    for seconds in BATCHES if padded else [[duration] for duration in _durations(bounds)]:
        lengths = np.array([round(s * SAMPLE_RATE) for s in seconds])
        waveforms = np.zeros((len(lengths), lengths.max()), np.float32)
        for row, length in zip(waveforms, lengths):
            noise = np.convolve(random.standard_normal(length), np.hanning(32), "same")
            row[:length] = 0.1 * noise / noise.std()
        batches.append((waveforms, lengths))
    return batches


def _durations(bounds: tuple[float, float] | None) -> list[float]:
    """Of BATCHES within the bounds, and these themselves: the shortest, the longest, the next to the shortest..."""
    durations = set(itertools.chain(*BATCHES))
    if bounds is not None:
        durations = {*bounds, *(duration for duration in durations if bounds[0] <= duration <= bounds[1])}
    ordered = sorted(durations)
    return [ordered.pop(-(i % 2)) for i in range(len(ordered))]


def run_exported(
    kind: str, exported: Path, batches: list[tuple[np.ndarray, np.ndarray]]
) -> Iterator[dict[str, np.ndarray]]:
    """Outputs by name of one batch after another, from a fresh process in which only what the format needs is imported.

    Raises:
        UserError: the process fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder, "given.npz"), Path(folder, "made.npz")
        arrays: dict[str, Any] = {"num_batches": np.array(len(batches))}
        for i, (waveforms, lengths) in enumerate(batches):
            arrays |= {f"waveforms{i}": waveforms, f"lengths{i}": lengths}
        np.savez(given, **arrays)
        environment = {**os.environ, "HF_MODULES_CACHE": folder, "HF_HUB_OFFLINE": "1"}
        words = [sys.executable, "-I", RUNNER, kind, exported.resolve(), given, made]
        process = subprocess.run([*map(str, words)], capture_output=True, text=True, env=environment, cwd=folder)
        if process.returncode != 0:
            reason = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
            raise UserError(f"{exported}: does not run in a fresh process: {reason}")
        with np.load(made) as results:  # reads an array when it is asked for
            for i in range(len(batches)):
                keys = [key for key in results if key.endswith(f"/{i}")]
                yield {key.rpartition("/")[0]: results[key] for key in keys}


def relative_difference(difference: Tensor, size: Tensor) -> Tensor:
    """A layer's largest difference over its largest value where that exceeds 1; NaN stays NaN.

    Inner layers of large pre-norm models reach thousands, and float32 rounds accordingly.
    """
    return difference / size.clamp(min=1)


@torch.no_grad()
def max_difference(
    outputs: ExportedOutputs, kind: str, exported: Path, padded: bool = True, bounds: tuple[float, float] | None = None
) -> tuple[float, float]:
    """Largest difference on valid frames, over every batch and output, between PyTorch and a fresh process.

    Args:
        outputs: the PyTorch model.
        kind: function of ``runner.py`` that runs the exported one.
        exported: file or folder.
        padded: as for :func:`make_batches`; False for what computes something else in padded batches.
        bounds: as there, of what takes nothing else.

    Returns:
        The difference, and the largest :func:`relative_difference`.

    Raises:
        UserError: the process fails, or gives other shapes or lengths.
    """
    worst = worst_share = 0.0
    batches = make_batches(padded, bounds)
    results = run_exported(kind, exported, batches)
    for (waveforms, lengths), result in zip(batches, results, strict=True):
        seconds = "/".join(f"{length / SAMPLE_RATE:g}" for length in lengths)
        expected = dict(zip(outputs.names, outputs(torch.from_numpy(waveforms), torch.from_numpy(lengths))))
        frames = expected.pop("frames")
        if "frames" in result and result["frames"].tolist() != frames.tolist():
            raise UserError(f"{exported}: gives other numbers of frames than PyTorch for batch {seconds} s")
        for name, tensor in expected.items():
            if name not in result:
                continue
            found = torch.from_numpy(result[name])
            if found.shape != tensor.shape or not found.isfinite().all():
                raise UserError(f"{exported}: {name} has another shape or values that are not finite")
            valid = torch.arange(tensor.shape[-2])[None] < frames[:, None]
            difference, size = (
                (values.abs().amax(-1) * valid).flatten(-2).amax(-1) for values in (found - tensor, tensor)
            )  # [S], or of the last layer alone []
            logger.info(
                "%s, %s s: max difference %.1e, of values up to %.1e",
                name, seconds, difference.max(), size.max(),
            )  # fmt: skip
            worst = max(worst, difference.max().item())
            worst_share = max(worst_share, relative_difference(difference, size).max().item())
    return worst, worst_share


def require_agreement(
    outputs: ExportedOutputs, kind: str, exported: Path, padded: bool = True, bounds: tuple[float, float] | None = None
) -> float:
    """The largest difference; refuse what differs by more than TOLERANCE. Arguments as for :func:`max_difference`."""
    difference, share = max_difference(outputs, kind, exported, padded, bounds)
    if not share <= TOLERANCE:
        raise UserError(
            f"{exported}: differs from PyTorch by {difference:.1e}, more than {TOLERANCE:g} (of a layer's largest "
            "value where that exceeds 1); not kept"
        )
    return difference
