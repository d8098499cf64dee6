"""CTC on transcripts (Graves et al. 2006), from the student's own output layer, with the teacher's logits if wanted.

Shapes: B batch, T frames, V vocabulary, S symbols of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillation.errors import UserError, require
from distillation.objectives.base import Objective, Passes, Ratios, at_least_float32, masked_mean
from distillation.recognition.decoding import RATES, count_errors, greedy_decoder
from distillation.recognition.labels import make_vocabulary
from wav2vec2 import Wav2Vec2Model


class CTC(Objective):
    """The task's loss in the loop of compression, or alone: then it fine-tunes.

    Pruning with it beats compressing first and fine-tuning after (https://arxiv.org/abs/2502.05837).
    """

    terms_look_alike = True
    uses_labels = uses_output_layer = True
    uses_upsampler = False
    ratio_names = RATES

    @dataclass
    class Config:
        """Settings."""

        weight: float = 1.0
        """Of the loss: minus the log-probability of a row's text divided by its symbols, mean over rows."""
        distill: float = 0.0
        """Weight of the distance to the teacher's output layer: Kullback-Leibler, mean over frames, times the squared
        temperature (Hinton et al. 2015)."""
        temperature: float = 1.0
        """Divides the logits of both in that distance."""
        vocabulary: Literal["auto", "model", "transcripts"] = "auto"
        """Output layer to start from: that of the model, with its symbols; or a new one over the characters of the
        training transcripts; auto for that of the model where it has one."""

        def __post_init__(self) -> None:
            require(self, "objective.ctc.", "be at least 0", lambda value: value >= 0, "weight", "distill")
            require(self, "objective.ctc.", "be positive", lambda value: value > 0, "temperature")

    def __init__(self, config: CTC.Config, student: Wav2Vec2Model, teacher: Wav2Vec2Model) -> None:
        super().__init__()
        self.config = config
        if student.aux is None:
            raise UserError("objective.ctc: the student has no output layer: set data.transcripts")
        same = teacher.aux is not None and teacher.aux.out_features == student.aux.out_features
        if student.vocabulary is not None and teacher.vocabulary is not None:
            same = same and student.vocabulary == teacher.vocabulary
        if config.distill and not same:
            raise UserError(
                "objective.ctc.distill: the teacher has no output layer over the same symbols: take one that is "
                "fine-tuned, converted with --ctc, or set it to 0"
            )
        self.student_layers = student.num_layers
        self.teacher_layers = teacher.num_layers if config.distill else 0
        self.weights = {"ctc": config.weight, "impossible": 0.0}
        if config.distill:
            self.weights["logits"] = config.distill
        self.heads = nn.ModuleList()
        self.decode = greedy_decoder(student.vocabulary or make_vocabulary([]))

    def forward(self, passes: Passes) -> dict[str, Tensor]:
        """Terms ctc, impossible (the share of rows whose frames are too few for their text, which ctc leaves out) and,
        where it has a weight, logits."""
        labels = passes.labels
        assert labels is not None
        logits, frames = at_least_float32(passes.student_logits()), passes.output_frames()
        log_probs = F.log_softmax(logits, -1)
        possible = labels.needed <= passes.symbol_frames()
        losses = F.ctc_loss(
            log_probs.transpose(0, 1), labels.symbols, frames, labels.counts, reduction="none", zero_infinity=True
        )
        each = torch.where(possible, losses, 0.0) / labels.counts.clamp(min=1)
        terms = {"ctc": each.sum() / possible.sum().clamp(min=1), "impossible": (~possible).float().mean()}
        if self.config.distill:
            scale = self.config.temperature
            target = F.log_softmax(at_least_float32(passes.teacher_logits()) / scale, -1)
            prediction = F.log_softmax(logits[:, : passes.num_frames] / scale, -1)
            distance = F.kl_div(prediction, target, reduction="none", log_target=True).sum(-1)
            terms["logits"] = scale**2 * masked_mean(distance, passes.valid())
        return terms

    def ratios(self, passes: Passes) -> Ratios:
        """Word and character error rates of greedy decoding, in percent."""
        assert passes.labels is not None
        texts = self.decode(passes.student_logits(), passes.output_frames())
        counts = count_errors(texts, passes.labels.texts)
        return {name: (100 * errors, total) for name, (errors, total) in counts.items()}
