"""A section of the report that is nothing but figures and tables."""

from __future__ import annotations

from dataclasses import dataclass

from suite.reports.figures import Plot
from suite.reports.tables import Table


@dataclass(frozen=True)
class Section:
    """`key` is its anchor; tables that belong to a figure are shown with it. `findings` are sentences
    computed from the records."""

    key: str
    title: str
    note: str
    tables: tuple[Table, ...]
    plots: tuple[Plot, ...]
    findings: tuple[str, ...] = ()
