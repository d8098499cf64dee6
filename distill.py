"""Step 1: distil the teacher into a student and prune it jointly; or train a fixed student where nothing is pruned.

    python distill.py --config conf/dphubert_base.yaml --data.tsv_dir data

Leaves in exp_dir: config.yaml, ckpts/last.ckpt, metrics.csv, TensorBoard events. Run again to resume.
"""

import logging

from distillation.build import build_step, starting_student
from distillation.config import parse_recipe
from distillation.errors import command
from distillation.identity import content_of, step_1_identity
from distillation.sparsity import check_budget, make_budget, make_prunable
from distillation.teacher import load_teacher
from distillation.training.lock import run_lock
from distillation.training.standing import open_run, save_result
from wav2vec2 import prune
from wav2vec2.architecture import format_architecture

logger = logging.getLogger(__name__)


@command
def main() -> None:
    """Run the stage."""
    recipe, resolved = parse_recipe(description=__doc__ or "")
    from lightning import AudioDataModule, DistillModule, is_first_process, train  # takes seconds: not for --help

    teacher = load_teacher(recipe)
    start = starting_student(recipe, teacher)
    data = AudioDataModule(recipe)
    content = content_of(recipe, teacher, data.manifests)
    identity = step_1_identity(recipe, content, None if recipe.student_ckpt is None else start)
    student = make_prunable(start, recipe.pruning)
    if recipe.pruning.units:
        check_budget(student, make_budget(recipe.pruning, teacher), recipe.pruning)
    with run_lock(recipe.exp_dir, owner=is_first_process()):
        run = open_run(recipe.exp_dir, identity, recipe.continue_with_changes)
        optim = run.resolve(recipe.optim, data.updates_of)
        step = build_step(recipe, optim, student, teacher, recipe.pruning)
        module = DistillModule(step, recipe.seed, resolved, run)
        train(module, data, recipe)
        if is_first_process() and not recipe.pruning.units:
            entry = run.entry(optim.max_steps)
            save_result(recipe.exp_dir / "final.pth", student, module.objectives.head_state(), entry)
    if not is_first_process() or step.lagrangian is None:
        return
    _, found = prune(student)
    budget = step.lagrangian.budget
    expected = budget.cost(student).item()
    print(format_architecture(teacher.config, found))
    print(
        f"expected: {budget.cost.text(expected)}, sparsity {budget.sparsity_of(expected):.4f}; "
        f"target {budget.cost.text(budget.target)}, {budget.sparsity:.4g}"
    )


if __name__ == "__main__":
    main()
