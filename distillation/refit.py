"""Least squares after pruning: the output matrices of what is left, fitted in closed form to the teacher.

Block after block, from the first layer to the last: what a pruned attention or feed-forward block adds to its input is
a linear map of its live units, so the map that brings the sum closest to the teacher's is a ridge regression. Plain
least squares fits the noise of few frames and drifts from what step 1 has learnt; so the ridge pulls towards the
weights that are there, and its strength is chosen per block on recordings that the fit does not see, among them an
infinite one, which changes nothing. It knows neither the heads of the objective nor its terms, and hears no noise: it
fits states to states.

Shapes: B batch, T frames, D width, n inputs of an output matrix.
"""

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from distillation.data.batching import Selection, select_utterances
from distillation.data.config import DataConfig
from distillation.data.loaders import Batch, Place, make_pass_loader
from distillation.data.manifest import Manifest
from distillation.errors import UserError, require
from wav2vec2 import Wav2Vec2Model
from wav2vec2.feature_extractor import valid_frames
from wav2vec2.model import PassOptions
from wav2vec2.transformer import EncoderLayer

logger = logging.getLogger(__name__)

RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # of the mean square of the inputs
HELD_OUT = 0.25  # of the audio chooses the ridge
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
        states, frames = model.run(batch.waveforms, batch.lengths, PassOptions(num_layers=0))
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


def check_refit(student: Wav2Vec2Model, teacher: Wav2Vec2Model) -> None:
    """Look, before anything is trained, whether the blocks of a student can be fitted to a teacher's.

    Raises:
        UserError: they are not of the same depth, width and frames, or reuse attention maps.
    """
    layers = [model.encoder.transformer.layers for model in (student, teacher)]
    if student.embed_dim != teacher.embed_dim or len(layers[0]) != len(layers[1]):
        raise UserError("refit: the student has another depth or width than the teacher: leave refit out")
    if any(model.encoder.transformer.time_reduction is not None for model in (student, teacher)):
        raise UserError("refit: models that shorten the sequence of frames are not fitted: leave refit out")
    if any(layer.attention is not None and layer.attention.reuse for layer in (*layers[0], *layers[1])):
        raise UserError("refit: models that reuse attention maps are not fitted: leave refit out")


Pairs = list[tuple[Stream, Stream]]


@torch.no_grad()
def refit(
    student: Wav2Vec2Model, teacher: Wav2Vec2Model, batches: Iterable[Batch], held_out: Iterable[Batch]
) -> list[Fitted]:
    """Fit the output matrices of all blocks that are left, in place.

    Args:
        student: dense, pruned out of a copy of the teacher.
        teacher: dense.
        batches: audio to fit to, on the models' device.
        held_out: audio to choose the ridges on.

    Raises:
        UserError: as :func:`check_refit`.
    """
    check_refit(student, teacher)
    was_training = student.training
    student.eval()
    fit, rest = ([(Stream(student, one), Stream(teacher.eval(), one)) for one in part] for part in (batches, held_out))
    layers = student.encoder.transformer.layers, teacher.encoder.transformer.layers
    found = []
    for i, (mine, other) in enumerate(tqdm(zip(*layers), "refit", len(layers[0]), unit="layer", leave=False, delay=1)):
        for kind in OUTPUT:
            for _, stream in fit + rest:
                stream.x = _sum(stream, other, kind)
            block = getattr(mine, kind)
            if block is not None and block.is_alive({}):
                found.append(Fitted(i + 1, kind, *_fit(mine, other, kind, fit, rest)))
            for ours, theirs in fit + rest:
                ours.x = after_sum(mine, kind, _sum(ours, mine, kind))
                theirs.x = after_sum(other, kind, theirs.x)
    student.train(was_training)
    return found


def _sum(stream: Stream, layer: EncoderLayer, kind: Kind) -> Tensor:
    added = stream.block(layer, kind)
    return stream.x if added is None else stream.x + added


