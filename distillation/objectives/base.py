"""What an objective is, and the forward passes it may ask for.

Shapes: B batch, T frames that are compared (T' in the layers of a time-reduced student), D student width, E teacher
width, L layers. T are all frames of the audio but those at the end that a time-reduced student loses.
"""

import dataclasses
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distillation.errors import UserError
from distillation.recognition.labels import Labels
from wav2vec2 import Wav2Vec2Model
from wav2vec2.feature_extractor import valid_frames
from wav2vec2.passes import HiddenStates, PassOptions

Ratios = dict[str, tuple[Tensor, Tensor]]
"""Name -> numerator and denominator, scalars."""


class Teacher:
    """The frozen teacher: always in eval, never registered as a submodule, hence in no checkpoint.

    Args:
        model: any model of this toolkit. Taken over: its linear maps are converted to a lower ``dtype``, as autocast
            would do in every pass.
        dtype: what it computes in; None for the precision of the training step around it.
    """

    def __init__(self, model: Wav2Vec2Model, dtype: torch.dtype | None = None) -> None:
        self.model = model.eval().requires_grad_(False)
        self.dtype = dtype
        if dtype in (torch.bfloat16, torch.float16):
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.to(dtype)

    def to(self, device: torch.device) -> None:
        """Move to the student's device."""
        self.model.to(device)

    @torch.no_grad()
    def __call__(self, waveforms: Tensor, lengths: Tensor | None, options: PassOptions) -> HiddenStates:
        """Run without gradient; the layers of a time-reduced teacher are held, so that all states have T frames."""
        with self._precision(waveforms.device):
            output, frames = self.model.run(waveforms, lengths, options)
        transformer, num_frames = self.model.encoder.transformer, output.features.shape[1]
        output.layers = [transformer.hold(state, num_frames, frames) for state in output.layers]
        output.layer_input = transformer.hold(output.layer_input, num_frames, frames)
        return output

    @torch.no_grad()
    def logits(self, state: Tensor) -> Tensor:
        """What the output layer gives for the last state [B, T, E]."""
        with self._precision(state.device):
            return self.model.project(state)

    def _precision(self, device: torch.device) -> AbstractContextManager:
        if self.dtype is None:
            return nullcontext()
        lower = self.dtype != torch.float32
        return torch.autocast(device.type, dtype=self.dtype if lower else None, enabled=lower)


class Passes:
    """The forward passes of one micro-batch; each kind is run once, however many objectives ask for it.

    All passes of the student share one draw of its masks.

    Args:
        teacher: frozen.
        student: the model that learns.
        waveforms: [B, N].
        lengths: [B] valid samples; None when nothing is padded.
        teacher_options: for every pass of the teacher.
        student_options: for every pass of the student.
        heard: [B, N], what the student hears instead; None for the same.
        labels: what is said; None where that is not known.
        frozen: let no gradient into the student below its output layer.
    """

    def __init__(
        self,
        teacher: Teacher,
        student: Wav2Vec2Model,
        waveforms: Tensor,
        lengths: Tensor | None,
        teacher_options: PassOptions,
        student_options: PassOptions,
        heard: Tensor | None = None,
        labels: Labels | None = None,
        frozen: bool = False,
    ) -> None:
        self.waveforms, self.lengths, self.labels = waveforms, lengths, labels
        self._heard, self._frozen = waveforms if heard is None else heard, frozen
        self._teacher, self._student = teacher, student
        self._teacher_options, self._student_options = teacher_options, student_options
        self._gates = student.draw_gates()
        self._teacher_output: HiddenStates | None = None
        self._student_output: HiddenStates | None = None
        self._student_states: list[Tensor] | None = None
        self._student_logits: Tensor | None = None

    def teacher_output(self) -> HiddenStates:
        """Everything from the teacher's pass, all with T frames. No gradient."""
        if self._teacher_output is None:
            self._teacher_output = self._run_teacher(self._teacher_options)
        return self._teacher_output

    def _run_teacher(self, options: PassOptions) -> HiddenStates:
        output, num_frames = self._teacher(self.waveforms, self.lengths, options), self.num_frames
        output.features, output.layer_input = output.features[:, :num_frames], output.layer_input[:, :num_frames]
        output.layers = [state[:, :num_frames] for state in output.layers]
        return output

    def teacher(self) -> list[Tensor]:
        """Teacher states [B, T, E], index 0 the Transformer's input. No gradient."""
        output = self.teacher_output()
        return [output.features, *output.layers]

    def student_output(self) -> HiddenStates:
        """Everything from the student's pass, layers of a time-reduced student with T' frames."""
        if self._student_output is None:
            self._student_output = self._run_student(self._student_options)
        return self._student_output

    def _run_student(self, options: PassOptions) -> HiddenStates:
        with torch.no_grad() if self._frozen else nullcontext():
            return self._student.run(self._heard, self.lengths, options, self._gates)[0]

    def student(self) -> list[Tensor]:
        """Student states [B, T, D], index 0 the Transformer's input; layers are upsampled where they are reduced."""
        if self._student_states is None:
            output = self.student_output()
            self._student_states = [output.features[:, : self.num_frames], *map(self.upsampled, output.layers)]
        return self._student_states

    def upsampled(self, state: Tensor) -> Tensor:
        """[B, T', D] -> [B, T, D] by the student's own upsampler."""
        return self._student.encoder.transformer.upsample(state, self.num_frames)

    def masked(self, masked: Tensor, student_embedding: Tensor) -> tuple[HiddenStates, HiddenStates]:
        """Another pass of teacher and student with masked frames.

        Args:
            masked: bool [B, T].
            student_embedding: [D]; the teacher takes its own.

        Returns:
            The teacher's output and the student's.
        """
        lost = int(self._student.output_length(torch.tensor([self.waveforms.shape[1]]))) - self.num_frames
        masked = F.pad(masked, (0, lost))
        teacher_options, student_options = (
            dataclasses.replace(options, masked=masked, mask_embedding=embedding, keep_maps=False)
            for options, embedding in ((self._teacher_options, None), (self._student_options, student_embedding))
        )
        return self._run_teacher(teacher_options), self._run_student(student_options)

    def student_logits(self) -> Tensor:
        """What the student's output layer gives, [B, T, V] with all frames, also those that time reduction loses."""
        if self._student_logits is None:
            frames = None if self.lengths is None else self.output_frames()
            self._student_logits = self._student.output(self.student_output(), frames)
        return self._student_logits

    def output_frames(self) -> Tensor:
        """Valid frames [B] of :meth:`student_logits`."""
        return self._student.output_length(self._samples())

    def symbol_frames(self) -> Tensor:
        """Frames [B] in which the student's output layer can write a symbol."""
        return self._student.symbol_frames(self._samples())

    def teacher_logits(self) -> Tensor:
        """What the teacher's output layer gives, [B, T, V]. No gradient."""
        return self._teacher.logits(self.teacher_output().layers[-1])

    def _samples(self) -> Tensor:
        """Valid samples [B]."""
        if self.lengths is not None:
            return self.lengths
        batch, samples = self.waveforms.shape
        return torch.full((batch,), samples, device=self.waveforms.device)

    @cached_property
    def num_frames(self) -> int:
        """T."""
        return int(self._compared(torch.tensor([self.waveforms.shape[1]])))

    def frame_lengths(self) -> Tensor | None:
        """Valid frames [B]; None when nothing is padded."""
        return None if self.lengths is None else self._compared(self.lengths)

    def _compared(self, lengths: Tensor) -> Tensor:
        """Frames [B] of samples [B] without those at the end that time reduction loses."""
        return self._student.encoder.transformer.covered(self._student.output_length(lengths))

    def valid(self) -> Tensor | None:
        """Bool [B, T]: frames that are no padding; None when all are."""
        lengths = self.frame_lengths()
        return None if lengths is None else valid_frames(lengths, self.num_frames)


