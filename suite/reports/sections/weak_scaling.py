"""Weak scaling: efficiency, TFLOPS per GPU, exposed communication and bytes between nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from suite.records import Record
from suite.reports.emulated import OVERLAP_RULE, bound_s
from suite.reports.figures import INK, Plot, Style, doubling_axis, draw_band, make_plot, shared_legend
from suite.reports.scaling import Curve, Family, families
from suite.reports.sections.section import Section
from suite.reports.tables import (
    Cell,
    Table,
    best_overlap_cell,
    evidence_cell,
    mebibytes,
    milliseconds,
    number,
    overlap_cell,
    range_text,
    rounded,
    whole,
    word,
)

MIB = 2**20
NOTE = (
    "The same work per rank on ever more nodes. Efficiency is throughput per rank against that on 1 node "
    "(whose ranks need no network) and on 2. Runs of different sizes can't be timed in turns. Bands and "
    "bars: min to max. On one node a partition group of MiCS is as small as its default makes it; from 2 "
    "nodes on it is a node. " + OVERLAP_RULE
)
Spread = tuple[float, float, float]


def weak_scaling_section(runs: Iterable[Record], styles: Mapping[str, Style]) -> Section | None:
    found = families(runs)
    if not found:
        return None
    return Section(
        "weak-scaling",
        "Weak scaling",
        NOTE,
        tuple(scaling_table(family) for family in found),
        tuple(plot for family in found for plot in _plots(family, styles)),
    )


def scaling_table(family: Family) -> Table:
    head = (
        "implementation",
        "nodes",
        "GPUs",
        "step, median ms",
        "min–max ms",
        "efficiency against 1 node, %",
        "against 2 nodes, %",
        "model TFLOPS per GPU",
        "exposed communication, ms",
        "overlapped, %",
        "at best, %",
        "bound, ms",
        "sent between nodes per node and step, MiB",
        "partition size",
        "evidence",
    )
    rows = tuple(_row(curve, run) for curve in family.members for run in curve.points)
    return Table(f"{family.key}: {family.title}", head, rows)


def _row(curve: Curve, run: Record) -> tuple[Cell, ...]:
    step = run.step_time_s
    return (
        word(curve.label),
        number(run.nodes, whole),
        number(run.world_size, whole),
        number(1000 * step.median),
        Cell(range_text(1000 * step.min, 1000 * step.max), 1000 * step.min),
        _efficiency_cell(curve, run, 1),
        _efficiency_cell(curve, run, 2),
        number(run.model_tflops_per_gpu),
        milliseconds(run.exposed_comm_s),
        overlap_cell(run),
        best_overlap_cell(run),
        milliseconds(bound_s(run)),
        mebibytes(run.inter_node_bytes_per_node),
        number(run.partition_size, whole),
        evidence_cell(run),
    )


def _efficiency_cell(curve: Curve, run: Record, base: int) -> Cell:
    ratio = curve.efficiency(run, base)
    return number(100 * ratio.median if ratio else None, "{:.1f}".format)


def _milliseconds(run: Record) -> float | None:
    return None if run.exposed_comm_s is None else 1000 * run.exposed_comm_s


def _plots(family: Family, styles: Mapping[str, Style]) -> list[Plot]:
    return [_efficiency_plot(family, styles), _speed_plot(family, styles), _cost_plot(family, styles)]


def _efficiency_plot(family: Family, styles: Mapping[str, Style]) -> Plot:
    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 2, sharey=True)
        for axes, base in zip(panels, (1, 2), strict=True):
            for curve in family.curves:
                _draw(axes, curve, styles, partial(_efficiency_spread, curve, base))
            axes.axhline(100, color=INK, linestyle=":", linewidth=1)
            axes.set_title(f"against {base} node{'s' if base > 1 else ''}", fontsize=8.5, fontweight="normal")
            axes.set_ylim(bottom=0)
            _gpu_axis(axes, family)
        panels[0].set_ylabel("efficiency, %")
        shared_legend(figure, panels[0])

    return _plot(family, "efficiency", "Weak-scaling efficiency", draw, " Dotted: ideal.", 3.3)


def _speed_plot(family: Family, styles: Mapping[str, Style]) -> Plot:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for curve in family.curves:
            _draw(axes, curve, styles, _speed_spread)
        if family.floor:
            points = family.floor.points
            line: dict[str, Any] = {
                "color": INK,
                "linestyle": ":",
                "linewidth": 1,
                "label": "ideal (no communication)",
            }
            axes.plot(
                [run.world_size for run in points], [run.model_tflops_per_gpu for run in points], **line
            )
        axes.set_ylim(bottom=0)
        axes.set_ylabel(f"{family.any.evidence} model TFLOPS per GPU")
        _gpu_axis(axes, family)
        shared_legend(figure, axes)

    return _plot(family, "tflops", "TFLOPS per GPU", draw, " Dotted: ranks that never communicate.", 3.3)


def _cost_plot(family: Family, styles: Mapping[str, Style]) -> Plot:
    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for curve in family.curves:
            _draw(left, curve, styles, lambda run: _single(_milliseconds(run)))
            _draw(right, curve, styles, lambda run: _single(_sent(run)))
        left.set_ylabel("exposed communication, ms per step")
        right.set_ylabel("sent between nodes,\nMiB per node and step")
        for axes in (left, right):
            axes.set_ylim(bottom=0)
            _gpu_axis(axes, family)
        shared_legend(figure, left)

    return _plot(family, "cost", "What the network costs", draw, "", 3.3)


def _draw(
    axes: Axes, curve: Curve, styles: Mapping[str, Style], read: Callable[[Record], Spread | None]
) -> None:
    """Median with its band; what is missing leaves a gap at the ends."""
    points = [(run.world_size, spread) for run in curve.points if (spread := read(run)) is not None]
    draw_band(axes, curve.label, points, styles[curve.impl])


def _efficiency_spread(curve: Curve, base: int, run: Record) -> Spread | None:
    ratio = curve.efficiency(run, base)
    if ratio is None:
        return None
    # The base is the unit: it has no spread against itself.
    low, high = (1.0, 1.0) if run.nodes == base else (ratio.low, ratio.high)
    return 100 * low, 100 * ratio.median, 100 * high


def _speed_spread(run: Record) -> Spread:
    step, work = run.step_time_s, run.model_tflops_per_gpu * run.step_time_s.median
    return work / step.max, run.model_tflops_per_gpu, work / step.min


def _single(value: float | None) -> Spread | None:
    return None if value is None else (value, value, value)


def _sent(run: Record) -> float | None:
    return None if run.inter_node_bytes_per_node is None else run.inter_node_bytes_per_node / MIB


def _gpu_axis(axes: Axes, family: Family) -> None:
    sizes = (run.world_size for curve in family.members for run in curve.points)
    doubling_axis(axes, sizes, "GPUs (one rank each)")


def _plot(
    family: Family, kind: str, title: str, draw: Callable[[Figure], None], marks: str, height: float
) -> Plot:
    ends = "; ".join(
        f"{curve.label} {rounded(curve.points[-1].model_tflops_per_gpu)}" for curve in family.curves
    )
    run = family.any
    caption = f"{run.evidence.capitalize()}; {family.key}: {family.title}.{marks}"
    alt = f"{title} over GPUs; model TFLOPS per GPU on the most nodes: {ends}"
    return make_plot(f"{family.key.lower()}-{kind}", title, caption, alt, scaling_table(family), draw, height)
