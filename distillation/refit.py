"""Least squares after pruning: the output matrices of what is left, fitted in closed form to the teacher.

Block after block, from the first layer to the last: what a pruned attention or feed-forward block adds to its input is
a linear map of its live units, so the map that brings the sum closest to the teacher's is a ridge regression. Plain
least squares fits the noise of few frames and drifts from what step 1 has learnt; so the ridge pulls towards the
weights that are there, and its strength is chosen per block on utterances that the fit does not see, among them an
infinite one, which changes nothing.

Shapes: B batch, T frames, D width, n inputs of an output matrix.
"""

import logging
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from distillation.data.batching import select_utterances
from distillation.data.config import DataConfig
from distillation.data.loaders import Batch, Place, make_train_loader
from distillation.data.manifest import Manifest
from distillation.errors import UserError, require
from wav2vec2 import Wav2Vec2Model
from wav2vec2.feature_extractor import valid_frames
from wav2vec2.transformer import EncoderLayer

logger = logging.getLogger(__name__)

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the mean square of the inputs
HELD_OUT = 0.25  # of the batches choose the ridge
NUM_BATCHES = 16  # at least, but for long utterances
Kind = Literal["attention", "feed_forward"]
OUTPUT: dict[Kind, str] = {"attention": "out_proj", "feed_forward": "output_dense"}


@dataclass
class RefitConfig:
    """Fit of the pruned model's output matrices to the teacher in closed form, before step 2."""

    minutes: float = 8.0
    """Of training audio, a quarter of which chooses how strongly each fit holds on to the weights that are there."""

    def __post_init__(self) -> None:
        require(self, "refit.", "be positive", lambda value: 0 < value < math.inf, "minutes")


class Fitted(NamedTuple):
    """What a fit gave on held-out audio: shares of the teacher's mean square, and the ridge (inf: nothing changed)."""

    layer: int
    block: Kind
    before: float
    after: float
    ridge: float


class Stream:
    """One model on one batch, block by block."""

    def __init__(self, model: Wav2Vec2Model, batch: Batch) -> None:
        states, frames = model.run(batch.waveforms, batch.lengths)
        self.x, num_frames = states.layer_input, states.layer_input.shape[1]
        every = torch.full((len(self.x),), num_frames, device=self.x.device)
        self.frames = valid_frames(every if frames is None else frames, num_frames)  # [B, T]
        self.mask = None if frames is None else self.frames[:, None, None, :]
        first = model.encoder.transformer.position_block()
        self.position_bias = None if first is None else first.position_bias(num_frames)

    def block(self, layer: EncoderLayer, kind: Kind, inputs: bool = False) -> Tensor | None:
        """What the block adds to x, [B, T, D], or the ``inputs`` [B, T, n] of its output matrix; None if it is gone."""
        block = getattr(layer, kind)
        if block is None or not block.is_alive({}):
            return None
        weights = {}
        if inputs:
            size = getattr(block, OUTPUT[kind]).in_features
            weights = {
                f"{OUTPUT[kind]}.weight": torch.eye(size, device=self.x.device),
                f"{OUTPUT[kind]}.bias": torch.zeros(size, device=self.x.device),
            }
        if kind == "attention":
            x = layer.attention_input(self.x)
            return functional_call(block, weights, (x, self.mask, self.position_bias, {}))[0]
        x = layer.final_layer_norm(self.x) if layer.layer_norm_first else self.x
        return functional_call(block, weights, (x, {}))


def after_sum(layer: EncoderLayer, kind: Kind, x: Tensor) -> Tensor:
    """What follows the sum of a block and its input [..., D]: in post-norm models a norm."""
    if layer.layer_norm_first:
        return x
    return layer.layer_norm(x) if kind == "attention" else layer.final_layer_norm(x)


