"""Overall and leaderboard scores of SUPERB, beside the published models.

    python -m evaluation.superb_score results.json

The file maps the columns KS, IC, PR, ASR, ER, QbE, SF_F1, SF_CER, SID, ASV and SD to values in per cent (QbE: MTWV from
0 to 1), as scripts/superb.sh collects them.
"""

import csv
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path

from distillation.errors import UserError, command
from evaluation.tables import markdown_table

PUBLISHED = Path(__file__).with_name("published_superb.csv")
COLUMNS = ("KS", "IC", "PR", "ASR", "ER", "QbE", "SF_F1", "SF_CER", "SID", "ASV", "SD")
ERRORS = {"PR", "ASR", "SF_CER", "ASV", "SD"}  # lower is better
# The two ends of the leaderboard's scale: filter banks, and the best model of each task when it was set.
FBANK = {"PR": 82.01, "ASR": 23.18, "KS": 41.38, "QbE": 0.0058, "SID": 20.06, "ASV": 9.56, "SD": 10.05, "IC": 9.65,
         "SF_F1": 69.64, "SF_CER": 52.94, "ER": 48.24}  # fmt: skip
BEST = {"PR": 3.53, "ASR": 3.62, "KS": 96.66, "QbE": 0.0736, "SID": 90.33, "ASV": 5.11, "SD": 5.62, "IC": 98.76,
        "SF_F1": 89.81, "SF_CER": 21.76, "ER": 67.62}  # fmt: skip


def overall_score(results: Mapping[str, float]) -> float:
    """Mean of eleven numbers, errors as 100 minus themselves (ARMHuBERT, arXiv 2305.11685; STaR, arXiv 2312.09040)."""
    values = [100 - results[c] if c in ERRORS else results[c] * (100 if c == "QbE" else 1) for c in COLUMNS]
    return sum(values) / len(values)


def leaderboard_score(results: Mapping[str, float]) -> float:
    """1000 times the mean over ten tasks of the way from filter banks to the best; slot filling is one task."""
    way = {c: (results[c] - FBANK[c]) / (BEST[c] - FBANK[c]) for c in COLUMNS}
    slots = (way.pop("SF_F1") + way.pop("SF_CER")) / 2
    return 1000 * (sum(way.values()) + slots) / (len(way) + 1)


def read_results(path: Path) -> dict[str, float]:
    """The columns of a results file.

    Raises:
        UserError: it cannot be read, or lacks columns.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no results file ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must map columns to values")
    if missing := [column for column in COLUMNS if column not in content]:
        raise UserError(f"{path}: without {', '.join(missing)} there is no score")
    for column in COLUMNS:
        value = content[column]
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise UserError(f"{path}: {column} is {value!r}, not a number")
    return {column: float(content[column]) for column in COLUMNS}


def published() -> dict[str, dict[str, float]]:
    """Published results by model."""
    with PUBLISHED.open(newline="", encoding="utf-8") as file:
        return {row["model"]: {c: float(row[c]) for c in COLUMNS} for row in csv.DictReader(file)}


def table(results: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown, best overall score first."""
    head = ["model", "overall", "leaderboard", *COLUMNS]
    lines = []
    for name, row in sorted(results.items(), key=lambda item: -overall_score(item[1])):
        cells = [f"{row[c]:.4f}" if c == "QbE" else f"{row[c]:.2f}" for c in COLUMNS]
        lines.append([name, f"{overall_score(row):.1f}", f"{leaderboard_score(row):.0f}", *cells])
    return markdown_table(head, lines)


@command
def main() -> None:
    """Print the table."""
    if len(sys.argv) != 2 or sys.argv[1] in ("-h", "--help"):
        print(__doc__)
        raise SystemExit(0 if len(sys.argv) == 2 else 2)
    path = Path(sys.argv[1])
    results = read_results(path)
    name = path.resolve().parent.name
    print(table({**published(), f"**{name}**": results}))
    print(f"\n{name}: overall {overall_score(results):.1f}, leaderboard {leaderboard_score(results):.0f}")


if __name__ == "__main__":
    main()
