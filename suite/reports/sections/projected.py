"""Projections: held against published numbers, and weak scaling far beyond what can be run."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from matplotlib.figure import Figure

from suite.records import ProjectionRecord
from suite.reports.figures import INK, MUTED, PALETTE, PAPER, Plot, Style, make_plot, row_axes, shared_legend
from suite.reports.judges.projections import POINTS_LIMIT, RELATIVE_LIMIT, Row, newest_rows
from suite.reports.sections.paper_figures import paper_figures
from suite.reports.sections.projected_timeline import timeline_plot
from suite.reports.sections.section import Section
from suite.reports.sections.sensitivity import sensitivity_plots
from suite.reports.tables import NOTHING, Cell, Table, number, rounded, whole, word

NOTE = (
    "A model, not a measurement: it runs the engine's schedule on a modelled cluster. A number marked "
    "fitted was used to set the model's free parameters; only the others are predictions, and even these "
    "were in sight while the model was built. Every assumption is in the records."
)
FITTED = "fitted"
ELSEWHERE = "elsewhere"
OF_CLAIMS = ("published-errors", "Projected against published")
OF_OTHERS = ("elsewhere-errors", "Projected against runs of others, to which nothing was fitted")
"""Name and title of the figure."""


def projected_section(projections: Sequence[ProjectionRecord], styles: Mapping[str, Style]) -> Section | None:
    rows = newest_rows(projections)
    here = [row for row in rows if row.role != ELSEWHERE]
    plots = [_error_plot(here, *OF_CLAIMS), *paper_figures(here)] if here else []
    if others := [row for row in rows if row.role == ELSEWHERE]:
        plots.append(_error_plot(others, *OF_OTHERS))
    plots += [_scaling_plot(index, family, styles) for index, family in enumerate(_families(projections), 1)]
    plots += sensitivity_plots(rows)
    drawn = [record for record in projections if record.timeline]
    plots += [timeline_plot(record, index) for index, record in enumerate(drawn, 1)]
    return Section("projected", "Projected", NOTE, (), tuple(plots)) if plots else None


def published_table(rows: Sequence[Row]) -> Table:
    head = ("what", "source", "unit", "published", "projected", "error", "role", "aim reached", "not stated")
    return Table("Published and projected", (*head, "evidence"), tuple(map(_published_cells, rows)))


def _published_cells(row: Row) -> tuple[Cell, ...]:
    content = row.record.published or {}
    return (
        word(row.what),
        word(content["source"]),
        word(row.unit),
        _value(row, row.published),
        _value(row, row.projected),
        _error(row),
        word(row.role),
        word("yes" if content["within"] else "NO"),
        word(content.get("unstated")),
        word(row.record.evidence),
    )


def _value(row: Row, value: float) -> Cell:
    if row.is_memory:
        return word("fits" if value else "out of memory")
    return number(value)


def _error(row: Row) -> Cell:
    if row.is_memory:
        return Cell(NOTHING)
    return (
        Cell(f"{row.error:+.1f} points", row.error) if row.in_points else Cell(f"{row.error:+.1%}", row.error)
    )


def _error_plot(rows: Sequence[Row], name: str, title: str) -> Plot:
    shown = [row for row in rows if not row.is_memory]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        row_axes(axes, [f"{row.what} [{row.unit}]" for row in shown])
        axes.axvspan(-100 * RELATIVE_LIMIT, 100 * RELATIVE_LIMIT, color=MUTED, alpha=0.13, linewidth=0)
        axes.axvline(0, color=INK, linestyle=":", linewidth=1)
        for position, row in enumerate(shown):
            fitted = row.role == FITTED
            colour = PALETTE[1 if fitted else 0]
            error = row.error if row.in_points else 100 * row.error
            axes.plot(
                [error],
                [position],
                "s" if fitted else "o",
                color=colour,
                markerfacecolor=PAPER if fitted else colour,
                markersize=6,
            )
        axes.set_xlabel("error, % (in points for percentages)")

    inside = sum(row.close for row in shown)
    return make_plot(
        name,
        title,
        f"Projected; {inside} of {len(shown)} numbers within {RELATIVE_LIMIT:.0%} (grey band) or "
        f"{POINTS_LIMIT:g} points. Hollow square: fitted; disc: predicted, or following from fitted ones.",
        "Error of the projection: " + "; ".join(f"{row.what} {_error(row).text}" for row in shown),
        published_table(rows),
        draw,
        0.9 + 0.24 * len(shown),
    )


def _families(projections: Iterable[ProjectionRecord]) -> list[dict[str, list[ProjectionRecord]]]:
    """Per training and cluster type, each method's projections by size; only where sizes differ."""
    found: dict[str, dict[str, dict[int, ProjectionRecord]]] = {}
    for record in sorted(projections, key=lambda record: record.started_at):
        if record.published is None:
            family = found.setdefault(_family_key(record), {})
            family.setdefault(record.impl, {})[record.world_size] = record
    curves = [
        {impl: [sizes[n] for n in sorted(sizes)] for impl, sizes in sorted(family.items()) if len(sizes) > 2}
        for family in found.values()
    ]
    return [family for family in curves if family]


