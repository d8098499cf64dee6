"""Make the dense model that step 1 found.

    python prune.py --distilled_ckpt E/ckpts/last.ckpt [--out E/pruned.pth]

By default the highest-ranked units are kept that meet the recipe's budget exactly (to within one unit, never above);
--faithful keeps the rounding per layer of the released system.
"""

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from distillation.budget import BUDGET, Budget, Parameters, parse_target
from distillation.commandline import make_parser, parse_arguments
from distillation.distilled import pruning_setting, read_distilled
from distillation.errors import UserError, command
from distillation.identity import FAITHFUL, PRUNED
from distillation.training.standing import save_result
from wav2vec2 import prune
from wav2vec2.architecture import format_architecture
from wav2vec2.counting import count_params
from wav2vec2.pruning import is_grouped, survivors_for_cost

logger = logging.getLogger(__name__)
UNFINISHED = 0.02  # a distance to the target that the multipliers close in a run of full length


@dataclass(frozen=True)
class Wanted:
    """What the flags ask for; None where the recipe says it."""

    target: str | None
    target_sparsity: float | None
    multiple_of: int | None
    faithful: bool
    unfinished: bool

    def budget(self, trained: Budget) -> Budget:
        """The run's own, or that of the flags.

        Raises:
            UserError: a target that makes no sense.
        """
        cost, before = trained.cost, trained.before
        if self.target is not None and self.target_sparsity is not None:
            raise UserError("--target and --target_sparsity are two ways to say one thing: give one of them")
        if self.target is not None:
            target = parse_target(self.target, cost.name, "--target")
            if target >= before:
                raise UserError(
                    f"--target {self.target}: the teacher has {cost.text(before)}, there is nothing to prune"
                )
            return Budget.of_target(cost, before, target)
        if self.target_sparsity is None:
            return trained
        if not 0 <= self.target_sparsity < 1:
            raise UserError(f"--target_sparsity {self.target_sparsity}: it must lie in [0, 1)")
        return Budget.of_share(cost, before, self.target_sparsity)

    def told(self) -> dict[str, Any]:
        """What is asked for instead of what the recipe says, by the names of its settings."""
        asked = {"pruning.target": self.target, "pruning.target_sparsity": self.target_sparsity}
        told: dict[str, Any] = asked if any(value is not None for value in asked.values()) else {}
        return told if self.multiple_of is None else {**told, "pruning.multiple_of": self.multiple_of}


def run(distilled_ckpt: Path, out: Path | None, wanted: Wanted) -> None:
    """Prune the student of a checkpoint."""
    out = out if out is not None else distilled_ckpt.parent.parent / "pruned.pth"
    if not distilled_ckpt.exists():
        raise UserError(f"{distilled_ckpt}: no such file; run distill.py first, which makes it")
    distilled = read_distilled(distilled_ckpt, pruned=True)
    length = distilled.step if distilled.run is None else distilled.run.get("length", distilled.step)
    if distilled.step != length and not wanted.unfinished:
        raise UserError(
            f"{distilled_ckpt} stands at update {distilled.step} of {length}: run distill.py to its end first, or give "
            "--unfinished to prune it as it is"
        )
    student, trained = distilled.model, distilled.budget
    assert trained is not None
    budget, multiple_of = wanted.budget(trained), wanted.multiple_of
    if multiple_of is None:
        multiple_of = 1 if wanted.faithful else pruning_setting(distilled.recipe, "multiple_of", 1)
    if multiple_of < 1:
        raise UserError(f"--multiple_of {multiple_of}: it must be at least 1")
    if wanted.faithful and multiple_of != 1:
        raise UserError("--faithful keeps the rule per layer: leave --multiple_of out")
    if wanted.faithful and budget is not trained:
        raise UserError("--faithful keeps the rule per layer: leave --target and --target_sparsity out")
    cost = budget.cost

    model, config = prune(student)
    expected, by_rule = cost(student).item(), cost(model).item()
    logger.info(
        "expected %s (sparsity %.4f), the eval rule gives %s (%.4f), target %s (%.4f)",
        cost.text(expected), budget.sparsity_of(expected), cost.text(by_rule), budget.sparsity_of(by_rule),
        cost.text(budget.target), budget.sparsity,
    )  # fmt: skip
    if budget is trained and abs(budget.sparsity_of(expected) - budget.sparsity) > UNFINISHED:
        logger.warning(
            "step 1 ended at sparsity %.4f, the target is %.4f: the ranking decides about what it never gave up; "
            "train longer, or raise --pruning.lr_lagrangian", budget.sparsity_of(expected), budget.sparsity,
        )  # fmt: skip
    if not wanted.faithful:
        small = [name for name, mask in student.masks().items() if is_grouped(name) and len(mask) < multiple_of]
        if small:
            logger.warning(
                "%d layers have fewer than %d units: each keeps all of them or none", len(small), multiple_of
            )
        try:
            survivors = survivors_for_cost(student, partial(cost, student), budget.target, multiple_of, cost.text)
        except ValueError as error:
            raise UserError(f"{distilled_ckpt}: {error}; set another --target, or --faithful") from None
        model, config = prune(student, survivors)
        logger.info("kept the highest-ranked units that give the target; --faithful keeps the rule's")
    told = {**wanted.told(), FAITHFUL: wanted.faithful}
    entry = None if distilled.run is None else {**distilled.run, PRUNED: told, BUDGET: budget.state()}
    save_result(out, model, distilled.heads, entry)
    print(format_architecture(distilled.config, config))
    found = cost(model).item()
    size = "" if isinstance(cost, Parameters) else f"; {count_params(model):,} parameters"
    print(f"{cost.text(found)}, sparsity {budget.sparsity_of(found):.4f}{size} -> {out}")


@command
def main() -> None:
    """Run the stage."""
    parser = make_parser(__doc__)
    parser.add_argument("--distilled_ckpt", type=Path, required=True, help="Checkpoint of step 1, E/ckpts/last.ckpt.")
    parser.add_argument("--out", type=Path | None, help="Model to write. (default: E/pruned.pth)")
    parser.add_argument("--faithful", action="store_true", help="Keep the released system's rounding per layer.")
    parser.add_argument("--target_sparsity", type=float | None, help="Share of the teacher's cost to remove.")
    parser.add_argument(
        "--target", type=str | None, help="What is to stay instead, in the run's measure: 23.6M, 9GMACs, 35ms."
    )
    parser.add_argument("--multiple_of", type=int | None, help="Keep multiples of the FFN units and conv channels: 8.")
    parser.add_argument("--unfinished", action="store_true", help="Prune a run of step 1 before its end.")
    flags = parse_arguments(parser)
    wanted = Wanted(flags.target, flags.target_sparsity, flags.multiple_of, flags.faithful, flags.unfinished)
    run(flags.distilled_ckpt, flags.out, wanted)


if __name__ == "__main__":
    main()
