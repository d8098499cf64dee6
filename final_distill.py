"""Step 2: distil the pruned student again, without a sparsity term.

    python final_distill.py --config conf/dphubert_base.yaml --student_ckpt E/pruned.pth --exp_dir E/final

Leaves final.pth in exp_dir, beside what step 1 leaves in its own. Run again to resume.
"""

import logging

from distillation.build import build_step
from distillation.config import parse_recipe
from distillation.errors import UserError, command
from distillation.identity import check_student, content_of, step_1_identity, step_2_identity
from distillation.lists import read_lists
from distillation.teacher import load_teacher
from distillation.training.lock import run_lock
from distillation.training.record import RUN
from distillation.training.standing import LAST, open_run, save_result
from wav2vec2.checkpoint import load_checkpoint

logger = logging.getLogger(__name__)


@command
def main() -> None:
    """Run the stage."""
    recipe, resolved = parse_recipe(description=__doc__ or "")
    from lightning import AudioDataModule, DistillModule, is_first_process, train  # takes seconds: not for --help

    path = recipe.student_ckpt
    if path is None:
        raise UserError("name the pruned model with --student_ckpt, e.g. E/pruned.pth from prune.py")
    if not path.exists():
        last = path.parent / LAST
        first = f"prune.py --distilled_ckpt {last}" if last.is_file() else "distill.py, then prune.py"
        raise UserError(f"{path}: no such file; run {first} first")
    teacher = load_teacher(recipe)
    student = load_checkpoint(path)
    if student.model.masks():
        raise UserError(f"{path}: still has masks; make a dense model of it with prune.py")
    lists = read_lists(recipe, student.model, student.model.vocabulary)
    data = AudioDataModule(recipe, lists)
    content = content_of(recipe, teacher, lists)
    check_student(student, path, step_1_identity(recipe, content), recipe.continue_with_changes)
    out = recipe.exp_dir / "final.pth"
    if recipe.final is None:
        if (recipe.exp_dir / LAST).exists():
            raise UserError(f"{recipe.exp_dir}: holds a run, and this recipe has no step 2: use another --exp_dir")
        save_result(out, student.model, student.heads, student.extra.get(RUN))
        logger.info("no step 2 in this recipe: %s is the pruned model", out)
        return
    identity = step_2_identity(recipe, content, student.model, student.heads)
    with run_lock(recipe.exp_dir, owner=is_first_process()):
        run = open_run(recipe.exp_dir, identity, recipe.continue_with_changes)
        optim = run.resolve(recipe.final, data.updates_of)
        module = DistillModule(build_step(recipe, optim, student.model, teacher, None), recipe.seed, resolved, run)
        if not module.objectives.load_head_state(student.heads, path):
            logger.warning("%s holds no distillation heads: they start afresh", path)
        train(module, data, recipe)
        if is_first_process():
            entry = run.entry(optim.max_steps, student=student.extra.get(RUN))
            save_result(out, student.model, module.objectives.head_state(), entry)


if __name__ == "__main__":
    main()
