"""What the students of all recipes cost at their published size, beside the published figures.

    python -m docs.recipe_costs

Fixed students are built at random from a HuBERT Base. What pruning leaves is known only after training: for those the
size that is asked for and the teacher's cost are given. MACs are sums over the 32 utterances of the SUPERB protocol.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from distillation.build import starting_student
from distillation.config import RECIPES, Recipe, parse_recipe
from distillation.objectives import Objectives
from distillation.students import backbone_params
from evaluation.cost import SUPERB_SAMPLES
from wav2vec2 import Wav2Vec2Model, wav2vec2_model
from wav2vec2.architecture import HUBERT_BASE

# GMACs: the papers' own tables (DPHuBERT; ARMHuBERT-S as STaR's paper lists it)
PUBLISHED_MACS = {
    "dphubert_base": 654.1, "dpwavlm_base_plus": 589.2, "armhubert_s_960h": 449.4, "starhubert": 463.5,
    "starhubert_l": 511.9,
}  # fmt: skip


@dataclass
class RecipeCost:
    """One line of the table."""

    recipe: str
    backbone: int | None  # parameters without heads; None where pruning decides
    heads: int
    gmacs: float | None
    gmacs_heads: float = 0.0  # what the heads add, for students whose published features they are
    note: str = ""


def cost_of(name: str, recipe: Recipe, teacher: Wav2Vec2Model) -> RecipeCost:
    """Cost of the model that a recipe starts with, or what is known of the one it ends with."""
    if recipe.pruning.units:
        return RecipeCost(name, None, 0, None, note=f"{recipe.pruning.target_sparsity:.0%} pruned")
    student = starting_student(recipe, teacher)
    objectives = Objectives(recipe.objective, student, teacher)
    linear = sum(p.numel() for p in objectives.parameters() if p.dim() == 2)
    frames = int(teacher.output_length(torch.tensor(SUPERB_SAMPLES)).sum())
    heads_are_features = recipe.objective.masking is not None
    return RecipeCost(
        name,
        backbone_params(student),
        objectives.num_params(),
        student.get_num_macs(SUPERB_SAMPLES).item() / 1e9,
        linear * frames / 1e9 if heads_are_features else 0.0,
    )


def recipe_costs() -> list[RecipeCost]:
    """All recipes for speech, and their teacher."""
    with torch.random.fork_rng(devices=[]):
        teacher = wav2vec2_model(**HUBERT_BASE)
        teacher.mask_embedding = torch.zeros(HUBERT_BASE["encoder_embed_dim"])
        macs = teacher.get_num_macs(SUPERB_SAMPLES).item() / 1e9
        rows = [RecipeCost("teacher: HuBERT Base", backbone_params(teacher), 0, macs)]
        for path in sorted(RECIPES.glob("*.yaml")):
            recipe, _ = parse_recipe(["--config", str(path)])
            if path.stem != "demo":
                rows.append(cost_of(path.stem, recipe, teacher))
    return rows


def table() -> str:
    """Markdown; recipes that cost the same share a line."""
    head = ["recipe", "parameters M", "heads M", "GMACs", "GMACs with heads", "published GMACs"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    groups: dict[tuple[str, ...], list[str]] = {}
    for row in recipe_costs():
        published = 1669.0 if row.recipe.startswith("teacher") else PUBLISHED_MACS.get(row.recipe)
        cells = (
            row.note if row.backbone is None else f"{row.backbone / 1e6:.2f}",
            f"{row.heads / 1e6:.2f}" if row.heads else "",
            "as found" if row.gmacs is None else f"{row.gmacs:.1f}",
            f"{row.gmacs + row.gmacs_heads:.1f}" if row.gmacs is not None and row.gmacs_heads else "",
            f"{published:g}" if published else "",
        )
        groups.setdefault(cells, []).append(f"`{row.recipe}`" if ":" not in row.recipe else row.recipe)
    lines += [f"| {', '.join(names)} | {' | '.join(cells)} |" for cells, names in groups.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