class Objective(nn.Module):
    """Base of all objectives: owns its heads, asks for passes, returns named unweighted terms.

    Subclasses set ``weights`` (term name -> weight; 0 only logs), ``heads`` (possibly empty) and the deepest layers
    they look at, and implement ``forward``.
    """

    weights: dict[str, float]
    teacher_layers: int
    student_layers: int
    heads: nn.ModuleList
    uses_upsampler = True  # takes time-reduced states through the student's upsampler
    uses_labels = False  # wants to know what is said
    uses_output_layer = False  # takes the last state through the student's output layer
    ratio_names: tuple[str, ...] = ()  # of what is counted in validation
    keeps_maps = False  # looks at attention maps
    terms_look_alike = False  # every term depends on all that the others depend on

    def forward(self, passes: Passes) -> dict[str, Tensor]:
        """Terms by name, each a float32 scalar."""
        raise AssertionError(f"{type(self).__name__} has no forward")

    def ratios(self, passes: Passes) -> Ratios:
        """What is counted over a validation set, by ``ratio_names``: of every batch a numerator and a denominator."""
        return {}

    def head_state(self) -> dict[str, Tensor]:
        """State of everything that is trained besides the student, the heads under bare indices."""
        return {name.removeprefix("heads."): value for name, value in self.state_dict().items()}


def masked_mean(x: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of ``x`` [B, T, ...] over valid frames [B, T] and all trailing dimensions."""
    if valid is None:
        return x.mean()
    per_frame = x.flatten(2).mean(-1) if x.dim() > 2 else x
    return (per_frame * valid).sum() / valid.sum().clamp(min=1)


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_layers(layers: list[int], num_layers: int, what: str, first: int = 0) -> None:
    """Look whether all matched layers exist.

    Raises:
        UserError: one does not.
    """
    bad = [layer for layer in layers if not first <= layer <= num_layers]
    if bad:
        raise UserError(
            f"the objective matches layers {bad}, but the {what} has layers {first} to {num_layers}: "
            "choose a recipe for this model, or set other layers"
        )


def match_layers(layers: list[int] | None, student: Wav2Vec2Model, teacher: Wav2Vec2Model) -> list[tuple[int, int]]:
    """Pairs of a student layer and the teacher layer at the same relative depth, both counted from 1.

    Args:
        layers: of the student, ascending; None for all.
        student: L layers.
        teacher: of any depth.

    Raises:
        UserError: a layer does not exist.
    """
    if layers is None:
        layers = list(range(1, student.num_layers + 1))
    if not layers or layers != sorted(set(layers)):
        raise UserError(f"the objective matches layers {layers}: name at least one, each once, in ascending order")
    check_layers(layers, student.num_layers, "student", first=1)
    ratio = teacher.num_layers / student.num_layers
    return [(layer, max(1, round(layer * ratio))) for layer in layers]
