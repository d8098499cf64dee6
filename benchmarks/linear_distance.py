"""How much of each teacher layer can be read linearly from a student, on speech that neither training nor fit has seen.

For every pair of a teacher layer and a student layer a ridge regression is fitted on training speech. The distance of a
teacher layer is the share of its variance that the best student layer leaves unexplained: 0 for a student that holds
everything, 1 for one that holds nothing. It needs no heads, so students of all widths, depths and objectives compare.

Shapes: B batch, T frames, D student width, E teacher width, L layers.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from distillation.data.batching import select_utterances
from distillation.data.config import DataConfig
from distillation.data.loaders import Place, make_valid_loader
from distillation.data.manifest import Manifest, read_tsv
from distillation.errors import UserError
from distillation.training.processes import outlive_stop_signal
from wav2vec2 import Wav2Vec2Model
from wav2vec2.feature_extractor import valid_frames

RIDGE = 1e-4  # of the mean variance of the student's channels
FIT_SECONDS, CHOOSE_SECONDS = 480.0, 120.0  # of training speech: to fit the maps, and to choose the student's layer


@dataclass
class Distances:
    """Of one student."""

    unexplained: list[float]  # per teacher layer 0..L, share of the variance
    layers: list[int]  # per teacher layer, the student's layer that explains most


class Moments:
    """Sums of products of student and teacher frames: all that a linear fit and its error need. In float64."""

    def __init__(self, num_student: int, num_teacher: int) -> None:
        self.xx: list[Tensor] = [torch.zeros(())] * num_student  # [D + 1, D + 1], with a constant channel
        self.xy: list[Tensor] = [torch.zeros(())] * num_student  # [D + 1, (L + 1) E]
        self.yy: Tensor = torch.zeros(())  # [(L + 1) E], sums of squares
        self.y: Tensor = torch.zeros(())  # [(L + 1) E], sums
        self.num_frames, self.num_teacher = 0, num_teacher

    def add(self, student: list[Tensor], teacher: list[Tensor], valid: Tensor | None) -> None:
        """Add the frames of a batch: states [B, T, D] and [B, T, E], valid frames [B, T]."""

        def flat(state: Tensor) -> Tensor:
            return (state.flatten(0, 1) if valid is None else state[valid]).double()

        y = torch.cat([flat(state) for state in teacher], dim=1)
        for i, state in enumerate(student):
            x = torch.nn.functional.pad(flat(state), (0, 1), value=1.0)
            self.xx[i] = self.xx[i] + x.t() @ x
            self.xy[i] = self.xy[i] + x.t() @ y
        self.yy, self.y = self.yy + y.square().sum(0), self.y + y.sum(0)
        self.num_frames += len(y)

    def fit(self) -> list[Tensor]:
        """Ridge regressions [D + 1, (L + 1) E], one per student layer."""
        maps = []
        for xx, xy in zip(self.xx, self.xy):
            ridge = RIDGE * xx.diagonal()[:-1].mean() * torch.ones(len(xx), dtype=xx.dtype)
            ridge[-1] = 0  # the constant is free
            maps.append(torch.linalg.solve(xx + ridge.diag(), xy))
        return maps

    def unexplained(self, maps: list[Tensor]) -> Tensor:
        """Shares of variance [student layers, teacher layers] that the maps leave unexplained on these frames."""
        variance = (self.yy - self.y.square() / self.num_frames).view(self.num_teacher, -1).sum(1)
        rows = []
        for weight, xx, xy in zip(maps, self.xx, self.xy):
            error = self.yy - 2 * (weight * xy).sum(0) + (weight * (xx @ weight)).sum(0)
            rows.append(error.view(self.num_teacher, -1).sum(1) / variance)
        return torch.stack(rows)


def linear_distances(student: Wav2Vec2Model, teacher: Wav2Vec2Model, data: DataConfig) -> Distances:
    """Fit on the training list, measure on the validation list.

    Args:
        student: in eval mode.
        teacher: in eval mode.
        data: lists and length limits of the runs that are compared.

    Raises:
        UserError: a list or a file of it cannot be read.
    """
    train, valid = (read_tsv(data.tsv_dir / name) for name in (data.train, data.valid))
    fit, choose = _parts(train, data, (FIT_SECONDS, CHOOSE_SECONDS))
    fitted = _moments(student, teacher, fit, data).fit()
    best = _moments(student, teacher, choose, data).unexplained(fitted).argmin(0)
    held_out = _moments(student, teacher, valid, data).unexplained(fitted)
    return Distances(held_out.gather(0, best[None])[0].tolist(), best.tolist())


def _parts(manifest: Manifest, data: DataConfig, seconds: tuple[float, ...]) -> list[Manifest]:
    """Disjoint random parts of a list, about so many seconds long each."""
    order = np.random.default_rng(0).permutation(np.unique(select_utterances(manifest, data).index))
    ends = np.cumsum(manifest.num_frames[order]) / data.sample_rate
    bounds = [0, *np.searchsorted(ends, np.cumsum(seconds) * min(1.0, ends[-1] / sum(seconds)), side="right")]
    parts = []
    for begin, end in itertools.pairwise(bounds):
        chosen = np.sort(order[begin : max(end, begin + 1)])
        parts.append(Manifest(manifest.root, [manifest.paths[i] for i in chosen], manifest.num_frames[chosen]))
    return parts


@torch.inference_mode()
def _moments(student: Wav2Vec2Model, teacher: Wav2Vec2Model, manifest: Manifest, data: DataConfig) -> Moments:
    moments = Moments(student.num_layers + 1, teacher.num_layers + 1)
    loader = make_valid_loader(manifest, data, Place(worker_init_fn=outlive_stop_signal))
    for batch in tqdm(loader, "distance", unit="batch", leave=False, delay=1):
        if batch.errors:
            raise UserError("; ".join(f"{path}: {reason}" for path, reason in batch.errors.items()))
        states, frames = teacher.extract_features(batch.waveforms, batch.lengths)
        ours, _ = student.extract_features(batch.waveforms, batch.lengths)
        moments.add(ours, states, None if frames is None else valid_frames(frames, states[0].shape[1]))
    return moments
