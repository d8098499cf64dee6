"""How long things take: side by side in turns, and phase by phase."""

import contextlib
import ctypes
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from wav2vec2.feature_extractor import SAMPLE_RATE

Key = TypeVar("Key")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def noise(size: int, seconds: float) -> Tensor:
    """Waveforms [B, N], the same for whatever is timed; what they are does not change the time."""
    return torch.randn(size, round(seconds * SAMPLE_RATE), generator=torch.Generator().manual_seed(0))


def keep_memory() -> None:
    """Let this process keep the memory of freed tensors, where the C library is glibc; elsewhere nothing happens.

    By default large buffers go back to the system after a call, or not, by what the process did before, and come back
    page by page, which costs a small model up to a fifth of its time. What serves models keeps memory; a plain process
    does with MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=1000000000000 in its environment.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


class Stopwatch:
    """Seconds spent in the phases of a step; a phase inside another is not counted there."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Time what runs inside."""
        begin, inner = time.perf_counter(), sum(self.seconds.values())
        yield
        elapsed = time.perf_counter() - begin - (sum(self.seconds.values()) - inner)
        self.seconds[phase] = self.seconds.get(phase, 0.0) + elapsed


def in_turns(
    steps: Mapping[Key, Callable[[], object]], rounds: int, title: str, bar: tqdm | None = None
) -> dict[Key, float]:
    """Median seconds of each step, after one round that does not count.

    Whatever else the machine does meets all of them alike. Every round has another order: a step feels in what state
    the one before leaves the memory.

    Args:
        steps: what to run.
        rounds: timed runs of each.
        title: of the progress bar.
        bar: to advance by one for every run, instead of a bar of its own.
    """
    times: dict[Key, list[float]] = {key: [] for key in steps}
    total = (rounds + 1) * len(steps)
    own = tqdm(total=total, desc=title, unit="step", leave=False, dynamic_ncols=True, disable=bar is not None)
    with own:
        for i in range(rounds + 1):
            for key in random.Random(i).sample(list(steps), len(steps)):
                begin = time.perf_counter()
                steps[key]()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if i:
                    times[key].append(time.perf_counter() - begin)
                (bar or own).update()
    return {key: statistics.median(some) for key, some in times.items()}
