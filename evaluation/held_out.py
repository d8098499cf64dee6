"""How far students are from their teacher on the validation list of a recipe.

Shapes: B batch, T frames, D width, L layers.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from distillation.config import Recipe
from distillation.data.batching import Selection, ValidationBatches, select_utterances
from distillation.data.config import DataConfig
from distillation.data.loaders import AudioDataset
from distillation.data.manifest import Manifest
from distillation.errors import UserError
from distillation.lists import read_valid
from distillation.objectives import Objectives, Teacher
from distillation.objectives.base import Ratios, masked_mean
from distillation.recognition.labels import Speller
from wav2vec2 import Wav2Vec2Model
from wav2vec2.checkpoint import Checkpoint
from wav2vec2.feature_extractor import SAMPLE_RATE, valid_frames
from wav2vec2.passes import HiddenStates, PassOptions

logger = logging.getLogger(__name__)


@dataclass
class Distance:
    """One student against its teacher on held-out speech."""

    loss: float | None = None  # of the recipe's objective; None where it is not defined
    terms: dict[str, float] = field(default_factory=dict)  # of the objective, unweighted
    # Means per layer 0..L; empty where depth or width differ.
    cosine: list[float] = field(default_factory=list)  # 1 - cosine similarity
    l1: list[float] = field(default_factory=list)  # absolute difference
    rates: dict[str, float] = field(default_factory=dict)  # what the objective counts: error rates of recognisers, %


@dataclass
class HeldOut:
    """All students that were compared with one teacher."""

    data: str  # which audio, in words
    students: dict[str, Distance]
    without_loss: dict[str, str] = field(default_factory=dict)  # students whose loss is not defined, and why


class OnceTeacher(Teacher):
    """Runs a batch once, however many students are compared with it."""

    _waveforms: Tensor | None = None

    def __call__(self, waveforms: Tensor, lengths: Tensor | None, options: PassOptions) -> HiddenStates:
        """As the parent's; passes with masked frames, which differ between students, are not kept."""
        if options.masked is not None:
            return super().__call__(waveforms, lengths, options)
        if self._waveforms is not waveforms:
            self._waveforms, self._outputs = waveforms, list[tuple[PassOptions, HiddenStates]]()
        for known, output in self._outputs:
            if known == options:
                return output
        self._outputs.append((options, super().__call__(waveforms, lengths, options)))
        return self._outputs[-1][1]


def evaluate(
    recipe: Recipe, teacher: Wav2Vec2Model, students: Mapping[str, Checkpoint], max_seconds: float, device: str
) -> HeldOut:
    """The recipe's own objective with each student's own heads, and the distance layer by layer.

    Args:
        recipe: objective and validation list.
        teacher: dense.
        students: in eval mode, hence with their eval masks where they have masks; those without the heads of the
            objective in their file, or without a layer that it looks at, have no loss.
        max_seconds: of audio; a longer list is thinned evenly.
        device: to compute on, in float32.

    Raises:
        UserError: the list or a file of it cannot be read.
    """
    vocabulary = next((s.model.vocabulary for s in students.values() if s.model.vocabulary is not None), None)
    manifest = read_valid(recipe, vocabulary)
    selection = _choose(manifest, recipe.data, max_seconds)
    audio = AudioDataset(manifest, recipe.data.sample_rate, None if vocabulary is None else Speller(vocabulary))
    batches = ValidationBatches(selection, recipe.data)
    frozen = OnceTeacher(teacher.to(device))
    objectives: dict[str, Objectives] = {}
    without_loss: dict[str, str] = {}
    for name, student in students.items():
        try:
            objective = Objectives(recipe.objective, student.model.to(device), teacher).to(device).eval()
            if not objective.load_head_state(student.heads, "its file") and objective.head_state():
                raise UserError("its file has no distillation heads")
            objectives[name] = objective
        except UserError as error:
            without_loss[name] = str(error)
    comparable = {name for name, student in students.items() if _same_shape(student.model, teacher)}
    losses: dict[str, list[dict[str, Tensor]]] = {name: [] for name in students}
    counted: dict[str, list[Ratios]] = {name: [] for name in students}
    layers: dict[str, list[dict[str, Tensor]]] = {name: [] for name in students}
    seconds: list[float] = []
    with torch.inference_mode(), tqdm(total=len(batches) * len(students), desc="held-out", unit="batch",
                                      dynamic_ncols=True) as bar:  # fmt: skip
        for chosen in batches:
            batch = audio[chosen]
            if batch.errors:
                path, reason = next(iter(batch.errors.items()))
                raise UserError(f"{path}: {reason}")
            batch = batch.to(device)
            seconds.append(batch.seconds)
            states = teacher.extract_features(batch.waveforms, batch.lengths)[0] if comparable else []
            for name, student in students.items():
                if name in objectives:
                    loss = objectives[name](frozen, student.model, batch.waveforms, batch.lengths, labels=batch.labels)
                    losses[name].append({"loss": loss.total, **loss.terms})
                    counted[name].append(loss.ratios)
                if name in comparable:
                    layers[name].append(compare_layers(states, student.model, batch.waveforms, batch.lengths))
                bar.update()
    results = {}
    for name in students:
        terms, rows = _means(losses[name], seconds), _means(layers[name], seconds)
        results[name] = Distance(terms.pop("loss", None), terms, **rows, rates=_rates(counted[name]))
    count = len(np.unique(selection.index))
    data = f"{count:,} utterances, {sum(seconds) / 60:.1f} min of {recipe.data.valid}"
    return HeldOut(data, results, without_loss)


