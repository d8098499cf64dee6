"""One training step, whoever takes it: Lightning, the search for a batch that fits, or a benchmark."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from distillation.objectives import Loss, Objectives, Teacher
from distillation.optimisation import NEW, OptimConfig, param_groups
from distillation.recognition.labels import Labels
from distillation.sparsity import Lagrangian
from wav2vec2 import Wav2Vec2Model


def seed_micro_batch(seed: int, number: int) -> None:
    """Seed masks and dropout for micro-batch ``number``; every one, on whichever rank, has its own stream."""
    torch.manual_seed(int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0] >> 1))


@dataclass
class StepLoss:
    """Of one micro-batch."""

    total: Tensor  # scalar, with the penalty of the sparsity: where backward starts
    distillation: Loss | None  # None for a batch without rows


@dataclass
class TrainingStep:
    """What learns from what, by which losses and rates.

    Attributes:
        student: masked or dense.
        teacher: frozen.
        objectives: what to train towards.
        lagrangian: holds the sparsity; None when nothing is pruned.
        optim: rates, with its length in updates (:meth:`OptimConfig.resolved`).
    """

    student: Wav2Vec2Model
    teacher: Teacher
    objectives: Objectives
    lagrangian: Lagrangian | None
    optim: OptimConfig

    def __post_init__(self) -> None:
        self.student.train()  # a pruned model comes out of its file in eval, and Lightning leaves it there
        _freeze_unused(self.student, self.objectives)

    @property
    def trained(self) -> nn.ModuleList:
        """All modules with parameters that the step may change."""
        return nn.ModuleList([self.student, self.objectives, *([self.lagrangian] if self.lagrangian else [])])

    def to(self, device: str) -> torch.device:
        """Move everything, the teacher too."""
        self.trained.to(device)
        self.teacher.to(torch.device(device))
        return torch.device(device)

    def loss(
        self,
        waveforms: Tensor,
        lengths: Tensor | None,
        update: int,
        heard: Tensor | None = None,
        labels: Labels | None = None,
    ) -> StepLoss:
        """Loss of one micro-batch at update 0, 1, ...

        Args:
            waveforms: [B, N]; B is 0 where no file could be read.
            lengths: [B] valid samples; None when nothing is padded.
            update: decides the target of the sparsity, and what learns.
            heard: [B, N], what the student hears instead; None for the same.
            labels: what is said; None where no objective asks.
        """
        penalty = torch.zeros((), device=waveforms.device)
        if self.lagrangian is not None:
            penalty = self.lagrangian(self.lagrangian.cost(self.student), update)
        if not len(waveforms):  # the other ranks wait for a gradient of everything
            return StepLoss(penalty + 0 * sum(p.sum() for p in self.trained.parameters() if p.requires_grad), None)
        frozen = update < self.optim.freeze_steps
        found = self.objectives(self.teacher, self.student, waveforms, lengths, heard, labels, frozen)
        return StepLoss(found.total + penalty, found)

    def make_optimizer(self, fused: bool = True) -> torch.optim.AdamW:
        """AdamW over everything that is trained."""
        groups = param_groups(self.trained, self.lagrangian, self.optim, self.new)
        return torch.optim.AdamW(groups, betas=self.optim.betas, eps=self.optim.eps, fused=fused)

    @property
    def new(self) -> set[nn.Parameter]:
        """What the student did not bring along, or writes with: heads and the output layer."""
        return {*self.objectives.parameters(), *(self.student.aux.parameters() if self.student.aux else ())}

    def hold_back(self, optimizer: torch.optim.Optimizer, update: int) -> None:
        """Take the gradients of all that waits while new parts learn alone: AdamW skips what has none."""
        if update >= self.optim.freeze_steps:
            return
        for group in optimizer.param_groups:
            if group["name"] != NEW:
                for p in group["params"]:
                    p.grad = None

    def clip(self, optimizer: torch.optim.Optimizer) -> Tensor:
        """Clip the norm of the whole gradient as the recipe says; returns it (scalar) as it was, on its device."""
        params = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in params])
        if self.optim.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(params, self.optim.clip, norm)
        return norm


def _freeze_unused(student: Wav2Vec2Model, objectives: Objectives) -> None:
    """Freeze what no objective looks at, or has no gradient for: it would never get one, and DDP waits for it."""
    transformer = student.encoder.transformer
    unused: list[nn.Module | None] = [*transformer.layers[objectives.student_layers :]]
    if not objectives.uses_output_layer:
        unused.append(student.aux)
        if transformer.layer_norm_first:  # hidden states come before the final norm
            unused.append(transformer.layer_norm)
    if objectives.student_options.extractor_gradient == 0:
        unused.append(student.feature_extractor)
    for module in unused:
        for name, p in module.named_parameters() if module is not None else ():
            p.requires_grad_(name.endswith("log_alpha"))
