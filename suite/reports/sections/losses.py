"""Loss curves, held against those of plain data parallelism."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from matplotlib.figure import Figure

from suite.records import Record
from suite.reports.cohorts import REFERENCE, Cohort, curve_difference
from suite.reports.figures import Plot, Style, cohort_plot, draw_curve
from suite.reports.sections.section import Section
from suite.reports.tables import Cell, Table, evidence_cell, number, scientific, whole, word


def fidelity_table(cohort: Cohort) -> Table:
    """Loss curves and gradient norms held against ddp's."""
    reference = cohort.reference

    def row(label: str, run: Record) -> tuple[Cell, ...]:
        losses = norms = None
        if reference is not None and run is not reference:
            losses = curve_difference(run.losses, reference.losses)
            norms = curve_difference(run.grad_norms, reference.grad_norms)
        return (
            word(label),
            number(run.losses[0] if run.losses else None, "{:.5f}".format),
            number(run.losses[-1] if run.losses else None, "{:.5f}".format),
            number(len(run.losses), whole),
            number(losses, scientific),
            number(norms, scientific),
            evidence_cell(run),
        )

    head = (
        "implementation",
        "first loss",
        "last loss",
        "steps",
        "largest relative difference of a loss to ddp's",
        "of a gradient norm",
        "evidence",
    )
    rows = tuple(row(label, run) for label, run in zip(cohort.labels, cohort.runs, strict=True))
    return Table("Loss curves", head, rows)


LONG = 100
"""Steps from which a training says something about convergence; shown in a section of its own."""
_MARKERS = 12
NOTE = (
    "Loss curves of the same training over many steps, on top of each other, and how far each is from "
    "ddp's. Methods that change no arithmetic differ by the order in which numbers are added, and by "
    "nothing else."
)


def is_long(cohort: Cohort) -> bool:
    return any(len(run.losses) >= LONG for run in cohort.runs)


def convergence_section(cohorts: Iterable[Cohort], styles: Mapping[str, Style]) -> Section | None:
    long = [cohort for cohort in cohorts if is_long(cohort)]
    if not long:
        return None
    return Section(
        "convergence", "Loss curves over many steps", NOTE, (), tuple(loss_plot(c, styles) for c in long)
    )


def loss_plot(cohort: Cohort, styles: Mapping[str, Style]) -> Plot:
    """All loss curves on top of each other, and below them how far each is from ddp's."""
    reference = cohort.reference
    runs = [(label, run) for label, run in zip(cohort.labels, cohort.runs, strict=True) if run.losses]

    def draw(figure: Figure) -> None:
        if reference is None or not cohort.others:
            axes = figure.subplots()
        else:
            axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
            for index, (label, run) in enumerate(cohort.others):
                difference = _absolute(run.losses, reference.losses)
                draw_curve(below, label, difference, styles[run.impl], _every(index, len(runs), run))
            below.set_yscale("symlog", linthresh=1e-7)
            below.set_ylim(bottom=0)
            below.set_ylabel(f"|difference to {REFERENCE}|")
        for index, (label, run) in enumerate(runs):
            draw_curve(axes, label, run.losses, styles[run.impl], _every(index, len(runs), run))
        axes.set_ylabel("loss")
        figure.axes[-1].set_xlabel("step (warm-up included)")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)

    table = fidelity_table(cohort)
    return cohort_plot(cohort, "loss", "Loss curves", draw, table, height=4.2 + 0.17 * (len(runs) // 3))


def _every(index: int, curves: int, run: Record) -> tuple[int, int]:
    """First step and distance of a curve's markers. Curves that coincide hide each other; markers at
    different steps show that all are there."""
    distance = max(1, curves // 2, len(run.losses) // _MARKERS)
    return index * max(1, distance // curves) % len(run.losses), distance


def _absolute(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    pairs = zip(ours, theirs, strict=False)
    return [float("nan") if a is None or b is None else abs(a - b) for a, b in pairs]
