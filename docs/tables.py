"""Write the generated tables of the pages beside this file.

    python -m docs.tables [--check]

recipes.md: the headers of the recipes, and what the students cost. Fixed students are built at random from a HuBERT
Base; what pruning leaves is known only after training. MACs are sums over the 32 utterances of the SUPERB protocol.
published.md: the published SUPERB results.
"""

import csv
import re
import sys
from pathlib import Path

import torch

from distillation.budget import SUPERB_SAMPLES
from distillation.build import starting_student
from distillation.commandline import make_parser, parse_arguments
from distillation.config import RECIPES, Recipe, parse_recipe
from distillation.errors import command
from distillation.objectives import Objectives
from distillation.students import backbone_params
from evaluation.superb_score import PUBLISHED
from evaluation.tables import markdown_table
from wav2vec2 import Wav2Vec2Model, wav2vec2_model
from wav2vec2.architecture import HUBERT_BASE
from wav2vec2.checkpoint import write_text

DOCS = Path(__file__).parent
# GMACs: the papers' own tables (DPHuBERT; ARMHuBERT-S as STaR's paper lists it)
PUBLISHED_MACS = {
    "dphubert_base": 654.1, "dpwavlm_base_plus": 589.2, "armhubert_s_960h": 449.4, "starhubert": 463.5,
    "starhubert_100h": 463.5, "starhubert_l": 511.9,
}  # fmt: skip


def recipes() -> str:
    """One row per recipe: its header comment, line by line."""
    rows = []
    for path in sorted(RECIPES.glob("*.yaml")):
        lines = []
        for line in path.read_text().splitlines():
            if not line.startswith("#"):
                break
            lines.append(line.lstrip("# ").strip())
        expected = [line.removeprefix("Expected: ") for line in lines if line.startswith("Expected: ")]
        typed = next((line for line in lines[1:] if line.startswith(("scripts/", "python "))), "")
        typed = re.split(r" {2,}\(", typed)[0]
        rows.append((f"`{path.stem}`", lines[0], f"`{typed}`", expected[0].rstrip(".") if expected else ""))
    return markdown_table(("recipe", "what", "command", "expected"), rows)


def cost(recipe: Recipe, teacher: Wav2Vec2Model) -> tuple[str, ...]:
    """Parameters, heads, GMACs, and GMACs with heads of what a recipe starts with, or what is known of its end.

    MACs of heads are given for students whose published features they are.
    """
    if recipe.pruning.units:
        return f"{recipe.pruning.target_sparsity:.0%} pruned", "", "as found", ""
    student = starting_student(recipe, teacher)
    objectives = Objectives(recipe.objective, student, teacher)
    macs = student.get_num_macs(SUPERB_SAMPLES).item()
    linear = sum(p.numel() for p in objectives.parameters() if p.dim() == 2)
    macs_heads = linear * int(teacher.output_length(torch.tensor(SUPERB_SAMPLES)).sum())
    return (
        f"{backbone_params(student) / 1e6:.2f}",
        f"{objectives.num_params() / 1e6:.2f}" if objectives.num_params() else "",
        f"{macs / 1e9:.1f}",
        f"{(macs + macs_heads) / 1e9:.1f}" if recipe.objective.masking is not None and macs_heads else "",
    )


def costs() -> str:
    """All recipes for speech, beside the published figures; those that cost the same share a row."""
    with torch.random.fork_rng(devices=[]):
        teacher = wav2vec2_model(**HUBERT_BASE)
        teacher.mask_embedding = torch.zeros(HUBERT_BASE["encoder_embed_dim"])
        macs = teacher.get_num_macs(SUPERB_SAMPLES).item() / 1e9
        groups: dict[tuple[str, ...], list[str]] = {
            (f"{backbone_params(teacher) / 1e6:.2f}", "", f"{macs:.1f}", "", "1669"): ["teacher: HuBERT Base"]
        }
        for path in sorted(RECIPES.glob("*.yaml")):
            if path.stem != "demo":
                recipe, _ = parse_recipe(["--config", str(path)])
                published = f"{PUBLISHED_MACS.get(path.stem, '')}"
                groups.setdefault((*cost(recipe, teacher), published), []).append(f"`{path.stem}`")
    header = ("recipe", "parameters M", "heads M", "GMACs", "GMACs with heads", "published GMACs")
    return markdown_table(header, ((", ".join(names), *cells) for cells, names in groups.items()))


def published() -> str:
    """The published SUPERB results."""
    titles = {
        "model": "model", "params_m": "params M", "macs_g": "MACs G", "KS": "KS acc", "IC": "IC acc", "PR": "PR PER",
        "ASR": "ASR WER", "ER": "ER acc", "QbE": "QbE MTWV", "SF_F1": "SF F1", "SF_CER": "SF CER", "SID": "SID acc",
        "ASV": "ASV EER", "SD": "SD DER",
    }  # fmt: skip
    with PUBLISHED.open(newline="") as file:
        return markdown_table([*titles.values()], ([row[name] for name in titles] for row in csv.DictReader(file)))


PAGES = {"recipes.md": (recipes, costs), "published.md": (published,)}


def renewed(page: str) -> str:
    """The text of a page with its generated sections renewed; each stands between comments with its function's name."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for render in PAGES[page]:
        begin, end = f"<!-- {render.__name__} -->", f"<!-- /{render.__name__} -->"
        head, rest = text.split(begin, 1)
        text = f"{head}{begin}\n\n{render()}\n\n{end}{rest.split(end, 1)[1]}"
    return text


@command
def main() -> None:
    """Renew the tables, or with --check say whether they are up to date."""
    parser = make_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="Write nothing; exit with 1 when a page is stale.")
    check = parse_arguments(parser).check
    for page in PAGES:
        text = renewed(page)
        if not check:
            write_text(DOCS / page, text)
        elif text != (DOCS / page).read_text(encoding="utf-8"):
            sys.exit(f"docs/{page} is stale: run python -m docs.tables")


if __name__ == "__main__":
    main()
