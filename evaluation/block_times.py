"""What the blocks of a model take on a machine, at many sizes: measured in whole models, each block where it stands."""

import contextlib
import itertools
import random
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from distillation.journal import Journal
from distillation.sparsity import PruningConfig, make_prunable
from distillation.students import evenly_spaced
from evaluation.timing import keep_memory, noise
from wav2vec2 import Wav2Vec2Model, prune
from wav2vec2.architecture import Architecture, architecture
from wav2vec2.pruning import Survivors

PROTOCOL = 2  # to be raised where sizes or visits change: a journal of another one is begun anew
NUM_LEVELS = 5  # sizes of a conv layer; a prime, so that designs() meets every pair of neighbours' sizes
CONV_SHARES = (1 / 16, 3 / 8, 3 / 4)  # besides all units, and all but the last
FFN_SHARES = (1 / 64, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4)
MOST_HEADS = 8  # more are not all measured
NUM_CHECKS = 20
RUNS = 2  # timed of each visit, after one that warms up
WHOLE = "whole"  # the name of the time of the whole model, beside those of its blocks
Sizes = dict[str, int]  # units by mask
Key = TypeVar("Key")


def levels(num_units: int, shares: Sequence[float], multiple_of: int) -> list[int]:
    """Sizes to measure, ascending: odd ones, as pruning leaves them, unless it is to keep multiples.

    The last but one is as large as a pruned mask can be: all units, often a round number, may take less than that.
    """
    found = []
    for share in shares:
        size = round(share * num_units)
        if multiple_of > 1:
            size -= size % multiple_of
        elif size > 16 and size % 2 == 0:
            size -= 1
        found.append(size)
    found.append((num_units - 1) // multiple_of * multiple_of)
    return [*(min(num_units, max(multiple_of, size)) for size in found), num_units]


def designs(masked: Wav2Vec2Model, multiple_of: int) -> list[Sizes]:
    """Sizes of the models that the table is made from: every pair of sizes of neighbouring conv layers is among them.

    Layer i has the level a + i b modulo a prime in model (a, b), so for two neighbours all pairs come about.
    """
    found = []
    masks = masked.masks()
    for number in range(NUM_LEVELS**2):
        a, b = divmod(number, NUM_LEVELS)
        sizes = {}
        for name, mask in masks.items():
            layer = int(name.split("layers.")[1].split(".")[0])
            if name.startswith("feature_extractor"):
                sizes[name] = levels(len(mask), CONV_SHARES, multiple_of)[(a + layer * b) % NUM_LEVELS]
            elif name.endswith("heads"):
                count = min(len(mask), MOST_HEADS)
                sizes[name] = round(1 + (number + layer) % count * (len(mask) - 1) / max(1, count - 1))
            else:
                sizes_of = levels(len(mask), FFN_SHARES, multiple_of)
                sizes[name] = sizes_of[(number + 2 * layer) % len(sizes_of)]
        found.append(sizes)
    return found


def at_random(masked: Wav2Vec2Model, multiple_of: int, seed: int) -> Sizes:
    """Sizes of a model that the table was not made from, a small one for seed 0 to a large one for the last seed.

    Every layer has its own share of units; blocks without any are among them.
    """
    chance, sizes = random.Random(seed), {}
    share = (seed % NUM_CHECKS + 0.5) / NUM_CHECKS
    for name, mask in masked.masks().items():
        n = len(mask)
        size = round(n * min(1.0, max(0.0, share + chance.uniform(-0.25, 0.25))))
        if not name.endswith("heads") and size < n:
            size -= size % multiple_of
        sizes[name] = max(size, min(n, multiple_of)) if name.startswith("feature_extractor") else size
    return sizes


def with_masks(model: Wav2Vec2Model) -> Wav2Vec2Model:
    """The same network with masks over channels, heads and FFN units."""
    return make_prunable(model, PruningConfig()).eval()


def survivors(masked: Wav2Vec2Model, sizes: Sizes) -> Survivors:
    """So many units of every mask."""
    return {mask: evenly_spaced(len(mask), sizes[name]) for name, mask in masked.masks().items()}


def cut(masked: Wav2Vec2Model, sizes: Sizes) -> Wav2Vec2Model:
    """The dense model of these sizes."""
    return prune(masked, survivors(masked, sizes))[0]


class Watch:
    """Milliseconds of a forward pass and of its blocks, each where it stands.

    Args:
        model: dense, in eval mode.
        blocks: whether to look at the blocks, or at the whole alone.
    """

    def __init__(self, model: Wav2Vec2Model, blocks: bool) -> None:
        self.model, self.blocks = model, blocks_of(model) if blocks else {}
        self.on_gpu = model.feature_extractor.dummy_weight.is_cuda
        self.marks: dict[str, list[Any]] = {}

    def _mark(self, name: str) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.setdefault(name, []).append(event)
        else:
            self.marks.setdefault(name, []).append(time.perf_counter())

    @torch.inference_mode()
    def __call__(self, waveforms: Tensor) -> dict[str, float]:
        """Run once."""
        self.marks = {}
        with contextlib.ExitStack() as stack:
            for name, block in self.blocks.items():
                stack.callback(block.register_forward_pre_hook(lambda *_, name=name: self._mark(name)).remove)
                stack.callback(block.register_forward_hook(lambda *_, name=name: self._mark(name)).remove)
            self._mark(WHOLE)
            self.model.extract_features(waveforms)
            self._mark(WHOLE)
        for name, after in itertools.pairwise(list(self.marks)):
            if name.startswith("conv."):  # what it frees when it is done is its own, too
                self.marks[name][1] = self.marks[after][0]
        if self.on_gpu:
            torch.cuda.synchronize()
            return {name: begin.elapsed_time(end) for name, (begin, end) in self.marks.items()}
        return {name: 1000 * (end - begin) for name, (begin, end) in self.marks.items()}


def blocks_of(model: Wav2Vec2Model) -> dict[str, nn.Module]:
    """What has a time of its own in the table."""
    found: dict[str, nn.Module] = {f"conv.{i}": layer for i, layer in enumerate(model.feature_extractor.conv_layers)}
    found["projection"] = model.encoder.feature_projection
    for i, layer in enumerate(model.encoder.transformer.layers):
        for name in ("attention", "feed_forward"):
            block = getattr(layer, name)
            if block is not None:
                found[f"{name}.{i}"] = block
    return found


@dataclass
class Sample:
    """What a model of some sizes takes.

    Attributes:
        sizes: units by mask.
        found: units by layer.
        ms: the least of all runs, of the whole and of the blocks where they were timed.
    """

    sizes: Sizes
    found: Architecture
    ms: dict[str, float]


def least(runs: Iterable[dict[str, float]]) -> dict[str, float]:
    """The fastest time of each block: what else the machine does only ever adds to it."""
    runs = list(runs)
    return {name: min(run[name] for run in runs) for name in runs[0]}


def visit(model: Wav2Vec2Model, blocks: bool, device: str, seconds: float) -> dict[str, float]:
    """Warm a model up and time it."""
    keep_memory()
    waveforms, watch = noise(1, seconds).to(device), Watch(model.to(device), blocks)
    watch(waveforms)
    return least(watch(waveforms) for _ in range(RUNS))


def whole_times(models: Mapping[Key, Wav2Vec2Model], device: str, seconds: float, rounds: int) -> dict[Key, float]:
    """Milliseconds of whole models, visited in turns as those of a table are.

    Args:
        models: dense, in eval mode.
        device: to measure on; they come back to the CPU.
        seconds: of audio, one utterance.
        rounds: visits to each.
    """
    times: dict[Key, list[float]] = {key: [] for key in models}
    visits = [key for number in range(rounds) for key in random.Random(number).sample(list(models), len(models))]
    for key in tqdm(visits, desc="ms", unit="run", leave=False, dynamic_ncols=True):
        times[key].append(visit(models[key], False, device, seconds)[WHOLE])
        models[key].cpu()
    return {key: min(some) for key, some in times.items()}


def measure(
    model: Wav2Vec2Model, device: str, seconds: float, rounds: int, multiple_of: int, known: Journal | dict[str, Any]
) -> tuple[list[Sample], list[Sample]]:
    """Times of the models that the table is made from, and of those that it is tried on; the first of these is whole.

    Args:
        model: dense; stays on the CPU.
        device: to measure on.
        seconds: of audio, one utterance.
        rounds: visits to each model.
        multiple_of: of the sizes.
        known: keeps the visits, and spares those that it has.
    """
    masked = with_masks(model)
    whole = {name: len(mask) for name, mask in masked.masks().items()}
    plans = [(sizes, True) for sizes in designs(masked, multiple_of)]
    plans += [(sizes, False) for sizes in (whole, *(at_random(masked, multiple_of, i) for i in range(NUM_CHECKS)))]
    visits = [(i, number) for number in range(rounds)
              for i in random.Random(number).sample(range(len(plans)), len(plans))]  # fmt: skip
    for i, number in tqdm(visits, desc="latency", unit="run", dynamic_ncols=True):
        key = f"model {i}, visit {number}"
        if key not in known:
            known[key] = visit(cut(masked, plans[i][0]), plans[i][1], device, seconds)
    samples = []
    for i, (sizes, _) in enumerate(plans):
        ms = least(known[f"model {i}, visit {number}"] for number in range(rounds))
        samples.append(Sample(sizes, architecture(cut(masked, sizes).config), ms))
    designed = NUM_LEVELS**2
    return samples[:designed], samples[designed:]
