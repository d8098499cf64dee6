"""A recipe on a teacher of any size with random weights, and updates of it from noise: what runs, without data."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import soundfile
import torch
from torch import Tensor

from distillation.build import STAND_IN, build_step, planned_student
from distillation.config import RECIPES, Recipe, parse_recipe
from distillation.deriving import matched_layers
from distillation.objectives import Teacher
from distillation.sparsity import make_prunable
from distillation.training.memory import probe_loss
from distillation.training.step import TrainingStep, seed_micro_batch
from wav2vec2 import Wav2Vec2Model, hardconcrete, wav2vec2_model
from wav2vec2.architecture import HUBERT_BASE, WAVLM_BASE
from wav2vec2.checkpoint import with_output_layer
from wav2vec2.feature_extractor import SAMPLE_RATE

RATE = 0.1  # of the recipe's: three updates at the full one amplify what devices round in other ways
SCALE = 64.0  # what a loss is multiplied to in float16; a scaler of torch's would leave out the first updates
SMALL = HUBERT_BASE | {  # of widths that a GPU's kernels like
    "extractor_conv_layer_config": [(16, 10, 5), *[(16, 3, 2)] * 4, *[(16, 2, 2)] * 2],
    "encoder_embed_dim": 32,
    "encoder_pos_conv_kernel": 16,
    "encoder_pos_conv_groups": 4,
    "encoder_num_layers": 4,
    "encoder_use_attention": [True] * 4,
    "encoder_use_feed_forward": [True] * 4,
    "encoder_num_heads": [4] * 4,
    "encoder_head_dim": 8,
    "encoder_ff_interm_features": [64] * 4,
}
Size = Literal["small", "base"]
SIZES: dict[Size, dict[str, Any]] = {"small": SMALL, "base": HUBERT_BASE}
# largest differences of a loss, as a share of it, and of the first gradient of a group of parameters, of its norm
TOLERANCE = {"32-true": 1e-4, "bf16-mixed": 1e-2, "16-mixed": 2e-3}
GRADIENT = {"32-true": 1e-3, "bf16-mixed": 0.1, "16-mixed": 0.03}
SMALLEST = 0.05  # a loss below it is compared as if it were that


def worst(differences: Iterable[float]) -> float:
    """The largest; not a number where any is none, which ``max`` would pass over."""
    return torch.tensor(list(differences), dtype=torch.float64).max().item()


def recipe_names() -> list[str]:
    """All that ship."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def fitted(name: str, config: dict[str, Any]) -> list[str]:
    """Flags that fit a recipe to a teacher of another size; the method stays what it is.

    Args:
        name: of the recipe.
        config: flat config of the teacher. A thin student is made thinner than a small one.
    """
    recipe, _ = parse_recipe(["--config", str(RECIPES / f"{name}.yaml")])
    num_layers, width = config["encoder_num_layers"], config["encoder_embed_dim"]
    layers = matched_layers(num_layers)
    flags: dict[str, object] = {"teacher_layers": num_layers, "teacher_width": width}
    if recipe.objective.layer_to_layer is not None:
        flags["objective.layer_to_layer.layers"] = [[0], layers]
    if recipe.objective.prediction_layer is not None:
        flags["objective.prediction_layer.layers"] = layers
    if (thin := recipe.student.thin) is not None and thin.width > width:
        thinner = width if thin.channels[-1] == thin.width else width // 3 * 2 // 8 * 8
        values = {"num_layers": num_layers, "width": thinner, "heads": 2, "ffn": 20, "channels": [6, 8, width],
                  "pos_conv_kernel": 8, "pos_conv_groups": 4}  # fmt: skip
        flags |= {f"student.thin.{key}": value for key, value in values.items()}
    return ["--config", str(RECIPES / f"{name}.yaml"), *(f"--{key}={value}" for key, value in flags.items())]


def random_teacher(recipe: Recipe, config: dict[str, Any]) -> Wav2Vec2Model:
    """Of the kind that the recipe is for: WavLM, with a mask embedding, with an output layer.

    Args:
        recipe: whose.
        config: flat config of a HuBERT.
    """
    config = dict(config)
    if "wavlm" in (recipe.teacher_id or ""):
        heads = config.pop("encoder_num_heads")
        del config["encoder_head_dim"]
        remaining = [list(range(count)) for count in heads]
        config = WAVLM_BASE | config | {"encoder_total_num_heads": heads, "encoder_remaining_heads": remaining}
    model = wav2vec2_model(**config)
    model.mask_embedding = torch.rand(config["encoder_embed_dim"])
    return model if recipe.objective.ctc is None else with_output_layer(model, STAND_IN)


