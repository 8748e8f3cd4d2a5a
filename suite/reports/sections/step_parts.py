"""What a step on the emulated cluster is made of: compute, exposed communication, and the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from suite.records import Record
from suite.reports.cohorts import FLOOR, Cohort
from suite.reports.emulated import compute_s
from suite.reports.figures import INK, MUTED, PALETTE, Plot, make_plot, row_axes
from suite.reports.tables import Cell, Table, evidence_cell, milliseconds, rounded, word

Parts = tuple[float, float, float]
PARTS = ("blocks", "waiting for messages", "the rest")


def parts_of(run: Record) -> Parts | None:
    """Milliseconds of a step: blocks' modelled time, exposed communication, and what is left (optimizer
    and other work of this host that the blocks do not hide)."""
    compute = compute_s(run)
    if compute is None or run.exposed_comm_s is None:
        return None
    rest = run.step_time_s.median - compute - run.exposed_comm_s
    return 1000 * compute, 1000 * run.exposed_comm_s, 1000 * max(0.0, rest)


def _rows(cohort: Cohort) -> list[tuple[str, Record, Parts]]:
    """Slowest first, the floor last."""
    members = list(zip(cohort.labels, cohort.runs, strict=True))[::-1]
    members += [(FLOOR, cohort.floor)] if cohort.floor else []
    return [(label, run, parts) for label, run in members if (parts := parts_of(run))]


def step_parts_plot(cohort: Cohort) -> Plot:
    rows = _rows(cohort)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        row_axes(axes, [label for label, _, _ in rows])
        for row, (_, run, parts) in enumerate(rows):
            _draw(axes, row, parts, first=row == 0)
            step = run.step_time_s
            axes.plot([1000 * step.min, 1000 * step.max], [row, row], color=INK, linewidth=1)
        axes.set_xlabel("ms per step")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)

    return make_plot(
        f"{cohort.key.lower()}-step-parts",
        "What a step is made of",
        f"{cohort.key}: {cohort.title}. {cohort.conditions} Line: min to max of the step; the rest is "
        "mostly the optimizer.",
        "Waiting for messages: " + "; ".join(f"{label} {parts[1]:.0f} ms" for label, _, parts in rows),
        _table(rows),
        draw,
        1.2 + 0.27 * len(rows),
    )


def _draw(axes: Axes, row: int, parts: Sequence[float], first: bool) -> None:
    looks: tuple[dict[str, Any], ...] = (
        {"color": PALETTE[0], "alpha": 0.75},
        {"facecolor": "none", "edgecolor": PALETTE[1], "hatch": "////"},
        {"color": MUTED, "alpha": 0.5},
    )
    start = 0.0
    for name, value, look in zip(PARTS, parts, looks, strict=True):
        axes.barh(row, value, left=start, height=0.6, linewidth=0.6, label=name if first else None, **look)
        start += value


def _table(rows: Sequence[tuple[str, Record, Parts]]) -> Table:
    head = ("implementation", *(f"{name}, ms" for name in PARTS), "step, median ms", "evidence")
    cells = tuple(
        (
            word(label),
            *(Cell(rounded(value), value) for value in parts),
            milliseconds(run.step_time_s.median),
            evidence_cell(run),
        )
        for label, run, parts in rows
    )
    return Table("Parts of a step", head, cells)
