"""Before training on GPUs: find the largest micro-batches that fit, and cut the recipe's update into these.

    python fit_batch.py --config conf/dphubert_base.yaml
    python distill.py --config conf/dphubert_base.yaml --config exp/dphubert_base/batch.yaml

Tries training steps on one GPU, with the masks where they start, i.e. when they need most. Writes batch.yaml to
exp_dir, a recipe of two settings. An update keeps its seconds of audio (DPHuBERT: 640), so the rates need no change.
Run again, it searches only where recipe, teacher or GPU are others.
"""

import logging

import yaml

from distillation.build import build_step, planned_student
from distillation.config import parse_recipe
from distillation.errors import UserError, command
from distillation.sparsity import make_prunable
from distillation.teacher import load_teacher
from distillation.training.memory import BATCH, TrialUpdates, is_current, same_update, search, searched_for
from wav2vec2.checkpoint import write_text

logger = logging.getLogger(__name__)


@command
def main() -> None:
    """Run the search."""
    recipe, _ = parse_recipe(description=__doc__ or "")
    data, trainer, path = recipe.data, recipe.trainer, recipe.exp_dir / BATCH
    searched = searched_for(recipe)
    if is_current(path, searched):
        print(f"-> {path} is up to date")
        return
    accelerator, devices = trainer.find_devices()
    if accelerator == "cpu":
        raise UserError(
            "this measures the memory of a GPU, and the recipe trains on the CPU: set --data.seconds_per_batch yourself"
        )
    world_size = devices * trainer.num_nodes
    teacher = load_teacher(recipe)
    student = make_prunable(planned_student(recipe, teacher), recipe.pruning)
    step = build_step(recipe, recipe.optim, student, teacher, recipe.pruning)
    device = step.to("cuda:0")
    per_batch = (
        data.seconds_per_batch if data.utterances_per_batch is None else data.utterances_per_batch * data.max_seconds
    )
    # tried with room to spare: what fits is then cut down to the share of the memory that is safe to use
    most_seconds = 1.2 * per_batch * trainer.batches_per_update / world_size
    seconds = search(TrialUpdates(step, trainer.dtype, data), data, most_seconds, device)
    name, value, count = same_update(data, trainer, world_size, seconds)
    content = yaml.safe_dump({"data": {name: value}, "trainer": {"batches_per_update": count}})
    write_text(path, f"{searched}\n{content}")
    logger.info("micro-batches of up to %.0f s are safe; the update is %d of %s %g", seconds, count, name, value)
    print(f"--data.{name} {value:g} --trainer.batches_per_update {count}")
    print(f"-> {path}")


if __name__ == "__main__":
    main()
