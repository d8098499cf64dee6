"""One training step of this toolkit and the same step plainly, and what they keep in memory."""

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from distillation.build import build_step
from distillation.config import RECIPES, parse_recipe
from distillation.errors import UserError
from distillation.objectives import ObjectiveConfig, Teacher
from distillation.objectives.layer_to_layer import DistanceWeights, distances
from evaluation.timing import Stopwatch
from wav2vec2 import Wav2Vec2Model
from wav2vec2.kernels import linear

LAYERS = (0, 4, 8, 12)
HEAD_WIDTH = 768
SPREAD = 2.0  # of log_alpha around its mean: some units nearly certain, some undecided
BF16 = torch.bfloat16
Step = Callable[[], object]


def require_gpu(device: str) -> None:
    """Look whether the device is there.

    Raises:
        UserError: it is not.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU is visible; --device cpu tries the command without one")


class Operations(TorchDispatchMode):
    """Counts torch's operations, without views: what a GPU's host launches, and what it works for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def autocast(dtype: torch.dtype | None, device: str = "cpu") -> Any:
    """Of a step: bfloat16, or float32 as it is."""
    return nullcontext() if dtype is None else torch.autocast(device, dtype)


def num_macs(model: Wav2Vec2Model, waveforms: Tensor) -> float:
    """Multiply-accumulates of ``extract_features`` of a batch without padding."""
    return model.get_num_macs([waveforms.shape[1]] * len(waveforms)).item()


class Ours:
    """This toolkit's training step, as its Lightning module takes it.

    Args:
        student: masked for step 1, dense for step 2.
        teacher: dense.
        waveforms: [B, N], nothing padded.
        objective: what to train towards; DPHuBERT's by default.
    """

    def __init__(
        self,
        student: Wav2Vec2Model,
        teacher: Wav2Vec2Model,
        waveforms: Tensor,
        objective: ObjectiveConfig | None = None,
    ) -> None:
        recipe, _ = parse_recipe(["--config", str(RECIPES / "dphubert_base.yaml")])
        self.objective = recipe.objective = objective or recipe.objective
        recipe.trainer.precision = "32-true"  # the teacher is given per step
        torch.manual_seed(0)
        self.student, self.waveforms = student.train(), waveforms
        self.teachers = {None: Teacher(teacher), BF16: Teacher(copy.deepcopy(teacher), BF16)}
        self.training = build_step(recipe, recipe.optim, student, teacher, recipe.pruning if student.masks() else None)
        self.training.to(str(waveforms.device))
        self.optimizer = self.training.make_optimizer()
        # rates of 0: a step must not change the sparsity that is being measured
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0 if group["name"] in ("log_alpha", "lambda") else 1e-6
        self.watch = Stopwatch()

    def forward(self, dtype: torch.dtype | None = None, teacher_dtype: torch.dtype | None = None) -> Tensor:
        """Loss of a micro-batch; the teacher's type is the student's where it is not given."""

        def teacher(*args: Any) -> Any:
            with self.watch("teacher"):
                return self.teachers[teacher_dtype or dtype](*args)

        self.training.teacher = teacher  # type: ignore[assignment]
        with self.watch("student, forward"), autocast(dtype, self.waveforms.device.type):
            return self.training.loss(self.waveforms, None, 0).total

    def step(self, dtype: torch.dtype | None = None, teacher_dtype: torch.dtype | None = None) -> None:
        """One update."""
        loss = self.forward(dtype, teacher_dtype)
        with self.watch("student, backward"):
            loss.backward()
        with self.watch("update"):
            self.training.clip(self.optimizer)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


class Peer:
    """The same step plainly: torchaudio's teacher, a student of any origin, every layer's state, torch's AdamW.

    Args:
        student: has ``extract_features``.
        teacher: torchaudio's.
        waveforms: [B, N].
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, waveforms: Tensor) -> None:
        self.student, self.teacher, self.waveforms = student.train(), teacher.eval().requires_grad_(False), waveforms
        self.heads = nn.ModuleList(nn.Linear(HEAD_WIDTH, HEAD_WIDTH) for _ in LAYERS).to(waveforms.device)
        self.params = [p for p in [*student.parameters(), *self.heads.parameters()] if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.params, 1e-6)
        self.watch = Stopwatch()

    def forward(self) -> Tensor:
        """Loss of a micro-batch."""
        with self.watch("teacher"), torch.no_grad():
            targets = states(self.teacher, self.waveforms)
        with self.watch("student, forward"):
            found = states(self.student, self.waveforms)
            predictions = [head(found[layer]) for head, layer in zip(self.heads, LAYERS)]
            weights = DistanceWeights()
            terms = distances(predictions, [targets[layer] for layer in LAYERS], None, weights)
            return torch.stack([terms[name] * weight for name, weight in weights.as_terms().items() if weight]).sum()

    def step(self) -> None:
        """One update in float32."""
        self.finish(self.forward())

    def finish(self, loss: Tensor) -> None:
        """Backward, clip, update."""
        with self.watch("student, backward"):
            loss.backward()
        with self.watch("update"):
            torch.nn.utils.clip_grad_norm_(self.params, 10.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def states(model: nn.Module, waveforms: Tensor) -> list[Tensor]:
    """The Transformer's input and all layers; torchaudio's own model gives the layers alone."""
    if isinstance(model, Wav2Vec2Model):
        return model.extract_features(waveforms)[0]
    features, _ = model.feature_extractor(waveforms, None)  # type: ignore[operator]
    encoder: Any = model.encoder
    features, mask = encoder._preprocess(features, None)
    return [features, *encoder.transformer.get_intermediate_outputs(features, attention_mask=mask)]


def set_sparsity(model: Wav2Vec2Model, target: float) -> None:
    """Masks whose expected number of parameters is that share short of all; units of all kinds alike."""
    masks = list(model.masks().values())
    generator = torch.Generator().manual_seed(0)
    noise = [SPREAD * torch.randn(len(mask), generator=generator) for mask in masks]
    total = sum(p.numel() for name, p in model.named_parameters() if not name.endswith("log_alpha"))
    low, high = -20.0, 20.0
    with torch.no_grad():
        for _ in range(30):
            middle = (low + high) / 2
            for mask, values in zip(masks, noise):
                mask.log_alpha.copy_(values + middle)
            if model.get_num_params().item() > (1 - target) * total:
                high = middle
            else:
                low = middle


def matmul_peak(dtype: torch.dtype, size: int = 2048, device: str = "cpu") -> float:
    """Multiply-accumulates per second of a square matrix product, by the faster of the libraries that torch has."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    linear(a[None], b)[0, 0, 0].item()
    begin, count = time.perf_counter(), 0
    while count < 3 or time.perf_counter() - begin < 1.0:
        for _ in range(5):
            c = linear(a[None], b)
        c[0, 0, 0].item()  # waits for the device
        count += 5
    return count * size**3 / (time.perf_counter() - begin)


def kept_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Bytes that a forward pass keeps for backward, parameters left out, each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)  # so that no storage is freed and its address given to another
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(kept.values())
