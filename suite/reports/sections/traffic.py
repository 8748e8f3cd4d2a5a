"""Bytes between nodes: what the kernel counted against what the topology predicts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from suite.records import Record
from suite.reports.cohorts import Cohort, cluster_name, ranks
from suite.reports.figures import INK, MUTED, PALETTE, Plot, make_plot, row_axes
from suite.reports.sections.section import Section
from suite.reports.tables import MIB, Cell, Table, evidence_cell, number, whole, word

LIMIT = 0.01
NOTE = (
    "Every run whose implementation says from its topology alone what a node has to send to others in a "
    "step, beside what was counted on the ranks' connections. Headers, acknowledgements and the few small "
    "messages of a step are counted and not predicted."
)


@dataclass(frozen=True)
class Count:
    """A run, and where it stands in the report."""

    cohort: str
    label: str
    run: Record
    expected: float
    counted: int

    @property
    def off(self) -> float:
        """Relative."""
        return self.counted / self.expected - 1


def traffic_section(cohorts: Iterable[Cohort]) -> Section | None:
    found = counts(cohorts)
    if not found:
        return None
    return Section("traffic", "Bytes against prediction", NOTE, (), (_deviation_plot(found),))


def counts(cohorts: Iterable[Cohort]) -> list[Count]:
    return [
        Count(cohort.key, label, run, expected, run.inter_node_bytes_per_node)
        for cohort in cohorts
        for label, run in zip(cohort.labels, cohort.runs, strict=True)
        if (expected := run.details.get("expected_inter_node_bytes", 0)) > 0
        and run.inter_node_bytes_per_node is not None
    ]


def traffic_table(found: Sequence[Count]) -> Table:
    head = (
        "implementation",
        "cohort",
        "where",
        "micro-steps",
        "partition size",
        "predicted, MiB per node and step",
        "counted, MiB",
        "difference, %",
        "within 1%",
        "evidence",
    )
    return Table("Bytes between nodes", head, tuple(map(_row, found)))


def _row(item: Count) -> tuple[Cell, ...]:
    run = item.run
    place = ", ".join(text for text in (run.workload, cluster_name(run), ranks(run)) if text)
    return (
        word(item.label),
        word(item.cohort),
        word(place),
        number(run.micro_steps, whole),
        number(run.partition_size, whole),
        number(item.expected / MIB, "{:.2f}".format),
        number(item.counted / MIB, "{:.2f}".format),
        number(100 * item.off, "{:+.2f}".format),
        word("yes" if abs(item.off) <= LIMIT else "NO"),
        evidence_cell(run),
    )


def _deviation_plot(found: Sequence[Count]) -> Plot:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        row_axes(
            axes,
            [f"{item.cohort} {item.label}, {item.run.nodes} × {item.run.ranks_per_node}" for item in found],
        )
        axes.axvspan(-100 * LIMIT, 100 * LIMIT, color=MUTED, alpha=0.15, linewidth=0)
        axes.axvline(0, color=INK, linestyle=":", linewidth=1)
        for row, item in enumerate(found):
            fits = abs(item.off) <= LIMIT
            look: dict[str, Any] = {"color": PALETTE[0 if fits else 1], "markersize": 6}
            axes.plot([100 * item.off], [row], "o" if fits else "X", **look)
        widest = max([100 * abs(item.off) for item in found] + [150 * LIMIT])
        axes.set_xlim(-1.1 * widest, 1.1 * widest)
        axes.set_xlabel("counted against predicted, %")

    inside = sum(abs(item.off) <= LIMIT for item in found)
    kinds = ", ".join(sorted({item.run.evidence for item in found}))
    return make_plot(
        "traffic-bytes",
        "Bytes between nodes against prediction",
        f"{kinds.capitalize()}; {inside} of {len(found)} runs within 1% (grey band; a cross is outside).",
        f"{inside} of {len(found)} runs counted within 1% of the predicted bytes",
        traffic_table(found),
        draw,
        0.9 + 0.24 * len(found),
    )
