"""The README's generated tables are those of the recipes and the published results."""

from __future__ import annotations

from docs.tables import README, fill, recipes


def test_tables_are_up_to_date():
    text = README.read_text(encoding="utf-8")
    assert fill(text) == text, "run python -m docs.tables"


def test_every_recipe_has_a_complete_header():
    rows = recipes().splitlines()[2:]
    assert rows and all(cell.strip() for row in rows for cell in row.strip("|").split("|")), rows