def compare_layers(
    teacher: list[Tensor], student: Wav2Vec2Model, waveforms: Tensor, lengths: Tensor | None
) -> dict[str, Tensor]:
    """Mean 1 - cosine similarity and mean absolute difference per layer, [L + 1] each; states as they are, no heads.

    Args:
        teacher: states 0..L, [B, T, D] each.
        student: of the same depth and width.
        waveforms: [B, N].
        lengths: [B] valid samples; None when nothing is padded.
    """
    states, frames = student.extract_features(waveforms, lengths)
    valid = None if frames is None else valid_frames(frames, states[0].shape[1])
    pairs = list(zip(states, teacher))
    return {
        "cosine": torch.stack([1 - masked_mean(F.cosine_similarity(s, t, dim=-1), valid) for s, t in pairs]),
        "l1": torch.stack([masked_mean((s - t).abs(), valid) for s, t in pairs]),
    }


def floor_of(recipe: Recipe, teacher: Wav2Vec2Model) -> float | None:
    """The loss of a perfect student: the teacher against itself through identity maps; None where heads are others."""
    try:
        objectives = Objectives(recipe.objective, teacher, teacher)
    except UserError:
        return None
    if objectives.uses_labels:
        return None
    heads = [head for part in objectives.parts.values() for head in part.heads]  # type: ignore[union-attr]
    if not all(isinstance(head, nn.Linear) and _is_identity(head) for head in heads):
        return None
    waveforms = torch.randn(1, recipe.data.sample_rate, generator=torch.Generator().manual_seed(0))
    device = teacher.feature_extractor.dummy_weight.device
    with torch.inference_mode():
        return float(objectives.to(device)(Teacher(teacher), teacher, waveforms.to(device), None).total)


def _is_identity(head: nn.Linear) -> bool:
    weight = head.weight.detach().cpu()
    return torch.equal(weight, torch.eye(*weight.shape)) and not head.bias.any()


def _choose(manifest: Manifest, config: DataConfig, max_seconds: float) -> Selection:
    """Every n-th utterance of the validation list within the length limits, up to ``max_seconds``."""
    selection = select_utterances(manifest, config)
    used = np.unique(selection.index)
    total = selection.num_frames.sum() / config.sample_rate
    count = len(used) if total <= max_seconds else max(1, int(len(used) * max_seconds / total))
    chosen = np.isin(selection.index, used[np.linspace(0, len(used) - 1, count).round().astype(int)])
    selection = Selection(
        selection.index[chosen], selection.start[chosen], selection.num_frames[chosen], selection.spare[chosen],
        selection.summary,
    )  # fmt: skip
    seconds = selection.num_frames.sum() / config.sample_rate
    logger.info("held-out data, %s; %d of them are used, %.0f s", selection.summary, count, seconds)
    return selection


def _same_shape(student: Wav2Vec2Model, teacher: Wav2Vec2Model) -> bool:
    one_second = torch.tensor([SAMPLE_RATE])
    return (student.embed_dim, student.num_layers) == (teacher.embed_dim, teacher.num_layers) and bool(
        student.output_length(one_second) == teacher.output_length(one_second)
    )


def _rates(batches: list[Ratios]) -> dict[str, float]:
    """Sums over batches, divided."""
    names = batches[0] if batches else ()
    return {name: float(sum(b[name][0] for b in batches) / sum(b[name][1] for b in batches)) for name in names}


def _means(batches: list[dict[str, Tensor]], seconds: list[float]) -> dict[str, Any]:
    """Means of every value over batches, weighted by their seconds of audio."""
    weights = torch.tensor(seconds, dtype=torch.float64)
    weights = weights / weights.sum()
    names = batches[0] if batches else ()
    return {name: (torch.stack([b[name].double().cpu() for b in batches], -1) @ weights).tolist() for name in names}
