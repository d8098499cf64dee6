"""Write the tables of the README from their sources: the recipes' headers and the published results.

python -m docs.tables [--check]
"""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

from docs.recipe_costs import table as costs
from wav2vec2.checkpoint import replacing

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def recipes() -> str:
    """One row per recipe: its header comment, line by line."""
    rows = ["| recipe | what | command | expected |", "|---|---|---|---|"]
    for path in sorted((ROOT / "conf").glob("*.yaml")):
        lines = []
        for line in path.read_text().splitlines():
            if not line.startswith("#"):
                break
            lines.append(line.lstrip("# ").strip())
        expected = [line.removeprefix("Expected: ") for line in lines if line.startswith("Expected: ")]
        command = next((line for line in lines[1:] if line.startswith(("scripts/", "python "))), "")
        command = re.split(r" {2,}\(", command)[0]
        rows.append(f"| `{path.stem}` | {lines[0]} | `{command}` | {expected[0].rstrip('.') if expected else ''} |")
    return "\n".join(rows)


def published() -> str:
    """The published SUPERB results."""
    with (ROOT / "evaluation" / "published_superb.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    titles = {
        "model": "model", "params_m": "params M", "macs_g": "MACs G", "KS": "KS acc", "IC": "IC acc", "PR": "PR PER",
        "ASR": "ASR WER", "ER": "ER acc", "QbE": "QbE MTWV", "SF_F1": "SF F1", "SF_CER": "SF CER", "SID": "SID acc",
        "ASV": "ASV EER", "SD": "SD DER",
    }  # fmt: skip
    rows = ["| " + " | ".join(titles.values()) + " |", "|---" * len(titles) + "|"]
    rows += ["| " + " | ".join(row[name] for name in titles) + " |" for row in table]
    return "\n".join(rows)


SECTIONS = {"recipes": recipes, "costs": costs, "published": published}


def fill(text: str) -> str:
    """The README with its generated sections renewed."""
    for name, render in SECTIONS.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        head, rest = text.split(begin, 1)
        text = f"{head}{begin}\n\n{render()}\n\n{end}{rest.split(end, 1)[1]}"
    return text


def main() -> None:
    """Renew the tables, or with --check say whether they are up to date."""
    text = README.read_text(encoding="utf-8")
    renewed = fill(text)
    if "--check" in sys.argv[1:]:
        sys.exit("README.md is stale: run python -m docs.tables" if renewed != text else 0)
    with replacing(README) as temporary:
        temporary.write_text(renewed, encoding="utf-8")


if __name__ == "__main__":
    main()
