"""Peak memory by implementation, over every cohort of the same training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

from matplotlib.figure import Figure

from suite.records import Record
from suite.reports.cohorts import FLOOR, labels, training_key
from suite.reports.figures import MUTED, PALETTE, Plot, make_plot, row_axes
from suite.reports.judges.pairs import where
from suite.reports.sections.section import Section
from suite.reports.tables import MIB, Cell, Table, number, rounded, whole, word

NOTE = (
    "Peak memory of a rank above that of the bare process. The figure shows the training with the largest "
    "model; the same training in several cohorts is one bar, with the range over them."
)


def memory_section(runs: Iterable[Record]) -> Section | None:
    """Of trainings with several implementations, the largest first. An emulated cluster's models are
    small stand-ins, so their memory says nothing."""
    groups: dict[str, list[Record]] = {}
    for run in runs:
        if run.peak_memory_bytes is not None and run.evidence == "measured":
            groups.setdefault(training_key(run), []).append(run)
    several = [group for group in groups.values() if len({run.impl for run in group} - {FLOOR}) > 1]
    if not several:
        return None
    several.sort(key=lambda group: (-group[0].n_params, -len(group)))
    rows = [row for group in several for row in _by_implementation(group)]
    table = Table("Peak memory of a rank", _HEAD, tuple(_cells(*row) for row in rows))
    return Section("memory", "Memory", NOTE, (table,), (_memory_plot(_by_implementation(several[0])),))


_HEAD = ("implementation", "training", "partition size", "peak, MiB", "min", "max", "cohorts", "evidence")


def _by_implementation(group: Sequence[Record]) -> list[tuple[str, list[Record]]]:
    """Smallest first; the bound, which is no method, last."""
    found: dict[str, list[Record]] = {}
    for label, run in zip(labels(group), group, strict=True):
        found.setdefault(label, []).append(run)
    return sorted(found.items(), key=lambda item: (item[0] == FLOOR, median(_peaks(item[1]))))


def _peaks(runs: Sequence[Record]) -> list[float]:
    return [run.peak_memory_bytes / MIB for run in runs if run.peak_memory_bytes is not None]


def _cells(label: str, runs: Sequence[Record]) -> tuple[Cell, ...]:
    peaks, run = _peaks(runs), runs[0]
    return (
        word(label),
        word(f"{where(run)}, {run.micro_steps} × micro-batch {run.micro_batch}"),
        number(run.partition_size, whole),
        number(median(peaks)),
        number(min(peaks)),
        number(max(peaks)),
        number(len(peaks), whole),
        word(run.evidence),
    )


def _memory_plot(rows: Sequence[tuple[str, list[Record]]]) -> Plot:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        row_axes(axes, [label for label, _ in rows])
        for row, (label, runs) in enumerate(rows):
            peaks = _peaks(runs)
            bound = label == FLOOR
            axes.barh(row, median(peaks), height=0.55, color=MUTED if bound else PALETTE[0], alpha=0.75)
            axes.plot([min(peaks), max(peaks)], [row, row], color="black", linewidth=1)
            axes.annotate(
                rounded(median(peaks)),
                (max(peaks), row),
                xytext=(3, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        axes.set_xlim(0, 1.12 * max(max(_peaks(runs)) for _, runs in rows))
        axes.set_xlabel("peak memory of a rank, MiB (lower is better)")

    run = rows[0][1][0]
    best = "; ".join(f"{label} {rounded(median(_peaks(runs)))}" for label, runs in rows)
    return make_plot(
        "memory-peak",
        "Peak memory of a rank",
        f"Measured on {where(run)}. Bar: median over cohorts, line: min to max; grey: no method, the bound.",
        f"Peak memory of a rank in MiB: {best}",
        Table("Peak memory of a rank", _HEAD, tuple(_cells(*row) for row in rows)),
        draw,
        0.8 + 0.25 * len(rows),
    )