@torch.no_grad()
def refit(student: Wav2Vec2Model, teacher: Wav2Vec2Model, batches: Iterable[Batch]) -> list[Fitted]:
    """Fit the output matrices of all blocks that are left, in place.

    Args:
        student: dense, pruned out of a copy of the teacher.
        teacher: dense.
        batches: audio, on the models' device.

    Raises:
        UserError: a student of another depth or width, or one that reuses attention maps.
    """
    layers = student.encoder.transformer.layers, teacher.encoder.transformer.layers
    if student.embed_dim != teacher.embed_dim or len(layers[0]) != len(layers[1]):
        raise UserError("refit: the student has another depth or width than the teacher: leave refit out")
    if any(layer.attention is not None and layer.attention.reuse for layer in (*layers[0], *layers[1])):
        raise UserError("refit: models that reuse attention maps are not fitted: leave refit out")
    was_training = student.training
    student.eval()
    pairs = [(Stream(student, batch), Stream(teacher.eval(), batch)) for batch in batches if len(batch.waveforms)]
    found = []
    for i, (mine, other) in enumerate(tqdm(zip(*layers), "refit", len(layers[0]), unit="layer", leave=False, delay=1)):
        for kind in OUTPUT:
            for _, stream in pairs:
                stream.x = _sum(stream, other, kind)
            block = getattr(mine, kind)
            if block is not None and block.is_alive({}):
                found.append(Fitted(i + 1, kind, *_fit(mine, other, kind, pairs)))
            for ours, theirs in pairs:
                ours.x = after_sum(mine, kind, _sum(ours, mine, kind))
                theirs.x = after_sum(other, kind, theirs.x)
    student.train(was_training)
    return found


def _sum(stream: Stream, layer: EncoderLayer, kind: Kind) -> Tensor:
    added = stream.block(layer, kind)
    return stream.x if added is None else stream.x + added


def _fit(
    layer: EncoderLayer, other: EncoderLayer, kind: Kind, pairs: list[tuple[Stream, Stream]]
) -> tuple[float, float, float]:
    """Fit one output matrix; the error before and after on held-out batches, and the ridge."""
    output: nn.Linear = getattr(getattr(layer, kind), OUTPUT[kind])
    held_out = max(1, round(HELD_OUT * len(pairs)))
    rows = []  # inputs with a constant [N, n + 1], the student's x [N, D], the teacher's sum [N, D]
    for ours, theirs in pairs:
        inputs = ours.block(layer, kind, inputs=True)
        assert inputs is not None
        rows.append((F.pad(inputs[ours.frames], (0, 1), value=1.0), ours.x[ours.frames], theirs.x[ours.frames]))
    xx = sum(a.double().t() @ a.double() for a, _, _ in rows[held_out:])
    xy = sum(a.double().t() @ (wanted - x).double() for a, x, wanted in rows[held_out:])
    assert isinstance(xx, Tensor) and isinstance(xy, Tensor)

    def error(weight: Tensor) -> float:
        wrong = square = 0.0
        for a, x, wanted in rows[:held_out]:
            goal = after_sum(other, kind, wanted)
            wrong += (after_sum(layer, kind, x + a @ weight.to(a.dtype)) - goal).square().sum().item()
            square += goal.square().sum().item()
        return wrong / square

    start = torch.cat([output.weight, output.bias[:, None]], dim=1).double().t()  # [n + 1, D]
    before = error(start)
    best = before, math.inf, start
    for ridge in RIDGES:
        pull = ridge * xx.diagonal().mean() * torch.eye(len(xx), dtype=xx.dtype, device=xx.device)
        weight = torch.linalg.solve(xx + pull, xy + pull @ start)
        if (now := error(weight)) < best[0]:
            best = now, ridge, weight
    output.weight.copy_(best[2][:-1].t())
    output.bias.copy_(best[2][-1])
    return before, best[0], best[1]


def some_batches(manifest: Manifest, config: DataConfig, seed: int, minutes: float, place: Place) -> Iterator[Batch]:
    """So many minutes of a training list, cut as in training but into more batches; at most all of it, once."""
    selection = select_utterances(manifest, config)
    seconds = min(60 * minutes, selection.num_frames.sum() / config.sample_rate)
    longest = selection.num_frames.max() / config.sample_rate
    small = replace(config, seconds_per_batch=max(longest, seconds / NUM_BATCHES), utterances_per_batch=None)
    for batch in make_train_loader(manifest, small, seed, place=place):
        yield batch
        seconds -= batch.seconds
        if seconds < 1:
            return


def refit_on(batches: Iterable[Batch], student: Wav2Vec2Model, teacher: Wav2Vec2Model, device: torch.device) -> None:
    """:func:`refit` on a device; the models are on the CPU before and after.

    Raises:
        UserError: as :func:`refit`.
    """
    for model in (student, teacher):
        model.to(device)
    for one in refit(student, teacher, (batch.to(device) for batch in batches)):
        logger.info("refit: layer %d %s, unlike the teacher on held-out audio: %.4f, now %.4f (ridge %g)", *one)
    for model in (student, teacher):
        model.cpu()
