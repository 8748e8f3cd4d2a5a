"""How far the projected numbers move when each assumption moves over its plausible range."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure

from suite.reports.figures import INK, PALETTE, Plot, make_plot, row_axes
from suite.reports.judges.projections import Row
from suite.reports.tables import Cell, Table, number, word

LEAST = 0.002
"""Relative movement that is worth a row."""

Move = tuple[Row, str, list[float]]
"""A number, an assumption, and [low, high, number at low, number at high]."""


def sensitivity_plots(rows: Sequence[Row]) -> list[Plot]:
    """One figure of the farthest move that each assumption can cause; its table has every number."""
    moves = [
        (row, name, ends)
        for row in rows
        if not row.is_memory
        for name, ends in _sensitivities(row).items()
        if abs(ends[3] - ends[2]) >= LEAST * row.projected
    ]
    return [_plot(moves)] if moves else []


def _sensitivities(row: Row) -> dict[str, list[float]]:
    content: dict[str, Any] = row.record.published or {}
    return content.get("sensitivities") or {}


def _reach(move: Move) -> float:
    row, _, (_, _, first, last) = move
    return max(abs(first / row.projected - 1), abs(last / row.projected - 1))


def _plot(moves: Sequence[Move]) -> Plot:
    ordered = sorted(moves, key=_reach, reverse=True)
    farthest: dict[str, Move] = {}
    for move in ordered:
        farthest.setdefault(move[1], move)
    shown = list(farthest.values())

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        row_axes(axes, [f"{name}: {row.what}" for row, name, _ in shown])
        for place, (row, _, (_, _, first, last)) in enumerate(shown):
            for value, colour in ((first, PALETTE[0]), (last, PALETTE[1])):
                axes.barh(place, 100 * (value / row.projected - 1), 0.6, color=colour)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_xlabel("change of the projected number, %")

    head = ("assumption", "from", "to", "what", "unit", "at the low end", "now", "at the high end")
    return make_plot(
        "sensitivities",
        "How far the answers move",
        "Projected; each assumption goes over its plausible range while all others stay, and is shown with "
        "the number that it moves farthest. Blue: the low end, orange: the high end. The table has every "
        "published number that moves by 0.2% or more.",
        "; ".join(f"{name} moves {row.what} by up to {_reach((row, name, e)):.0%}" for row, name, e in shown),
        Table("Sensitivities", head, tuple(_cells(*move) for move in ordered)),
        draw,
        0.8 + 0.24 * len(shown),
    )


def _cells(row: Row, name: str, ends: list[float]) -> tuple[Cell, ...]:
    low, high, first, last = ends
    return (
        word(name),
        number(low, "{:g}".format),
        number(high, "{:g}".format),
        word(row.what),
        word(row.unit),
        number(first),
        number(row.projected),
        number(last),
    )