def _fit(
    layer: EncoderLayer, other: EncoderLayer, kind: Kind, fit: Pairs, held_out: Pairs
) -> tuple[float, float, float]:
    """Fit one output matrix; the error before and after on held-out audio, and the ridge."""
    output: nn.Linear = getattr(getattr(layer, kind), OUTPUT[kind])

    def rows(ours: Stream, theirs: Stream) -> tuple[Tensor, Tensor, Tensor]:
        """Inputs with a constant [N, n + 1], the student's x [N, D], the teacher's sum [N, D]."""
        inputs = ours.block(layer, kind, inputs=True)
        assert inputs is not None
        return F.pad(inputs[ours.frames], (0, 1), value=1.0), ours.x[ours.frames], theirs.x[ours.frames]

    start = torch.cat([output.weight, output.bias[:, None]], dim=1).double().t()  # [n + 1, D]
    xx, xy = start.new_zeros(len(start), len(start)), torch.zeros_like(start)
    for pair in fit:
        a, x, wanted = rows(*pair)
        xx += a.double().t() @ a.double()
        xy += a.double().t() @ (wanted - x).double()
    unseen = [rows(*pair) for pair in held_out]

    def error(weight: Tensor) -> float:
        wrong = square = 0.0
        for a, x, wanted in unseen:
            goal = after_sum(other, kind, wanted)
            wrong += (after_sum(layer, kind, x + a @ weight.to(a.dtype)) - goal).square().sum().item()
            square += goal.square().sum().item()
        return wrong / square

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


def draw(manifest: Manifest, config: DataConfig, seed: int, minutes: float) -> tuple[Selection, Selection]:
    """So many minutes of a training list, or all of it: to fit to, and, of other recordings, to choose the ridges on.

    Raises:
        UserError: all is one recording.
    """
    selection = select_utterances(manifest, config)
    sides: dict[str, int] = {}  # of a recording
    rows: tuple[list[int], list[int]] = [], []
    drawn, wanted = [0, 0], 60 * minutes * config.sample_rate
    for row in np.random.default_rng(seed).permutation(len(selection.index)).tolist():
        if sum(drawn) >= wanted and all(drawn):
            break
        path = manifest.paths[selection.index[row]]
        side = sides.setdefault(path, int(drawn[1] < HELD_OUT * sum(drawn)))
        if sum(drawn) < wanted or not drawn[side]:
            rows[side].append(row)
            drawn[side] += int(selection.num_frames[row])
    if not all(drawn):
        raise UserError(
            f"refit: all under {manifest.root} is one recording, and another chooses the ridge: leave it out"
        )
    fit, held_out = (selection.take(sorted(part)) for part in rows)
    return fit, held_out


def read_all(
    manifest: Manifest, selection: Selection, config: DataConfig, place: Place, device: torch.device
) -> list[Batch]:
    """All that can be read of some of a list, once.

    Raises:
        UserError: more than ``data.max_bad_share`` of the files cannot be used, or none can.
    """
    batches, bad = [], dict[str, str]()
    for batch in make_pass_loader(manifest, selection, config, place):
        bad |= batch.errors
        if len(batch.waveforms):
            batches.append(batch.to(device))
    for path, reason in bad.items():
        logger.warning("refit: left out: %s: %s", path, reason)
    if bad and (not batches or len(bad) > config.max_bad_share * len(manifest)):
        path, reason = next(iter(bad.items()))
        raise UserError(
            f"refit: {len(bad)} of {len(selection.index)} files cannot be used: {path}: {reason}; is the disk of the "
            "audio there? Repair them, leave them out with prepare_data.py --check --skip_broken, or raise "
            f"--data.max_bad_share {config.max_bad_share:g}"
        )
    return batches


def refit_on(
    manifest: Manifest,
    config: DataConfig,
    seed: int,
    minutes: float,
    student: Wav2Vec2Model,
    teacher: Wav2Vec2Model,
    device: torch.device,
    place: Place,
) -> None:
    """:func:`refit` on recordings of a training list; the models are on the CPU before and after.

    Raises:
        UserError: as what it calls.
    """
    check_refit(student, teacher)
    parts = [read_all(manifest, part, config, place, device) for part in draw(manifest, config, seed, minutes)]
    for model in (student, teacher):
        model.to(device)
    seconds = [sum(batch.seconds for batch in part) for part in parts]
    logger.info("refit: to %.1f minutes of training audio, %.1f more choose the ridges", *(s / 60 for s in seconds))
    for one in refit(student, teacher, *parts):
        logger.info("refit: layer %d %s, unlike the teacher on held-out audio: %.4f, now %.4f (ridge %g)", *one)
    for model in (student, teacher):
        model.cpu()
