"""From a recipe to the objects of a run. Nothing below this level sees a recipe."""

import logging

from distillation.config import Recipe
from distillation.objectives import Objectives, Teacher
from distillation.optimisation import OptimConfig
from distillation.recognition.labels import make_vocabulary
from distillation.sparsity import Lagrangian, PruningConfig, make_budget, whole_cost
from distillation.students import backbone_params, build_student, check_frame_rate, with_dropout
from distillation.training.step import TrainingStep
from wav2vec2 import Wav2Vec2Model, load_model
from wav2vec2.checkpoint import with_output_layer

logger = logging.getLogger(__name__)
STAND_IN = make_vocabulary("ABCDEFGHIJKLMNOPQRSTUVWXYZ'")


def starting_student(recipe: Recipe, teacher: Wav2Vec2Model) -> Wav2Vec2Model:
    """The dense student before training: a file, or what the recipe's ``student`` describes.

    Raises:
        UserError: the teacher does not allow it, or its frames are not the teacher's.
    """
    if recipe.student_ckpt is None:
        student = build_student(recipe.student, teacher)
    else:
        student = load_model(recipe.student_ckpt)
        if recipe.student.dropout is not None:
            student = with_dropout(student, recipe.student.dropout)
    check_frame_rate(student, teacher, recipe.student_ckpt or "student")
    return student


def planned_student(recipe: Recipe, teacher: Wav2Vec2Model) -> Wav2Vec2Model:
    """The same before anything is read: an output layer whose symbols are yet to be found out has a stand-in's."""
    return with_stand_in(recipe, starting_student(recipe, teacher))


def with_stand_in(recipe: Recipe, student: Wav2Vec2Model) -> Wav2Vec2Model:
    """A student with some output layer where the recipe's objective wants one."""
    if recipe.objective.ctc is None or student.aux is not None:
        return student
    return with_output_layer(student, STAND_IN)


def build_step(
    recipe: Recipe, optim: OptimConfig, student: Wav2Vec2Model, teacher: Wav2Vec2Model, pruning: PruningConfig | None
) -> TrainingStep:
    """What one step of a recipe trains.

    Args:
        recipe: what to run.
        optim: of this step, its length in updates.
        student: masked (step 1) or dense.
        teacher: dense.
        pruning: None for a step without a sparsity term.
    """
    lagrangian = None
    if pruning is not None and pruning.units:
        budget = make_budget(pruning, teacher)
        start = round(budget.sparsity_of(whole_cost(student, budget.cost)), 6)  # 0 for a copy of the teacher
        lagrangian = Lagrangian(budget, pruning, start)
        logger.info("budget: %s of the teacher's %s, a sparsity of %.4f",
                    budget.cost.text(budget.target), budget.cost.text(budget.before), budget.sparsity)  # fmt: skip
        if pruning.warmup_steps >= optim.max_steps:
            logger.warning("pruning.warmup_steps is %d of %d updates: the target sparsity is never asked for",
                           pruning.warmup_steps, optim.max_steps)  # fmt: skip
    if optim.freeze_steps + optim.warmup_steps >= optim.max_steps:
        rises = f"{optim.freeze_steps} frozen and {optim.warmup_steps}" if optim.freeze_steps else optim.warmup_steps
        logger.warning("the learning rate warms up over %s of %d updates", rises, optim.max_steps)
    objectives = Objectives(recipe.objective, student, teacher, recipe.trainer.recompute)
    logger.info(
        "student: %s parameters, and %s in heads that only training uses",
        f"{backbone_params(student) - sum(map(len, student.masks().values())):,}", f"{objectives.num_params():,}",
    )  # fmt: skip
    frozen = Teacher(teacher, recipe.trainer.teacher_dtype)
    return TrainingStep(student, frozen, objectives, lagrangian, optim)