def write_noise(audio: Path, tsv: Path, seconds: Sequence[float]) -> None:
    """Recordings of noise in a folder, and their list."""
    random = np.random.default_rng(0)
    lines = [str(audio)]
    for i, length in enumerate(seconds):
        name, samples = f"{tsv.stem}{i}.flac", round(SAMPLE_RATE * length)
        soundfile.write(audio / name, random.normal(0, 0.1, samples).clip(-1, 1), SAMPLE_RATE)
        lines.append(f"{name}\t{samples}")
    tsv.write_text("\n".join(lines) + "\n")


@dataclass
class Updates:
    """What a few updates gave: their losses, and the gradient of the first by group of parameters [n], on the CPU."""

    losses: list[float]
    gradients: dict[str, Tensor]

    def difference(self, other: Updates) -> tuple[float, float]:
        """Largest relative differences of another's losses and gradients from these."""
        losses = worst(abs(a - b) / max(SMALLEST, abs(a)) for a, b in zip(self.losses, other.losses, strict=True))
        pairs = [(g, other.gradients[name]) for name, g in self.gradients.items()]
        return losses, worst(((b - a).norm() / a.norm().clamp(min=1e-30)).item() for a, b in pairs)


@dataclass
class Trial:
    """What a recipe trains, at random.

    Attributes:
        recipe: as it was fitted.
        step: what learns from what.
        teacher: as it was made, on the CPU in float32.
        start: state of all that is trained, as it was made.
    """

    recipe: Recipe
    step: TrainingStep
    teacher: Wav2Vec2Model
    start: dict[str, Tensor]

    @classmethod
    def of(cls, name: str, config: dict[str, Any]) -> Trial:
        """A recipe by its name, on a teacher of this flat config; the same weights whenever it is called.

        There is no dropout, which two devices would draw in other ways. It is on the CPU and in float32.
        """
        recipe, _ = parse_recipe([*fitted(name, config), "--student.dropout=0", "--trainer.precision=32-true"])
        torch.manual_seed(0)
        teacher = random_teacher(recipe, config | {"encoder_layer_drop": 0.0})
        student = make_prunable(planned_student(recipe, teacher), recipe.pruning)
        step = build_step(recipe, recipe.optim, student, teacher, recipe.pruning)
        return cls(recipe, step, teacher, copy.deepcopy(step.trained.state_dict()))

    def again(self, precision: str, device: str) -> Trial:
        """From the start, in another precision of the training step (as Lightning names it), on another device."""
        self.recipe.trainer.precision = precision
        self.step.to(device)
        self.step.trained.load_state_dict(self.start)
        self.step.teacher = Teacher(copy.deepcopy(self.teacher), self.recipe.trainer.teacher_dtype)
        self.step.teacher.to(torch.device(device))
        return self

    @property
    def method(self) -> str:
        """What tells its training step from that of another recipe on the same teacher."""
        recipe, models = self.recipe, (self.teacher, self.step.student)
        kinds = [type(model.encoder.transformer.layers[0].attention).__name__ for model in models]
        return repr((kinds, recipe.student, recipe.objective, recipe.pruning.units, recipe.data.crop))

    def loss(self, waveforms: Tensor, update: int = 0) -> Tensor:
        """Of a micro-batch [B, N] of update 0, 1, ..., as Lightning would compute it; seeded by the update."""
        seed_micro_batch(0, update)
        dtype = self.recipe.trainer.dtype
        with torch.autocast(waveforms.device.type, dtype, enabled=dtype != torch.float32):
            return probe_loss(self.step, waveforms, self.recipe.data, update)

    def updates(self, waveforms: Tensor, count: int) -> Updates:
        """The first updates, all from the same micro-batch [B, N]."""
        optimizer = self.step.make_optimizer()
        for group in optimizer.param_groups:
            group["lr"] *= RATE
        half, losses = self.recipe.trainer.precision == "16-mixed", []
        gradients: dict[str, Tensor] = {}
        for update in range(count):
            loss = self.loss(waveforms, update)
            losses.append(loss.item())
            scale = SCALE / max(1.0, abs(losses[-1])) if half else 1.0
            (scale * loss).backward()
            for p in self.step.trained.parameters():
                if p.grad is not None:
                    p.grad /= scale
            if update == 0:
                for group in optimizer.param_groups:
                    parts = [p.grad.flatten() for p in group["params"] if p.grad is not None]
                    gradients[group["name"]] = torch.cat(parts).cpu()
            self.step.hold_back(optimizer, update)
            self.step.clip(optimizer)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return Updates(losses, gradients)


@contextlib.contextmanager
def drawn_on_the_cpu() -> Iterator[None]:
    """Gates are drawn from the CPU's random numbers, wherever the masks are: two devices draw the same."""
    usual = hardconcrete.sample
    with patch.object(hardconcrete, "sample", lambda log_alpha: usual(log_alpha.cpu()).to(log_alpha.device)):
        yield
