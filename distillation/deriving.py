"""A recipe for any teacher, any audio and the machine at hand: what differs from the published one, and why.

Settings that the user names are never derived. The rules follow what is published: matched layers are 0 and each third
of the depth, an update keeps its seconds of audio, warm-ups keep their share of a shortened run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distillation.config import Recipe
from distillation.data.corpus import Layout
from distillation.optimisation import OptimConfig

LIST_960H, LIST_100H, OTHER_LIST = "train960.tsv", "train100.tsv", "train.tsv"
# Runs under a fifth of the published length get the rates of the multipliers and the longer ramp with which
# conf/demo.yaml holds the sparsity in 500 updates.
SHORT_STEPS = 10_000
SHORT_RUN = {
    "pruning.constant_lr": True, "pruning.lr_masks": 0.05, "pruning.lr_lagrangian": 0.015,
    "pruning.drop_rates": {"conv": 0.1, "head": 0.1, "interm": 0.1},
}  # fmt: skip
SHORT_RAMP = 0.6
CPU_SECONDS = 20.0  # in a micro-batch: holds the longest utterance, and fits a laptop
OTHER_MIN_FRAMES = 8_000  # half a second: corpora of single words too
POINTS = 20  # rows of metrics, at least, of a short run


@dataclass
class Derived:
    """What a recipe needs besides what it says.

    Attributes:
        settings: values by dotted name.
        reasons: names of settings, and why they have their values.
    """

    settings: dict[str, Any]
    reasons: list[tuple[list[str], str]]

    @classmethod
    def nothing(cls) -> Derived:
        """To be filled."""
        return cls({}, [])

    def add(self, reason: str, settings: Mapping[str, Any]) -> None:
        """Derive settings for a reason."""
        self.settings |= settings
        self.reasons.append((list(settings), reason))

    def keep(self, used: Mapping[str, Any]) -> None:
        """Forget what is not used, since the user's flags say something else.

        Args:
            used: all settings of the recipe, in plain types.
        """
        self.drop({name for name, value in self.settings.items() if not _is_used(value, used.get(name))})

    def drop(self, names: Collection[str]) -> None:
        """Forget some settings."""
        self.settings = {name: value for name, value in self.settings.items() if name not in names}
        reasons = [([name for name in kept if name in self.settings], why) for kept, why in self.reasons]
        self.reasons = [(kept, why) for kept, why in reasons if kept]


def _is_used(derived: Any, used: Any) -> bool:
    if isinstance(derived, dict) and isinstance(used, dict):  # a flag may say one of its values
        return any(used.get(key) == value for key, value in derived.items())
    return used == (str(derived) if isinstance(derived, Path) else derived)


def matched_layers(num_layers: int) -> list[int]:
    """Each third of the depth: 4, 8, 12 of 12 layers and 8, 16, 24 of 24, as published; layer 0 has its own map."""
    return sorted({max(1, round(num_layers * third / 3)) for third in (1, 2, 3)})


def for_teacher(derived: Derived, recipe: Recipe, num_layers: int, width: int) -> None:
    """Depth, width and matched layers, where the recipe is for another teacher."""
    if (recipe.teacher_layers, recipe.teacher_width) == (num_layers, width):
        return
    settings: dict[str, Any] = {"teacher_layers": num_layers, "teacher_width": width}
    if recipe.objective.layer_to_layer is not None and recipe.teacher_layers != num_layers:
        settings["objective.layer_to_layer.layers"] = [[0], matched_layers(num_layers)]
    derived.add("the teacher's depth and width; 0 and each third of its layers are matched, as published", settings)


def for_audio(derived: Derived, recipe: Recipe, layout: Layout, adapt: bool) -> None:
    """The training list, of those that a folder of audio gives.

    Args:
        derived: gets what the recipe does not say.
        recipe: as the user asks for it.
        layout: of the folder.
        adapt: whether other settings than the list may follow the audio.
    """
    if recipe.data.train in layout.lists:
        return
    missing = ", ".join(layout.missing)
    if OTHER_LIST in layout.lists:
        if layout.librispeech:
            derived.add(f"what there is of LibriSpeech, without {missing}", {"data.train": OTHER_LIST})
            return
        settings: dict[str, Any] = {"data.train": OTHER_LIST}
        if adapt:
            settings["data.min_frames"] = min(recipe.data.min_frames, OTHER_MIN_FRAMES)
            if recipe.data.transcripts is None:
                settings["data.long"] = "split"
        used = ": its list, all of it from 0.5 s on" if adapt else ": its list"
        derived.add(f"the audio is no LibriSpeech{used}", settings)
    elif adapt and recipe.data.train == LIST_960H and LIST_100H in layout.lists:
        reason = f"LibriSpeech without {missing}: train-clean-100, the list of the 100 h recipe"
        derived.add(reason, {"data.train": LIST_100H})


def for_machine(derived: Derived, recipe: Recipe, published: Recipe, accelerator: str, world_size: int) -> None:
    """On a CPU small micro-batches; on GPUs as many for each, for the same update."""
    data, count = recipe.data, recipe.trainer.batches_per_update
    if data.utterances_per_batch is not None or data.seconds_per_batch != published.data.seconds_per_batch:
        return
    if accelerator == "cpu":
        seconds = max(CPU_SECONDS, math.ceil(data.max_seconds))
        if data.seconds_per_batch > seconds:
            update = f"{data.seconds_per_batch * count:g}"
            derived.add(
                f"the CPU: an update of {count} x {seconds:g} s of audio instead of {update} s",
                {"data.seconds_per_batch": seconds, "data.valid_seconds_per_batch": seconds},
            )
    elif count % world_size and count == published.trainer.batches_per_update:
        total = data.seconds_per_batch * count
        count = math.ceil(count / world_size) * world_size
        seconds = max(total / count, data.max_seconds)
        derived.add(
            f"{world_size} GPUs, as many micro-batches for each: the update has {count * seconds:.6g} s of audio "
            f"(published {total:g})",
            {"trainer.batches_per_update": count, "data.seconds_per_batch": seconds},
        )


def for_length(derived: Derived, recipe: Recipe, published: Recipe) -> None:
    """Warm-ups, rates of the multipliers and intervals of a run that the user has made shorter or longer."""
    steps = []
    for name, optim, before in (("optim", recipe.optim, published.optim), ("final", recipe.final, published.final)):
        if optim is None or before is None or before.max_epochs is not None:
            continue
        if optim.max_epochs is not None:
            if optim.warmup_ratio is None:
                ratio = round(before.warmup_steps / before.max_steps, 6)
                derived.add(f"the published share of {optim.max_epochs} epochs", {f"{name}.warmup_ratio": ratio})
        elif optim.max_steps != before.max_steps:
            steps.append(optim.max_steps)
            if optim.warmup_ratio is None:
                warmup = _scaled(before.warmup_steps, optim, before)
                derived.add(f"the published share of {optim.max_steps} updates", {f"{name}.warmup_steps": warmup})
    length = recipe.optim.max_steps
    if recipe.pruning.units and recipe.optim.max_epochs is None and length != published.optim.max_steps:
        if length < SHORT_STEPS:
            reason = f"{length} updates are few: rates and ramp of conf/demo.yaml; prune.py cuts what they leave"
            derived.add(reason, {"pruning.warmup_steps": round(SHORT_RAMP * length), **SHORT_RUN})
        else:
            ramp = _scaled(published.pruning.warmup_steps, recipe.optim, published.optim)
            derived.add(f"the published share of {length} updates", {"pruning.warmup_steps": ramp})
    trainer = recipe.trainer
    if steps and min(steps) < POINTS * trainer.log_every:
        every = max(1, min(steps) // POINTS)
        quarter = max(1, min(steps) // 4)
        derived.add(
            "a short run",
            {
                "trainer.log_every": every,
                "trainer.validate_every": min(trainer.validate_every, quarter),
                "trainer.checkpoint_every": min(trainer.checkpoint_every, quarter),
            },
        )


def _scaled(steps: int, optim: OptimConfig, before: OptimConfig) -> int:
    return round(steps * optim.max_steps / before.max_steps)


def run_name(recipe: Recipe, published: Recipe, default: str, audio: Path, layout: Layout) -> Path:
    """Folder of the run: of the published recipe, with what is another in its name.

    Args:
        recipe: as the user asks for it.
        published: the recipe itself.
        default: its name.
        audio: folder.
        layout: of the audio.
    """
    name = default
    file = re.sub(r"(\.(hf|torchaudio|fairseq|student))?\.(pth|safetensors)$", "", recipe.teacher_ckpt.name)
    teacher = recipe.teacher_id or file
    if teacher != published.teacher_id:
        name = f"{default.split('_')[0]}_{Path(teacher.removeprefix('torchaudio:')).resolve().name.lower()}"
    if OTHER_LIST in layout.lists:
        name += f"_{audio.name.lower()}"
    elif recipe.data.train == LIST_960H and LIST_960H not in layout.lists:
        name += "_100h"
    return published.exp_dir.parent / re.sub(r"[^\w.+-]+", "_", name)
