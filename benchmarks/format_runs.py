"""A model in each of its formats, as something to call; and processes that time it, each with threads of its own.

    python -m benchmarks.format_runs FORMAT PATH THREADS

A process reads seconds of audio from its input, line by line, runs them once, and prints how long it took.

Shapes: N samples, T frames, D width.
"""

from __future__ import annotations

import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from wav2vec2 import load_model
from wav2vec2.feature_extractor import SAMPLE_RATE

Extract = Callable[..., tuple[list[Tensor], Tensor | None]]
"""Has the signature of ``extract_features``: waveforms [B, N], lengths [B] -> states [B, T, D] each, frames [B]."""
PAUSE = 0.02  # seconds, in which the threads of the one before stop waiting for more


def torch_extract(path: Path, threads: int) -> Extract:
    """The model's own file, in this package."""
    torch.set_num_threads(threads)
    return load_model(path).extract_features


def torch_export_extract(path: Path, threads: int) -> Extract:
    """A file of torch.export."""
    torch.set_num_threads(threads)
    with warnings.catch_warnings(action="ignore"):  # of buffers that cannot be written to
        module = torch.export.load(path).module()

    def extract(waveforms: Tensor, lengths: Tensor, num_layers: int | None = None) -> tuple[list[Tensor], Tensor]:
        states, frames = module(waveforms, lengths)
        return list(states), frames

    return extract


def onnx_extract(path: Path, threads: int) -> Extract:
    """A file of ONNX."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # its threads would otherwise spin on for a while, into the time of the one measured next
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def extract(waveforms: Tensor, lengths: Tensor, num_layers: int | None = None) -> tuple[list[Tensor], Tensor]:
        states, frames = session.run(None, {"waveforms": waveforms.numpy(), "lengths": lengths.numpy()})
        return list(torch.from_numpy(states)), torch.from_numpy(frames)

    return extract


def executorch_extract(path: Path, threads: int) -> Extract:
    """A file of ExecuTorch, which takes one waveform at a time."""
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    _unsafe_reset_threadpool(threads)
    forward = Runtime.get().load_program(path).load_method("forward")

    def extract(waveforms: Tensor, lengths: Tensor, num_layers: int | None = None) -> tuple[list[Tensor], None]:
        return list(forward.execute([waveforms])[0]), None

    return extract


OPEN: dict[str, Callable[[Path, int], Extract]] = {
    "torch": torch_extract,
    "torch.export": torch_export_extract,
    "ONNX": onnx_extract,
    "ONNX int8": onnx_extract,
    "executorch": executorch_extract,
}
"""How each format is opened, with so many threads."""


class Timed:
    """A process that has a model ready, with so many threads."""

    def __init__(self, format: str, path: Path, threads: int) -> None:
        self.name = f"{format}, {threads} threads"
        words = [sys.executable, "-m", "benchmarks.format_runs", format, str(path.resolve()), str(threads)]
        root = Path(__file__).parent.parent
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root)

    def __call__(self, seconds: float) -> float:
        """Run so much audio once: seconds it took."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(seconds, file=self.process.stdin, flush=True)
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"{self.name}: its process has ended; stderr says why")
        return float(line)

    def end(self) -> None:
        """Let it go."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def real_time_factors(
    files: dict[str, Path], threads: tuple[int, ...], seconds: tuple[float, ...], rounds: int
) -> dict[str, list[list[float]]]:
    """Median computing seconds per second of audio, of each file for each number of threads and length of audio.

    All take turns, in another order every round; the first round does not count.
    """
    workers = {(name, n): Timed(name, path, n) for name, path in files.items() for n in threads}
    times: dict[tuple[str, int, float], list[float]] = {(*key, s): [] for key in workers for s in seconds}
    try:
        with tqdm(total=(rounds + 1) * len(times), desc="timing", unit="run", leave=False) as bar:
            for i in range(rounds + 1):
                for name, n, length in random.Random(i).sample(list(times), len(times)):
                    time.sleep(PAUSE)
                    times[name, n, length].append(workers[name, n](length))
                    bar.update()
    finally:
        for worker in workers.values():
            worker.end()
    return {name: [[statistics.median(times[name, n, s][1:]) / s for s in seconds] for n in threads] for name in files}


@torch.no_grad()
def main() -> None:
    """Serve until the input ends."""
    format, path, threads = sys.argv[1:]
    extract = OPEN[format](Path(path), int(threads))
    for line in sys.stdin:
        waveform = torch.randn(1, round(float(line) * SAMPLE_RATE), generator=torch.Generator().manual_seed(0))
        lengths = torch.tensor([waveform.shape[1]])
        begin = time.perf_counter()
        extract(waveform, lengths)
        print(time.perf_counter() - begin, flush=True)


if __name__ == "__main__":
    main()
