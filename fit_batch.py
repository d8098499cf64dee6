"""Before training on GPUs: find the largest micro-batches that fit, and cut the recipe's update into these.

    python fit_batch.py --config conf/dphubert_base.yaml
    python distill.py --config conf/dphubert_base.yaml --config exp/dphubert_base/batch.yaml

Tries training steps on one GPU, with the masks where they start, i.e. when they need most. Writes batch.yaml to
exp_dir, a recipe of two settings. An update keeps its seconds of audio (DPHuBERT: 640), so the rates need no change.
"""

from __future__ import annotations

import logging

import torch
import yaml
from torch import Tensor

from distillation.build import build_run, load_teacher, starting_student
from distillation.config import Recipe, parse_recipe
from distillation.errors import UserError, command
from distillation.optimisation import param_groups
from distillation.sparsity import make_prunable
from distillation.training.memory import probe_lengths, same_update, search
from lightning import DistillModule, find_devices
from wav2vec2.checkpoint import replacing

logger = logging.getLogger(__name__)


class Trial:
    """Updates without Lightning: all that takes memory, and nothing else.

    Args:
        module: on its device.
        recipe: whose update it is.
    """

    def __init__(self, module: DistillModule, recipe: Recipe) -> None:
        self.module, self.dtype, self.data = module.train(), recipe.trainer.dtype, recipe.data
        module.teacher.to(module.device)
        groups = param_groups(module, module.lagrangian, recipe.optim, recipe.pruning)
        for group in groups:
            group["lr"] = 0.0  # the masks stay where they start
        self.optimizer = torch.optim.AdamW(groups, fused=True)

    def __call__(self, waveforms: Tensor) -> None:
        """One update from waveforms [B, N]."""
        module = self.module
        try:
            with torch.autocast(waveforms.device.type, self.dtype, enabled=self.dtype != torch.float32):
                lengths = probe_lengths(waveforms, self.data)
                loss = module.objectives(module.teacher, module.student, waveforms, lengths).total
            if module.lagrangian is not None:
                loss = loss + module.lagrangian(module.student.get_num_params(), 0)
            loss.backward()
            self.optimizer.step()
        finally:
            self.optimizer.zero_grad(set_to_none=True)


@command
def main() -> None:
    """Run the search."""
    recipe, resolved = parse_recipe(description=__doc__ or "")
    data, trainer, device = recipe.data, recipe.trainer, torch.device("cuda", 0)
    if trainer.accelerator == "cpu" or not torch.cuda.is_available():
        why = "the recipe trains on the CPU" if trainer.accelerator == "cpu" else "none is visible"
        raise UserError(f"this measures the memory of a GPU, and {why}: set --data.seconds_per_batch yourself")
    _, devices = find_devices(trainer)
    world_size = devices * trainer.num_nodes
    teacher = load_teacher(recipe)
    student = make_prunable(starting_student(recipe, teacher), recipe.pruning)
    module = build_run(recipe, recipe.optim, 1, student, teacher, pruning=recipe.pruning, resolved=resolved).to(device)
    per_batch = (
        data.seconds_per_batch if data.utterances_per_batch is None else data.utterances_per_batch * data.max_seconds
    )
    # tried with room to spare: what fits is then cut down to the share of the memory that is safe to use
    most_seconds = 1.2 * per_batch * trainer.batches_per_update / world_size
    seconds = search(Trial(module, recipe), data, most_seconds, device)
    name, value, count = same_update(data, trainer, world_size, seconds)
    path = recipe.exp_dir / "batch.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        content = {"data": {name: value}, "trainer": {"batches_per_update": count}}
        temporary.write_text(yaml.safe_dump(content), encoding="utf-8")
    logger.info("micro-batches of up to %.0f s are safe; the update is %d of %s %g", seconds, count, name, value)
    print(f"--data.{name} {value:g} --trainer.batches_per_update {count}")
    print(f"-> {path}")


if __name__ == "__main__":
    main()
