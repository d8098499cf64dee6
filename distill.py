"""Step 1: distil the teacher into a student and prune it jointly; or train a fixed student where nothing is pruned.

    python distill.py --config conf/dphubert_base.yaml --data.tsv_dir data

Leaves in exp_dir: config.yaml, ckpts/last.ckpt, metrics.csv, TensorBoard events. Run again to resume.
"""

import logging

from distillation.build import build_step, load_teacher, starting_student
from distillation.config import parse_recipe
from distillation.errors import command
from distillation.sparsity import check_target, make_prunable
from distillation.training.lock import run_lock
from wav2vec2 import prune, save_model
from wav2vec2.architecture import format_architecture
from wav2vec2.counting import count_params

logger = logging.getLogger(__name__)


@command
def main() -> None:
    """Run the stage."""
    recipe, resolved = parse_recipe(description=__doc__ or "")
    from lightning import AudioDataModule, DistillModule, build_trainer, train  # takes seconds: not for --help

    teacher = load_teacher(recipe)
    student = make_prunable(starting_student(recipe, teacher), recipe.pruning)
    check_target(student, count_params(teacher), recipe.pruning)
    data = AudioDataModule(recipe)
    optim = recipe.optim.resolved(data.updates_of)
    trainer = build_trainer(recipe, optim)
    module = DistillModule(build_step(recipe, optim, student, teacher, recipe.pruning), recipe.seed, resolved)
    with run_lock(recipe.exp_dir, owner=trainer.is_global_zero):
        train(module, data, trainer, recipe)
        if trainer.is_global_zero and not recipe.pruning.units:
            save_model(recipe.exp_dir / "final.pth", student, module.objectives.head_state())
            logger.info("wrote %s", recipe.exp_dir / "final.pth")
    if not trainer.is_global_zero or not recipe.pruning.units:
        return
    _, found = prune(student)
    num_params = student.get_num_params().item()
    sparsity = 1 - num_params / count_params(teacher)
    print(format_architecture(teacher.config, found))
    print(f"expected: {num_params:,.0f} parameters, sparsity {sparsity:.4f}; target {recipe.pruning.target_sparsity}")


if __name__ == "__main__":
    main()
