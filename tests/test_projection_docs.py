"""The documentation shows what the commands answer."""

from __future__ import annotations

from pathlib import Path

from suite.projection.assumptions import default_assumptions
from suite.projection.elsewhere import NUMBERS_ELSEWHERE
from suite.projection.published_runs import evaluate
from suite.projection.tables import (
    ASSUMPTION_COLUMNS,
    ELSEWHERE_COLUMNS,
    PUBLISHED_COLUMNS,
    assumption_rows,
    elsewhere_rows,
    markdown,
    published_rows,
)

DOCS = Path(__file__).resolve().parent.parent / "docs" / "projection.md"


def test_the_published_table_is_the_one_that_the_command_prints() -> None:
    table = markdown(PUBLISHED_COLUMNS, published_rows(evaluate()))
    assert table in DOCS.read_text(), "write it anew: suite project --published --markdown"


def test_the_assumptions_are_listed_with_their_values_and_ranges() -> None:
    entries = list(default_assumptions().entries.values())
    assert markdown(ASSUMPTION_COLUMNS, assumption_rows(entries)) in DOCS.read_text()


def test_the_sensitivities_start_from_what_is_projected_now() -> None:
    now = {f"{row[0]} ({row[2]})": row[4] for row in published_rows(evaluate())}
    section = DOCS.read_text().partition("## How far the answers move")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if "`" in line]
    shown = {row[1]: row[3] for row in rows if len(row) == 5 and row[3]}
    assert len(shown) > 5
    assert shown == {what: now[what] for what in shown}, (
        "write it anew: suite project --sensitivity --markdown"
    )


def test_the_runs_of_others_are_shown_as_they_are_projected() -> None:
    table = markdown(ELSEWHERE_COLUMNS, elsewhere_rows(evaluate(numbers=NUMBERS_ELSEWHERE)))
    assert table in DOCS.read_text(), "write it anew: suite project --elsewhere --markdown"
