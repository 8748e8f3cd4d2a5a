"""Everything that was measured of one implementation, over all cohorts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from suite.records import AnyRecord
from suite.reports.cohorts import FLOOR, Cohort, checks_of, runs_of
from suite.reports.descriptions import Description
from suite.reports.figures import Plot, draw_curve, make_plot, range_mark, repetitions, row_axes, styles_for
from suite.reports.sections.bounds import bound_table, held
from suite.reports.sections.correctness import correctness_table
from suite.reports.sections.timelines import all_ranks_plot, shown_cohorts
from suite.reports.tables import (
    NOTHING,
    Cell,
    SpeedUnit,
    Table,
    TimeUnit,
    evidence_cell,
    mebibytes,
    members,
    number,
    range_text,
    ratio_cell,
    rounded,
    whole,
    word,
)
from suite.reports.timelines import Timeline


@dataclass(frozen=True)
class ImplSection:
    """An implementation with everything that is shown of it."""

    description: Description
    table: Table
    emulated: Table
    checks: Table
    plots: tuple[Plot, ...]


def impl_section(
    description: Description,
    records: Sequence[AnyRecord],
    cohorts: Sequence[Cohort],
    timelines: Sequence[Timeline],
) -> ImplSection:
    name = description.name
    plots = [implementation_plot(name, cohorts)] if any(run.impl == name for run in runs_of(records)) else []
    step = all_ranks_plot(name, shown_cohorts(cohorts, timelines))
    return ImplSection(
        description,
        implementation_table(name, cohorts),
        bound_table([item for item in held(cohorts, ()) if item.run.impl == name]),
        correctness_table(check for check in checks_of(records) if check.impl == name),
        tuple([*plots, *([step] if step else [])]),
    )


def implementation_table(impl: str, cohorts: Sequence[Cohort]) -> Table:
    """Everything measured of one implementation, a row per cohort."""
    rows = []
    for cohort in cohorts:
        time, speed = TimeUnit.of(cohort), SpeedUnit.of(cohort)
        for label, run in members(cohort):
            if run.impl != impl:
                continue
            step = run.step_time_s
            rows.append(
                (
                    word(f"{cohort.key} {cohort.title}" + (f", {label}" if label != impl else "")),
                    Cell(f"{rounded(step.median * time.per_second)} {time.name}", step.median),
                    Cell(
                        f"{range_text(step.min * time.per_second, step.max * time.per_second)} {time.name}",
                        step.min,
                    ),
                    number(step.n, whole),
                    number(run.samples_per_s),
                    Cell(
                        f"{rounded(run.model_tflops_per_gpu * speed.per_tflops)} {speed.name}",
                        run.model_tflops_per_gpu,
                    ),
                    ratio_cell(run, cohort.reference) if run.impl != FLOOR else Cell(NOTHING),
                    mebibytes(run.peak_memory_bytes),
                    mebibytes(run.bytes_sent_per_rank),
                    evidence_cell(run),
                )
            )
    head = (
        "cohort",
        "step, median",
        "min–max",
        "n",
        "samples/s",
        "model speed per rank",
        "step ÷ ddp",
        "peak memory, MiB",
        "sent per step, MiB",
        "evidence",
    )
    return Table(impl, head, tuple(rows))


def implementation_plot(impl: str, cohorts: Sequence[Cohort]) -> Plot:
    """One implementation: its timed steps with their median, and its loss curves, per cohort."""
    found = [(cohort.key, run) for cohort in cohorts for _, run in members(cohort) if run.impl == impl]
    styles = styles_for([key for key, _ in found])

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        row_axes(left, [key for key, _ in found])
        times = [time for _, run in found for time in run.step_times_s]
        if max(times) > 5 * min(times):
            left.set_xscale("log")
            left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            left.xaxis.set_minor_formatter(NullFormatter())
        for row, (key, run) in enumerate(found):
            style, step = styles[key], run.step_time_s
            repetitions(left, row, run.step_times_s)
            range_mark(left, row, (step.min, step.median, step.max), style)
        left.set_xlabel("step time, s")
        for key, run in found:
            draw_curve(right, key, run.losses, styles[key])
        right.set_xlabel("step")
        right.set_ylabel("loss")

    rows = tuple(
        (word(key), number(run.step_time_s.median), number(index, whole), number(seconds), word(run.evidence))
        for key, run in found
        for index, seconds in enumerate(run.step_times_s, 1)
    )
    table = Table("Timed steps", ("cohort", "median s", "repetition", "step time s", "evidence"), rows)
    evidence = ", ".join(sorted({run.evidence for _, run in found}))
    return make_plot(
        name=f"impl-{impl}",
        title=f"{impl}: timed steps and loss curves",
        caption=f"{evidence.capitalize()}; a row and a curve per cohort; marker: median, line: min to max, "
        "dots: single steps.",
        alt=f"Step times of {impl}: "
        + "; ".join(f"{key} median {run.step_time_s.median:.3g} s" for key, run in found),
        table=table,
        draw=draw,
        height=max(2.0, 0.9 + 0.27 * len(found)),
    )
