"""Memory and bytes sent of the members of a cohort."""

from __future__ import annotations

from matplotlib.figure import Figure

from suite.records import Record
from suite.reports.cohorts import Cohort
from suite.reports.figures import PALETTE, Plot, cohort_plot, row_axes
from suite.reports.tables import (
    MIB,
    Cell,
    Table,
    evidence_cell,
    mebibytes,
    number,
    per_run,
    percent,
    rounded,
    rows_of,
    whole,
    word,
)


def resources_table(cohort: Cohort) -> Table:
    """Memory and traffic. Traffic is per optimizer step. Where an accelerator's allocator was asked, what
    it did, too."""
    on_accelerator = any("peak_reserved_bytes" in run.details for run in cohort.members)

    def allocator(run: Record) -> tuple[Cell, ...]:
        return (
            mebibytes(run.details.get("peak_reserved_bytes")),
            percent(run.details.get("fragmentation")),
            number(run.details.get("alloc_retries"), whole),
        )

    def row(label: str, run: Record) -> tuple[Cell, ...]:
        return (
            word(label),
            mebibytes(run.peak_memory_bytes),
            *(allocator(run) if on_accelerator else ()),
            mebibytes(run.bytes_sent_per_rank),
            mebibytes(run.inter_node_bytes_per_node),
            number(run.partition_size, whole),
            evidence_cell(run),
        )

    head = (
        "implementation",
        "peak memory of a rank, MiB",
        *(("reserved for it, MiB", "fragmented %", "retries") if on_accelerator else ()),
        "sent by a rank per step, MiB",
        "sent between nodes per node and step, MiB",
        "partition size",
        "evidence",
    )
    return Table("Memory and bytes", head, per_run(cohort, row))


def resources_plot(cohort: Cohort) -> Plot:
    """Peak memory and bytes sent."""
    kinds = (
        ("peak memory of a rank, MiB", lambda run: run.peak_memory_bytes),
        ("sent by a rank per step, MiB", lambda run: run.bytes_sent_per_rank),
    )
    shown = [kind for kind in kinds if any(kind[1](run) is not None for run in cohort.runs)]

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
        for axes, (name, read), colour in zip(panels, shown, PALETTE, strict=False):
            row_axes(axes, cohort.labels)
            for row, run in enumerate(cohort.runs):
                value = read(run)
                if value is None:
                    axes.text(0, row, " –", va="center")
                else:
                    axes.barh(row, value / MIB, height=0.5, color=colour, alpha=0.75)
                    axes.annotate(
                        rounded(value / MIB),
                        (value / MIB, row),
                        xytext=(3, 0),
                        va="center",
                        textcoords="offset points",
                        fontsize=8,
                    )
            axes.set_xlim(0, 1.18 * max(axes.get_xlim()[1], 1e-9))
            axes.set_xlabel(name)

    def cells(label: str, run: Record) -> tuple[Cell, ...]:
        return word(label), *(mebibytes(read(run)) for _, read in kinds), word(run.evidence)

    head = ("implementation", *(name for name, _ in kinds), "evidence")
    return cohort_plot(
        cohort,
        "resources",
        "Memory and bytes sent",
        draw,
        Table("Memory and bytes", head, rows_of(cohort, cells)),
    )
