"""Speech temporal relation, STaR (https://arxiv.org/abs/2312.09040): how frames relate, not what they are.

Shapes: B batch, T frames, D student width, E teacher width, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distillation.errors import UserError
from distillation.objectives.base import Objective, Passes, at_least_float32, match_layers
from distillation.objectives.gram import gram_distance, gram_square
from wav2vec2 import Wav2Vec2Model

TINY = 1e-12  # divisors are at least this: no frame is valid, or the teacher is silent


class TemporalRelation(Objective):
    """Squared differences of the teacher's and the student's temporal Gram matrices; no heads, widths may differ.

    The entry (i, j) of a temporal Gram matrix is the inner product over channels of frames i and j: of one layer
    (``layer``), or of a layer's input and its output (``intra``). ``attention`` compares the attention maps, averaged
    over heads, instead. Each term is the mean over matched layers of the mean over pairs of valid frames.
    """

    @dataclass
    class Config:
        """Settings."""

        layer: float = 1.0
        """Weight of the relation between the frames of one layer."""

        intra: float = 1.0
        """Weight of the relation between the input frames of a layer and its output frames."""

        attention: float | None = None
        """Weight of the average attention map; null not to compute it, which is faster."""

        layers: list[int] | None = None
        """Student layers from 1 on, each matched with the teacher layer at the same relative depth; null for all."""

        relative: bool = False
        """Divide each layer by the mean square of the teacher's matrix: weights then mean the same for all teachers."""

    def __init__(self, config: TemporalRelation.Config, student: Wav2Vec2Model, teacher: Wav2Vec2Model) -> None:
        super().__init__()
        self.config = config
        self.heads = nn.ModuleList()
        self.layers = match_layers(config.layers, student, teacher)
        self.student_layers, self.teacher_layers = self.layers[-1]
        self.weights = {"layer": config.layer, "intra": config.intra}
        if config.attention is not None:
            self.weights["attention"] = config.attention
            self.keeps_maps = True
            if student.encoder.transformer.reduction != teacher.encoder.transformer.reduction:
                raise UserError("objective.temporal_relation.attention compares maps of equally many frames: "
                                "set it to null for a time-reduced student")  # fmt: skip

    def forward(self, passes: Passes) -> dict[str, Tensor]:
        """Terms layer, intra and, if it is set, attention."""
        student, teacher, valid = passes.student_output(), passes.teacher_output(), passes.valid()
        frames = passes.frame_lengths()
        num_pairs = (
            torch.full((), len(passes.waveforms) * passes.num_frames**2, device=passes.waveforms.device)
            if frames is None
            else frames.square().sum()
        )

        def ready(state: Tensor) -> Tensor:
            state = at_least_float32(state)
            return state if valid is None else state * valid[..., None]

        ours = [ready(passes.upsampled(x)) for x in (student.layer_input, *student.layers)]
        theirs = [ready(x) for x in (teacher.layer_input, *teacher.layers)]
        terms: dict[str, list[Tensor]] = {name: [] for name in self.weights}
        for mine, other in self.layers:
            terms["layer"].append(self._relation("layer", ours[mine], None, theirs[other], theirs[other], num_pairs))
            inputs, teacher_inputs = ours[mine - 1], theirs[other - 1]
            terms["intra"].append(self._relation("intra", inputs, ours[mine], teacher_inputs, theirs[other], num_pairs))
            if "attention" in terms:
                maps = student.maps[mine - 1], teacher.maps[other - 1]
                if maps[0] is not None and maps[1] is not None:  # pruning may leave none to compare
                    terms["attention"].append(self._attention(ready(maps[0]), ready(maps[1]), num_pairs))
        zero = torch.zeros((), device=passes.waveforms.device)
        return {name: torch.stack(values).mean() if values else zero for name, values in terms.items()}

    def _relation(self, name: str, x: Tensor, y: Tensor | None, tx: Tensor, ty: Tensor, num_pairs: Tensor) -> Tensor:
        size = gram_square(tx, ty) if self.config.relative else num_pairs
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.weights[name] != 0):
            return gram_distance(x, y, tx, ty) / size.clamp(min=TINY)

    def _attention(self, ours: Tensor, theirs: Tensor, num_pairs: Tensor) -> Tensor:
        size = theirs.square().sum() if self.config.relative else num_pairs
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.weights["attention"] != 0):
            return (ours - theirs).square().sum() / size.clamp(min=TINY)
