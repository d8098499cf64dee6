"""Make the dense model that step 1 found.

    python prune.py --distilled_ckpt E/ckpts/last.ckpt [--out E/pruned.pth]

By default the highest-ranked units are kept that give exactly the target size (to within one unit); --faithful keeps
the rounding per layer of the released system.
"""

from __future__ import annotations

import logging
from pathlib import Path

import torch
import yaml

from distillation.commandline import make_parser, parse_arguments
from distillation.errors import UserError, command
from wav2vec2 import prune, save_model
from wav2vec2.architecture import format_architecture
from wav2vec2.checkpoint import model_from_state, read_torch_file
from wav2vec2.pruning import survivors_for_size

logger = logging.getLogger(__name__)
STUDENT = "student."
UNFINISHED = 0.02  # a distance to the target that the multipliers close in a run of full length
ENTRIES = {"student_config": dict, "state_dict": dict, "heads": dict, "recipe": str, "num_params_before": int}


def run(distilled_ckpt: Path, out: Path | None, faithful: bool, target_sparsity: float | None) -> None:
    """Prune the student of a checkpoint; the arguments are the flags."""
    out = out if out is not None else distilled_ckpt.parent.parent / "pruned.pth"
    checkpoint = read_torch_file(distilled_ckpt)
    if not all(isinstance(checkpoint.get(name), kind) for name, kind in ENTRIES.items()):
        raise UserError(f"{distilled_ckpt}: not a checkpoint of step 1 with pruning (made by distill.py)")
    state = {k: v for k, v in checkpoint["state_dict"].items() if isinstance(k, str) and k.startswith(STUDENT)}
    state = {k.removeprefix(STUDENT): v for k, v in state.items()}
    student = model_from_state(checkpoint["student_config"], state, source=distilled_ckpt)
    target = recipe_target(checkpoint["recipe"], distilled_ckpt) if target_sparsity is None else target_sparsity
    if not 0 <= target < 1:
        raise UserError(f"--target_sparsity {target}: it must lie in [0, 1)")
    before, heads = checkpoint["num_params_before"], checkpoint["heads"]
    if before < 1 or not all(isinstance(tensor, torch.Tensor) for tensor in heads.values()):
        raise UserError(f"{distilled_ckpt}: damaged: {before} parameters before pruning, or heads without tensors")

    by_rule, config = prune(student)
    num_expected, num_by_rule = student.get_num_params().item(), sum(p.numel() for p in by_rule.parameters())
    logger.info(
        "expected %s parameters (sparsity %.4f), the eval rule gives %s (%.4f), target %.4f",
        f"{num_expected:,.0f}", 1 - num_expected / before, f"{num_by_rule:,}", 1 - num_by_rule / before, target,
    )  # fmt: skip
    if abs(1 - num_expected / before - target) > UNFINISHED:
        logger.warning(
            "step 1 ended at sparsity %.4f, the target is %.4f: the ranking decides about what it never gave up; "
            "train longer, or raise --pruning.lr_lagrangian", 1 - num_expected / before, target,
        )  # fmt: skip
    model = by_rule
    if not faithful:
        try:
            model, config = prune(student, survivors_for_size(student, round((1 - target) * before)))
        except ValueError as error:
            raise UserError(f"{distilled_ckpt}: {error}; set another --target_sparsity, or --faithful") from None
        logger.info("kept the highest-ranked units that give the target size; --faithful keeps the rule's")
    num_params = sum(p.numel() for p in model.parameters())
    save_model(out, model, heads)
    print(format_architecture(checkpoint["student_config"], config))
    print(f"{num_params:,} parameters, sparsity {1 - num_params / before:.4f} -> {out}")


def recipe_target(resolved: str, source: Path) -> float:
    """The target sparsity in the recipe of a checkpoint."""
    try:
        return float(yaml.safe_load(resolved)["pruning"]["target_sparsity"])
    except (yaml.YAMLError, RecursionError, LookupError, TypeError, ValueError):
        raise UserError(f"{source}: no target sparsity in its recipe; name it with --target_sparsity") from None


@command
def main() -> None:
    """Run the stage."""
    parser = make_parser(__doc__)
    parser.add_argument("--distilled_ckpt", type=Path, required=True, help="Checkpoint of step 1, E/ckpts/last.ckpt.")
    parser.add_argument("--out", type=Path | None, help="Model to write. (default: E/pruned.pth)")
    parser.add_argument("--faithful", action="store_true", help="Keep the released system's rounding per layer.")
    parser.add_argument("--target_sparsity", type=float | None, help="Share of the teacher's parameters to remove.")
    run(**vars(parse_arguments(parser)))


if __name__ == "__main__":
    main()
