"""Make the dense model that step 1 found.

    python prune.py --distilled_ckpt E/ckpts/last.ckpt [--out E/pruned.pth]

By default the highest-ranked units are kept that give exactly the target size (to within one unit); --faithful keeps
the rounding per layer of the released system.
"""

import logging
from pathlib import Path

from distillation.commandline import make_parser, parse_arguments
from distillation.distilled import read_distilled, target_sparsity
from distillation.errors import UserError, command
from distillation.identity import FAITHFUL, PRUNED
from distillation.training.standing import save_result
from wav2vec2 import prune
from wav2vec2.architecture import format_architecture
from wav2vec2.counting import count_params
from wav2vec2.pruning import survivors_for_size

logger = logging.getLogger(__name__)
UNFINISHED = 0.02  # a distance to the target that the multipliers close in a run of full length


def run(distilled_ckpt: Path, out: Path | None, faithful: bool, target: float | None, unfinished: bool) -> None:
    """Prune the student of a checkpoint; the arguments are the flags."""
    out = out if out is not None else distilled_ckpt.parent.parent / "pruned.pth"
    if not distilled_ckpt.exists():
        raise UserError(f"{distilled_ckpt}: no such file; run distill.py first, which makes it")
    distilled = read_distilled(distilled_ckpt, pruned=True)
    length = distilled.step if distilled.run is None else distilled.run.get("length", distilled.step)
    if distilled.step != length and not unfinished:
        raise UserError(
            f"{distilled_ckpt} stands at update {distilled.step} of {length}: run distill.py to its end first, or give "
            "--unfinished to prune it as it is"
        )
    student, before = distilled.model, distilled.num_params_before
    assert before is not None
    target = target_sparsity(distilled, distilled_ckpt) if target is None else target
    if not 0 <= target < 1:
        raise UserError(f"--target_sparsity {target}: it must lie in [0, 1)")

    model, config = prune(student)
    num_expected, num_by_rule = student.get_num_params().item(), count_params(model)
    logger.info(
        "expected %s parameters (sparsity %.4f), the eval rule gives %s (%.4f), target %.4f",
        f"{num_expected:,.0f}", 1 - num_expected / before, f"{num_by_rule:,}", 1 - num_by_rule / before, target,
    )  # fmt: skip
    if abs(1 - num_expected / before - target) > UNFINISHED:
        logger.warning(
            "step 1 ended at sparsity %.4f, the target is %.4f: the ranking decides about what it never gave up; "
            "train longer, or raise --pruning.lr_lagrangian", 1 - num_expected / before, target,
        )  # fmt: skip
    if not faithful:
        try:
            model, config = prune(student, survivors_for_size(student, round((1 - target) * before)))
        except ValueError as error:
            raise UserError(f"{distilled_ckpt}: {error}; set another --target_sparsity, or --faithful") from None
        logger.info("kept the highest-ranked units that give the target size; --faithful keeps the rule's")
    num_params = count_params(model)
    told = {"pruning.target_sparsity": target, FAITHFUL: faithful}
    entry = None if distilled.run is None else {**distilled.run, PRUNED: told}
    save_result(out, model, distilled.heads, entry)
    print(format_architecture(distilled.config, config))
    print(f"{num_params:,} parameters, sparsity {1 - num_params / before:.4f} -> {out}")


@command
def main() -> None:
    """Run the stage."""
    parser = make_parser(__doc__)
    parser.add_argument("--distilled_ckpt", type=Path, required=True, help="Checkpoint of step 1, E/ckpts/last.ckpt.")
    parser.add_argument("--out", type=Path | None, help="Model to write. (default: E/pruned.pth)")
    parser.add_argument("--faithful", action="store_true", help="Keep the released system's rounding per layer.")
    parser.add_argument("--target_sparsity", type=float | None, help="Share of the teacher's parameters to remove.")
    parser.add_argument("--unfinished", action="store_true", help="Prune a run of step 1 before its end.")
    flags = parse_arguments(parser)
    run(flags.distilled_ckpt, flags.out, flags.faithful, flags.target_sparsity, flags.unfinished)


if __name__ == "__main__":
    main()
