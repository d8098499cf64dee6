"""What a checkpoint of distill.py holds for those who come after it: the student as it is, and where it comes from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from distillation.budget import BUDGET, Budget, Parameters
from distillation.errors import UserError
from distillation.training.record import RUN, Record
from wav2vec2 import Wav2Vec2Model
from wav2vec2.checkpoint import model_from_state, read_torch_file
from wav2vec2.vocabulary import VOCABULARY

STUDENT = "student."
ENTRIES: dict[str, type] = {"student_config": dict, "state_dict": dict, "heads": dict}
PRUNED_ENTRIES: dict[str, type] = {"recipe": str}


@dataclass
class Distilled:
    """A student in the middle of its run or at its end."""

    model: Wav2Vec2Model  # eval mode; with masks where it is pruned
    heads: dict[str, torch.Tensor]  # state of the distillation heads
    config: dict[str, Any]  # flat, of ``model``
    recipe: str | None  # resolved YAML
    budget: Budget | None  # None where nothing is pruned
    step: int  # updates that it has learnt in
    run: dict[str, Any] | None  # entry of the run's record; None where an older version wrote it


def read_distilled(path: Path, pruned: bool) -> Distilled:
    """Read the student of ``ckpts/last.ckpt``.

    Args:
        path: the checkpoint.
        pruned: refuse one of a run without pruning.

    Raises:
        UserError: another kind of file.
        CheckpointError: a damaged one.
    """
    content = read_torch_file(path)
    entries = ENTRIES | (PRUNED_ENTRIES if pruned else {})
    if not all(isinstance(content.get(name), kind) for name, kind in entries.items()):
        what = "step 1 with pruning (made by distill.py)" if pruned else "this toolkit"
        raise UserError(f"{path}: not a checkpoint of {what}")
    state = {k: v for k, v in content["state_dict"].items() if isinstance(k, str) and k.startswith(STUDENT)}
    state = {k.removeprefix(STUDENT): v for k, v in state.items()}
    model = model_from_state(content["student_config"], state, source=path)
    model.vocabulary = content.get(VOCABULARY)
    heads, budget = content["heads"], _budget(content, path)
    if not all(isinstance(tensor, torch.Tensor) for tensor in heads.values()):
        raise UserError(f"{path}: damaged: heads without tensors")
    if pruned and budget is None:
        raise UserError(f"{path}: not a checkpoint of step 1 with pruning (made by distill.py)")
    step, run = content.get("global_step"), content.get(RUN)
    Record.read(content, path)
    if not isinstance(step, int):
        raise UserError(f"{path}: damaged: does not say how many updates were made")
    return Distilled(model, heads, content["student_config"], content.get("recipe"), budget, step, run)


def _budget(content: dict[str, Any], path: Path) -> Budget | None:
    """What the student is held to; in files of older versions a share of the parameters."""
    before = content.get("num_params_before")
    if isinstance(before, int) and before > 0:
        sparsity = pruning_setting(content.get("recipe"), "target_sparsity", None)
        return Budget.of_share(Parameters(), before, float(sparsity)) if isinstance(sparsity, int | float) else None
    return Budget.read(content[BUDGET], path) if BUDGET in content else None


def pruning_setting(recipe: str | None, name: str, default: Any) -> Any:
    """A setting of the pruning in a resolved recipe; ``default`` where that has none."""
    try:
        return yaml.safe_load(recipe or "")["pruning"].get(name, default)
    except (yaml.YAMLError, RecursionError, LookupError, TypeError, AttributeError):
        return default
