"""The generated tables are those of the recipes and the published results, and README's rows are among them."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from docs.tables import DOCS, PAGES, recipes, renewed
from evaluation.superb_score import COLUMNS, PUBLISHED, overall_score


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_tables_are_up_to_date(page):
    assert renewed(page) == (DOCS / page).read_text(encoding="utf-8"), "run python -m docs.tables"


def test_every_recipe_has_a_complete_header():
    rows = recipes().splitlines()[2:]
    assert rows and all(cell.strip() for row in rows for cell in row.strip("|").split("|")), rows


def test_the_front_page_quotes_the_published_results():
    with PUBLISHED.open(newline="") as file:
        published = {row["model"]: row for row in csv.DictReader(file)}
    text = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    for model in ("HuBERT Base", "DPHuBERT", "DPWavLM"):
        row = published[model]
        overall = overall_score({column: float(row[column]) for column in COLUMNS})
        cells = (
            f"{model}, published",
            *(row[name] for name in ("params_m", "macs_g", "PR", "ASR", "SID")),
            f"{overall:.1f}",
        )
        assert f"| {' | '.join(cells)} |" in text
