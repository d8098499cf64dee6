"""Step 2: distil the pruned student again, without a sparsity term.

    python final_distill.py --config conf/dphubert_base.yaml --student_ckpt E/pruned.pth --exp_dir E/final

Leaves final.pth in exp_dir, beside what step 1 leaves in its own. Run again to resume.
"""

import logging

from distillation.build import build_step, load_teacher
from distillation.config import parse_recipe
from distillation.errors import UserError, command
from distillation.training.lock import run_lock
from wav2vec2 import save_model
from wav2vec2.checkpoint import load_checkpoint

logger = logging.getLogger(__name__)


@command
def main() -> None:
    """Run the stage."""
    recipe, resolved = parse_recipe(description=__doc__ or "")
    from lightning import AudioDataModule, DistillModule, build_trainer, train  # takes seconds: not for --help

    if recipe.student_ckpt is None:
        raise UserError("name the pruned model with --student_ckpt, e.g. E/pruned.pth from prune.py")
    teacher = load_teacher(recipe)
    student = load_checkpoint(recipe.student_ckpt)
    if student.model.masks():
        raise UserError(f"{recipe.student_ckpt}: still has masks; make a dense model of it with prune.py")
    if recipe.final is None:
        save_model(recipe.exp_dir / "final.pth", student.model, student.heads)
        logger.info("no step 2 in this recipe: %s is the pruned model", recipe.exp_dir / "final.pth")
        return
    data = AudioDataModule(recipe)
    optim = recipe.final.resolved(data.updates_of)
    trainer = build_trainer(recipe, optim)
    module = DistillModule(build_step(recipe, optim, student.model, teacher, None), recipe.seed, resolved)
    if not module.objectives.load_head_state(student.heads, recipe.student_ckpt):
        logger.warning("%s holds no distillation heads: they start afresh", recipe.student_ckpt)
    with run_lock(recipe.exp_dir, owner=trainer.is_global_zero):
        train(module, data, trainer, recipe)
        if trainer.is_global_zero:
            save_model(recipe.exp_dir / "final.pth", student.model, module.objectives.head_state())
            logger.info("wrote %s", recipe.exp_dir / "final.pth")


if __name__ == "__main__":
    main()
