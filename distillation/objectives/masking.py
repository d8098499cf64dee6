"""Masking distillation of ARMHuBERT and MaskHuBERT (https://arxiv.org/abs/2305.11685, section 2.2).

Shapes: B batch, T frames, D student width, E teacher width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from distillation.errors import UserError
from distillation.objectives.base import Passes, at_least_float32
from distillation.objectives.hint import LayerwiseHeads
from distillation.objectives.spans import SpanConfig, draw_spans
from wav2vec2 import Wav2Vec2Model


class Masking(LayerwiseHeads):
    """The teacher runs with and without masked frames, the student with the same frames masked.

    Masked frames learn what the teacher says when it sees them, unmasked frames what it says when it does not see the
    others. The student's mask embedding [D] is trained with the heads.
    """

    @dataclass
    class Config(LayerwiseHeads.Config, SpanConfig):
        """Settings."""

    def __init__(self, config: Masking.Config, student: Wav2Vec2Model, teacher: Wav2Vec2Model) -> None:
        super().__init__(config, student, teacher)
        self.config = config
        if teacher.mask_embedding is None:
            raise UserError("masking distillation needs the teacher's mask embedding, which its file does not hold: "
                            "convert a pre-trained teacher, fine-tuned ones may have lost it")  # fmt: skip
        self.weights = {"last_masked": config.last, "last_unmasked": config.last,
                        "hint_masked": config.hint, "hint_unmasked": config.hint}  # fmt: skip
        if student.embed_dim == teacher.embed_dim:
            self.mask_embedding = nn.Parameter(teacher.mask_embedding.clone())
        else:
            self.mask_embedding = nn.Parameter(torch.rand(student.embed_dim))

    def draw(self, passes: Passes) -> Tensor:
        """Masked frames, bool [B, T]: new ones in every training pass, always the same ones in validation."""
        seed = int(torch.randint(2**62, ())) if self.training else 0
        lengths, num_frames = passes.frame_lengths(), passes.num_frames
        valid = [num_frames] * len(passes.waveforms) if lengths is None else lengths.tolist()
        spans = draw_spans(valid, num_frames, self.config, np.random.default_rng(seed))
        return torch.from_numpy(spans).to(passes.waveforms.device, non_blocking=True)

    def forward(self, passes: Passes) -> dict[str, Tensor]:
        """Terms last_masked, last_unmasked, and hint_masked, hint_unmasked, the sums over the other layers.

        Each is a sum over its frames of the mean squared difference, divided by the number of all valid frames.
        """
        masked, valid = self.draw(passes), passes.valid()
        teacher, student = passes.masked(masked, self.mask_embedding)
        unmasked = ~masked if valid is None else ~masked & valid
        num_frames = (masked.sum() + unmasked.sum()).clamp(min=1)
        predictions = self.predictions(student.layers, passes.num_frames)
        terms: dict[str, list[Tensor]] = {name: [] for name in self.weights}
        for prediction, (_, layer) in zip(predictions, self.layers):
            target = torch.where(masked[..., None], passes.teacher()[layer], teacher.layers[layer - 1])
            difference = (at_least_float32(prediction) - at_least_float32(target)).square().mean(-1)
            name = "last" if prediction is predictions[-1] else "hint"
            for kind, frames in (("masked", masked), ("unmasked", unmasked)):
                terms[f"{name}_{kind}"].append((difference * frames).sum() / num_frames)
        zero = torch.zeros((), device=masked.device)
        return {name: torch.stack(values).sum() if values else zero for name, values in terms.items()}
