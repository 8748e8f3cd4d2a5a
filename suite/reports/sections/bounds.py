"""Steps of the emulated cluster, held against their lower bound and against the projection."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from suite.records import ProjectionRecord, Record
from suite.reports.cohorts import Cohort
from suite.reports.emulated import BOUND_RULE, OVERLAP_RULE, bound_s, compute_s, emulated_runs, gbit_s, link_s
from suite.reports.figures import (
    INK,
    MUTED,
    SPREAD,
    Plot,
    Style,
    make_plot,
    range_mark,
    row_axes,
    shared_legend,
)
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
    whole,
    word,
)

NOTE = (
    BOUND_RULE + " The projection executes the engine's own schedule on the links and paces of the run, "
    "with nothing fitted: the time that the pipeline of gathers, blocks and reductions needs by itself. It "
    "exists for the engine; the libraries run on the backend's collectives, which it does not model. "
    + OVERLAP_RULE
)
LIMIT = 0.05


@dataclass(frozen=True)
class Held:
    """A run with the cohort that it stands in, and its projection where there is one."""

    cohort: str
    label: str
    run: Record
    projection: ProjectionRecord | None

    @property
    def name(self) -> str:
        run = self.run
        steps = f", {run.micro_steps} micro-steps" if run.micro_steps > 1 else ""
        return f"{self.cohort} {self.label}, {run.nodes} × {run.ranks_per_node}{steps}"

    @property
    def error(self) -> float | None:
        """Of the projection, relative to the measured step."""
        return self.projection.step_time_s / self.run.step_time_s.median - 1 if self.projection else None


def bounds_section(
    cohorts: Iterable[Cohort], stand_ins: Sequence[ProjectionRecord], styles: Mapping[str, Style]
) -> Section | None:
    found = held(cohorts, stand_ins)
    if not found:
        return None
    projected = [item for item in found if item.projection is not None]
    plots = [_bound_plot(found, styles), *([_error_plot(projected, styles)] if projected else [])]
    return Section("bounds", "Emulated steps against bound and projection", NOTE, (), tuple(plots))


def held(cohorts: Iterable[Cohort], stand_ins: Sequence[ProjectionRecord]) -> list[Held]:
    """Runs on several emulated nodes; the newest projection of each."""
    newest = {_identity(item): item for item in sorted(stand_ins, key=lambda item: item.started_at)}
    return [
        Held(cohort.key, label, run, newest.get((run.config_hash, run.cohort)))
        for cohort in cohorts
        for label, run in zip(cohort.labels, cohort.runs, strict=True)
        if emulated_runs([run]) and bound_s(run)
    ]


def _identity(projection: ProjectionRecord) -> tuple[str, str]:
    stands_for = projection.stands_for or {}
    return stands_for["config_hash"], stands_for["cohort"]


def bound_table(found: Sequence[Held]) -> Table:
    head = (
        "implementation",
        "cohort",
        "nodes",
        "Gbit/s",
        "micro-steps",
        "step, median ms",
        "min–max ms",
        "blocks, ms",
        "link, ms",
        "bound, ms",
        "step ÷ bound",
        "exposed communication, ms",
        "overlapped, %",
        "at best, %",
        "evidence",
    )
    return Table("Steps and bounds", head, tuple(map(_bound_row, found)))


def _bound_row(item: Held) -> tuple[Cell, ...]:
    run, step, bound = item.run, item.run.step_time_s, bound_s(item.run)
    return (
        word(item.label),
        Cell(item.cohort, item.cohort, f"#{item.cohort}"),
        number(run.nodes, whole),
        number(gbit_s(run), "{:g}".format),
        number(run.micro_steps, whole),
        milliseconds(step.median),
        Cell(range_text(1000 * step.min, 1000 * step.max), 1000 * step.min),
        milliseconds(compute_s(run)),
        milliseconds(link_s(run)),
        milliseconds(bound),
        number(step.median / bound if bound else None, "{:.2f}".format),
        milliseconds(run.exposed_comm_s),
        overlap_cell(run),
        best_overlap_cell(run),
        evidence_cell(run),
    )


def _bound_plot(found: Sequence[Held], styles: Mapping[str, Style]) -> Plot:
    """Per micro-step, so that all fit on one scale."""
    impls = sorted({item.run.impl for item in found})

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        _against(left, found, styles, bound_s)
        left.set_xlabel("bound, ms per micro-step")
        left.set_ylabel("step, ms per micro-step")
        _against(right, found, styles, link_s, lambda run: run.exposed_comm_s)
        right.set_xlabel("bytes over link, ms per micro-step")
        right.set_ylabel("exposed, ms per micro-step")
        shared_legend(figure, left)

    worst = max(found, key=_over_bound)
    return make_plot(
        "emulated-bounds",
        "Steps against their lower bound",
        "Emulated, one mark per run on several nodes. Left: the step over its bound (on the line: nothing is "
        "lost). Right: what of the link's time is waited for (on the line: all of it, at 0: none).",
        f"{len(found)} runs of {', '.join(impls)}; furthest above the bound: {worst.name}, × "
        f"{_over_bound(worst):.2f}",
        bound_table(found),
        draw,
        3.4,
    )


def _over_bound(item: Held) -> float:
    return item.run.step_time_s.median / (bound_s(item.run) or float("inf"))


def _against(
    axes: Axes,
    found: Sequence[Held],
    styles: Mapping[str, Style],
    expected: Callable[[Record], float | None],
    seen: Callable[[Record], float | None] = lambda run: run.step_time_s.median,
) -> None:
    """Marks over the line of equality, both axes in ms per micro-step."""
    ends = [0.0]
    for impl in sorted({item.run.impl for item in found}):
        runs = [item.run for item in found if item.run.impl == impl]
        pairs = [(expected(run), seen(run), run.micro_steps) for run in runs]
        points = [(1000 * x / n, 1000 * y / n) for x, y, n in pairs if x is not None and y is not None]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        style = styles[impl]
        axes.plot(xs, ys, style.marker, color=style.colour, markersize=5, fillstyle="none", label=impl)
        ends += [*xs, *ys]
    axes.plot([0, max(ends)], [0, max(ends)], ":", color=INK, linewidth=1)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid()


def projection_table(found: Sequence[Held]) -> Table:
    head = (
        "implementation",
        "cohort",
        "nodes",
        "micro-steps",
        "step, median ms",
        "min–max ms",
        "projected, ms",
        "error, %",
        f"within {LIMIT:.0%}",
        "exposed communication, ms",
        "projected, ms ",
        "sent between nodes per node and step, MiB",
        "projected, MiB",
        "evidence",
    )
    return Table("Emulated and projected", head, tuple(map(_projection_row, found)))


def _projection_row(item: Held) -> tuple[Cell, ...]:
    run, step, projection, error = item.run, item.run.step_time_s, item.projection, item.error
    assert projection is not None and error is not None, "only rows that have one"
    return (
        word(item.label),
        Cell(item.cohort, item.cohort, f"#{item.cohort}"),
        number(run.nodes, whole),
        number(run.micro_steps, whole),
        milliseconds(step.median),
        Cell(range_text(1000 * step.min, 1000 * step.max), 1000 * step.min),
        milliseconds(projection.step_time_s),
        number(100 * error, "{:+.1f}".format),
        word("yes" if abs(error) <= LIMIT else "NO"),
        milliseconds(run.exposed_comm_s),
        milliseconds(projection.exposed_comm_s),
        mebibytes(run.inter_node_bytes_per_node),
        mebibytes(projection.inter_node_bytes_per_node),
        word(f"{run.evidence} | {projection.evidence}"),
    )


def _error_plot(found: Sequence[Held], styles: Mapping[str, Style]) -> Plot:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        row_axes(axes, [item.name for item in found])
        axes.axvspan(-100 * LIMIT, 100 * LIMIT, color=MUTED, alpha=0.15, linewidth=0)
        axes.axvline(0, color=INK, linestyle=":", linewidth=1)
        for row, item in enumerate(found):
            assert item.projection is not None
            projected, step = item.projection.step_time_s, item.run.step_time_s
            errors = [100 * (projected / value - 1) for value in (step.max, step.median, step.min)]
            range_mark(axes, row, (errors[0], errors[1], errors[2]), styles[item.run.impl])
        axes.set_xlabel("projected against measured step, %")

    inside = sum(abs(item.error or 0) <= LIMIT for item in found)
    return make_plot(
        "emulated-projected",
        "Projected against emulated",
        f"Emulated and projected; {inside} of {len(found)} steps within {LIMIT:.0%} (grey band)."
        + SPREAD.format(" of the measured step"),
        "Error of the projection: "
        + "; ".join(f"{item.name} {100 * (item.error or 0):+.1f}%" for item in found),
        projection_table(found),
        draw,
        0.9 + 0.24 * len(found),
    )
