"""Step 1: distil the teacher into a student and prune it jointly; or train a fixed student where nothing is pruned.

    python distill.py --config conf/dphubert_base.yaml --data.tsv_dir data

Leaves in exp_dir: config.yaml, ckpts/last.ckpt, metrics.csv, TensorBoard events. Run again to resume.
"""

from distillation.config import parse_recipe
from distillation.errors import command
from wav2vec2 import prune
from wav2vec2.architecture import format_architecture


@command
def main() -> None:
    """Run the stage."""
    recipe, resolved = parse_recipe(description=__doc__ or "")
    from lightning import first_step, is_first_process  # takes seconds: not for --help

    teacher, step = first_step(recipe, resolved)
    if not is_first_process() or step.lagrangian is None:
        return
    _, found = prune(step.student)
    budget = step.lagrangian.budget
    expected = budget.cost(step.student).item()
    print(format_architecture(teacher.config, found))
    print(
        f"expected: {budget.cost.text(expected)}, sparsity {budget.sparsity_of(expected):.4f}; "
        f"target {budget.cost.text(budget.target)}, {budget.sparsity:.4g}"
    )


if __name__ == "__main__":
    main()