def _family_key(record: ProjectionRecord) -> str:
    train = {key: value for key, value in record.config["train"].items() if key != "seed"}
    return json.dumps([record.workload, record.cluster, record.n_params, train], sort_keys=True)


def _efficiency(record: ProjectionRecord, curve: Sequence[ProjectionRecord]) -> float | None:
    """Against the smallest cluster that holds the model."""
    base = next((item for item in curve if item.fits_memory), None)
    if base is None or not record.fits_memory:
        return None
    return record.model_tflops_per_gpu / base.model_tflops_per_gpu


def scaling_table(family: Mapping[str, Sequence[ProjectionRecord]]) -> Table:
    head = (
        "implementation",
        "GPUs",
        "model TFLOPS per GPU",
        "efficiency, %",
        "step, s",
        "exposed communication, s",
        "partition size",
        "memory",
        "evidence",
    )
    rows = tuple(_scaling_cells(record, curve) for curve in family.values() for record in curve)
    return Table("Projected weak scaling", head, rows)


def _scaling_cells(record: ProjectionRecord, curve: Sequence[ProjectionRecord]) -> tuple[Cell, ...]:
    efficiency = _efficiency(record, curve)
    fits = record.fits_memory
    return (
        word(record.impl),
        number(record.world_size, whole),
        number(record.model_tflops_per_gpu if fits else None),
        number(None if efficiency is None else 100 * efficiency, "{:.1f}".format),
        number(record.step_time_s if fits else None),
        number(record.exposed_comm_s if fits else None),
        number(record.partition_size, whole),
        word("fits" if fits else "out of memory"),
        word(record.evidence),
    )


def _scaling_plot(
    index: int, family: Mapping[str, Sequence[ProjectionRecord]], styles: Mapping[str, Style]
) -> Plot:
    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for impl, curve in family.items():
            fitting = [record for record in curve if record.fits_memory]
            gpus, style = [record.world_size for record in fitting], styles[impl]
            look = {"color": style.colour, "marker": style.marker, "markersize": 4, "label": impl}
            shares = [100 * (_efficiency(record, curve) or 0) for record in fitting]
            left.plot(gpus, shares, style.line, **look)
            right.plot(gpus, [record.model_tflops_per_gpu for record in fitting], style.line, **look)
        left.axhline(100, color=INK, linestyle=":", linewidth=1)
        left.set_ylabel("efficiency, %")
        right.set_ylabel("model TFLOPS per GPU")
        for axes in (left, right):
            axes.set_xscale("log")
            axes.set_ylim(bottom=0)
            axes.set_xlabel("GPUs")
            axes.grid()
        shared_legend(figure, left)

    run = next(iter(family.values()))[0]
    place = f"{run.workload} on {run.cluster}, {run.micro_steps} × micro-batch {run.micro_batch} per GPU"
    largest = "; ".join(
        f"{impl} {rounded(100 * (_efficiency(curve[-1], curve) or 0))}% on {curve[-1].world_size} GPUs"
        for impl, curve in family.items()
    )
    return make_plot(
        f"projected-scaling-{index}",
        "Projected weak scaling",
        f"Projected; {place}. Efficiency against the smallest cluster that holds the model; smaller ones "
        "are left out. Dotted: ideal.",
        f"Projected efficiency: {largest}",
        scaling_table(family),
        draw,
        3.3,
    )
