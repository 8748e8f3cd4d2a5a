"""The report's main tables for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from suite.records import AnyRecord
from suite.reports.claims import Verdict, judge
from suite.reports.cohorts import checks_of, group_cohorts
from suite.reports.sections.correctness import brief_check_table
from suite.reports.sections.throughput import brief_table
from suite.reports.tables import Table
from suite.reports.verdicts import NOT_REPRODUCED, NOT_TESTABLE, PARTLY, REPRODUCED

BRIEF_UNITS = (
    "Median and range of a step; FLOPS are the model's, per rank; ÷ ddp is the ratio of the step times, "
    "≈ where their ranges overlap: no difference."
)

_MARKS = {
    REPRODUCED: ("✓", "green"),
    PARTLY: ("◐", "yellow"),
    NOT_REPRODUCED: ("✗", "red"),
    NOT_TESTABLE: ("○", "dim"),
}


def terminal_table(records: Sequence[AnyRecord]) -> RenderableType:
    """The main tables for a terminal: step time and throughput per cohort, then the checks."""
    parts: list[RenderableType] = []
    for cohort in group_cohorts(records):
        parts += [
            rich_table(brief_table(cohort)),
            Text(f"{cohort.conditions} {BRIEF_UNITS}\n", style="dim"),
        ]
    checks = brief_check_table(checks_of(records))
    if checks.rows:
        parts.append(rich_table(checks))
    return Group(*parts) if parts else Text("no results yet")


def terminal_report(records: Sequence[AnyRecord]) -> RenderableType:
    """The claims, then the main tables."""
    return Group(claims_view(judge(records)), terminal_table(records))


def claims_view(verdicts: Sequence[Verdict]) -> RenderableType:
    """Every claim with its verdict and numbers; as prose, which an 80-column table would crush."""
    lines: list[RenderableType] = [Text("Claims", style="bold")]
    for verdict in verdicts:
        claim = verdict.claim
        mark, style = _MARKS[verdict.verdict]
        head = Text.assemble((f"{mark} {claim.id} ", "bold"), (verdict.verdict, style), f"  {claim.sentence}")
        lines += [head, Text(f"    published: {claim.published}", style="dim")]
        lines += [Text(f"    {finding.evidence}: {finding.ours}") for finding in verdict.findings]
        lines += [Text(f"    {verdict.missing}", style="dim")] if verdict.missing else []
    return Group(*lines, Text(""))


def rich_table(content: Table) -> RichTable:
    """Names and numbers stay whole; prose may wrap."""
    result = RichTable(title=content.title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    result.title_justify, result.title_style, result.header_style = "left", "bold", "dim"
    for name, numeric in zip(content.head, content.numeric, strict=True):
        result.add_column(
            name, justify="right" if numeric else "left", no_wrap=numeric or name == content.head[0]
        )
    for row in content.rows:
        result.add_row(*(Text(cell.text) for cell in row))
    return result
