"""Peak memory of a model on the CPU, in a process of its own.

    python -m evaluation.peak_memory MODEL.pth '[[10, 1], [10, 8]]'      (seconds of audio, utterances)

Prints one number of bytes per case, as JSON: the most memory that the process held while the model ran, over what it
held before the model was loaded. So it counts weights and activations, not Python and torch. Memory is read from the
kernel (resident set, its high-water mark reset before each case); large blocks are taken from and returned to the
system one by one, so that freed ones do not count. Linux only.
"""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from wav2vec2 import load_model
from wav2vec2.feature_extractor import SAMPLE_RATE

ROOT = Path(__file__).parent.parent
STATUS = Path("/proc/self/status")


def peak_memory(path: Path, cases: Sequence[tuple[float, int]]) -> list[int] | None:
    """Bytes of weights and activations at the worst moment of ``extract_features``.

    Args:
        path: a model file.
        cases: seconds of audio and utterances per batch.

    Returns:
        One number per case, None where the system does not tell.
    """
    if not STATUS.is_file():
        return None
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    words = [sys.executable, "-m", "evaluation.peak_memory", str(path.absolute()), json.dumps(list(cases))]
    result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"measuring the memory of {path} failed:\n{result.stderr}")
    return json.loads(result.stdout)


def resident(field: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (its maximum) of this process in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


def _measure(path: Path, cases: Sequence[tuple[float, int]]) -> list[int] | None:
    # Kernels, code pages and caches that torch sets up in a first run are not the model's.
    load_model(path).extract_features(torch.randn(1, SAMPLE_RATE))
    gc.collect()
    base = resident("VmRSS")
    model = load_model(path)
    peaks = []
    for seconds, batch in cases:
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:  # some containers
            return None
        model.extract_features(torch.randn(batch, round(seconds * SAMPLE_RATE)))
        peaks.append(resident("VmHWM") - base)
    return peaks


if __name__ == "__main__":
    with torch.inference_mode():
        print(json.dumps(_measure(Path(sys.argv[1]), json.loads(sys.argv[2]))))
