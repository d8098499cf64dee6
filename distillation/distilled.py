"""What a checkpoint of distill.py holds for those who come after it: the student as it is, and where it comes from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from distillation.errors import UserError
from distillation.training.record import RUN, Record
from wav2vec2 import Wav2Vec2Model
from wav2vec2.checkpoint import model_from_state, read_torch_file

STUDENT = "student."
ENTRIES: dict[str, type] = {"student_config": dict, "state_dict": dict, "heads": dict}
PRUNED_ENTRIES: dict[str, type] = {"recipe": str, "num_params_before": int}


@dataclass
class Distilled:
    """A student in the middle of its run or at its end."""

    model: Wav2Vec2Model  # eval mode; with masks where it is pruned
    heads: dict[str, torch.Tensor]  # state of the distillation heads
    config: dict[str, Any]  # flat, of ``model``
    recipe: str | None  # resolved YAML
    num_params_before: int | None  # parameters of the teacher; None where nothing is pruned
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
    before, heads = content.get("num_params_before"), content["heads"]
    if (before is not None and before < 1) or not all(isinstance(tensor, torch.Tensor) for tensor in heads.values()):
        raise UserError(f"{path}: damaged: {before} parameters before pruning, or heads without tensors")
    step, run = content.get("global_step"), content.get(RUN)
    Record.read(content, path)
    if not isinstance(step, int):
        raise UserError(f"{path}: damaged: does not say how many updates were made")
    return Distilled(model, heads, content["student_config"], content.get("recipe"), before, step, run)


def target_sparsity(distilled: Distilled, source: Path) -> float:
    """The target in the recipe of a checkpoint.

    Raises:
        UserError: there is none.
    """
    try:
        return float(yaml.safe_load(distilled.recipe or "")["pruning"]["target_sparsity"])
    except (yaml.YAMLError, RecursionError, LookupError, TypeError, ValueError):
        raise UserError(f"{source}: no target sparsity in its recipe; name it with --target_sparsity") from None
