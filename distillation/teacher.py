"""The teacher of a recipe: found, looked at before anything is made, and loaded."""

import logging
from pathlib import Path
from typing import Any

import torch

from distillation.config import Recipe
from distillation.errors import UserError
from distillation.originals import describe_original
from wav2vec2 import Wav2Vec2Model, prune
from wav2vec2.checkpoint import Checkpoint, load_checkpoint
from wav2vec2.importers import Source
from wav2vec2.importers.folder import model_files

logger = logging.getLogger(__name__)


def load_teacher(recipe: Recipe) -> Wav2Vec2Model:
    """The dense teacher, checked against what the recipe is written for. Seeds what is drawn at random after it.

    Raises:
        UserError: no such file, another source, depth or width.
    """
    path, wanted_id = recipe.teacher_ckpt, recipe.teacher_id
    if wanted_id is not None and not path.exists():
        head = " --ctc" if wants_head(recipe) else ""
        raise UserError(
            f"{path}: no such file; convert_hubert_from_hf.py --model {wanted_id} --out {path}{head} makes it"
        )
    checkpoint = load_checkpoint(path)
    _check_head(recipe, checkpoint.config)
    source = check_source(recipe, checkpoint)
    if source is None:
        logger.info("teacher: %s, which does not say what it was converted from", path)
    else:
        logger.info("teacher: %s, converted from %s", path, source)
    model = prune(checkpoint.model)[0] if checkpoint.model.masks() else checkpoint.model
    check_size(recipe, path, model.num_layers, model.embed_dim)
    torch.manual_seed(recipe.seed)
    return model


def check_source(recipe: Recipe, checkpoint: Checkpoint) -> Source | None:
    """What a converted teacher was made from; None where it does not say.

    Raises:
        UserError: the recipe names another.
    """
    path, wanted_id = recipe.teacher_ckpt, recipe.teacher_id
    source = Source.read(checkpoint.extra)
    if source is None or wanted_id is None:
        return source
    if difference := source.difference(wanted_id, model_files(Path(wanted_id))):
        raise UserError(
            f"{path} {difference}: remove it to convert {wanted_id}, or give another --teacher_ckpt; "
            f"--teacher_ckpt {path} without --teacher_id trains with {source}"
        )
    return source


def check_size(recipe: Recipe, source: object, num_layers: int, width: int) -> None:
    """Look whether a teacher has the depth and width that the recipe is written for.

    Raises:
        UserError: naming ``source``.
    """
    for name, wanted, found in (
        ("layers", recipe.teacher_layers, num_layers), ("width", recipe.teacher_width, width),
    ):  # fmt: skip
        if wanted is not None and wanted != found:
            raise UserError(
                f"{source}: {name} {found}, but the recipe is for a teacher of {name} {wanted}: choose the recipe "
                f"for this model or, to have them derived, the shell recipe without one; or set --teacher_{name} and "
                "--objective to match"
            )


def wants_head(recipe: Recipe) -> bool:
    """Whether the teacher must bring an output layer: it is converted with it."""
    ctc = recipe.objective.ctc
    return ctc is not None and (ctc.vocabulary == "model" or ctc.distill > 0)


def _check_head(recipe: Recipe, config: dict[str, Any]) -> None:
    """Look whether a teacher has the output layer that the recipe wants.

    Raises:
        UserError: it has not.
    """
    if wants_head(recipe) and config.get("aux_num_out") is None:
        path, model = recipe.teacher_ckpt, recipe.teacher_id or "MODEL"
        raise UserError(
            f"{path}: has no output layer, which objective.ctc takes over: remove it and convert a fine-tuned model "
            f"again, convert_hubert_from_hf.py --model {model} --ctc --out {path}; or set objective.ctc.vocabulary "
            "transcripts and objective.ctc.distill 0"
        )


def teacher_config(recipe: Recipe) -> dict[str, Any]:
    """Flat config of the teacher: of its file where that is there, else of what it would be converted from.

    Raises:
        UserError: neither is there, or the file is of another source than the recipe names.
        CheckpointError: a damaged file, or a model that a conversion would refuse.
    """
    if recipe.teacher_ckpt.exists():
        checkpoint = load_checkpoint(recipe.teacher_ckpt)
        check_source(recipe, checkpoint)
        _check_head(recipe, checkpoint.config)
        return checkpoint.config
    if recipe.teacher_id is None:
        raise UserError(f"{recipe.teacher_ckpt}: no such file, and no --teacher_id to make it from")
    return describe_original(recipe.teacher_id, wants_head(recipe))
