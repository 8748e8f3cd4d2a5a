"""Step time and throughput of the members of a cohort, with their spread and in proportion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from suite.records import Record
from suite.reports.cohorts import Cohort, Ratio
from suite.reports.figures import (
    INK,
    MUTED,
    SPREAD,
    Plot,
    Style,
    cohort_plot,
    floor_line,
    range_mark,
    repetitions,
    row_axes,
)
from suite.reports.tables import (
    NOTHING,
    Cell,
    SpeedUnit,
    Table,
    TimeUnit,
    evidence_cell,
    number,
    per_run,
    percent,
    range_text,
    ratio_cell,
    rounded,
    rows_of,
    whole,
    word,
)


def throughput_table(cohort: Cohort) -> Table:
    """The main table: step time with its spread, throughput, and ratios to ddp and to the floor."""
    time, speed = TimeUnit.of(cohort), SpeedUnit.of(cohort)
    recomputing = any(run.hardware_tflops_per_gpu != run.model_tflops_per_gpu for run in cohort.members)
    has_peak = any(run.mfu is not None for run in cohort.members)
    head = (
        "implementation",
        f"step, median {time.name}",
        f"min–max {time.name}",
        f"p95 {time.name}",
        "n",
        "samples/s",
        f"model {speed.name} per rank",
        *((f"hardware {speed.name} per rank",) if recomputing else ()),
        *(("MFU %",) if has_peak else ()),
        *(("HFU %",) if has_peak and recomputing else ()),
        "step ÷ ddp",
        "step ÷ floor",
        "evidence",
    )

    def row(label: str, run: Record) -> tuple[Cell, ...]:
        step = run.step_time_s
        return (
            word(label),
            number(step.median * time.per_second),
            Cell(
                range_text(step.min * time.per_second, step.max * time.per_second), step.min * time.per_second
            ),
            number(step.p95 * time.per_second),
            number(step.n, whole),
            number(run.samples_per_s),
            number(run.model_tflops_per_gpu * speed.per_tflops),
            *((number(run.hardware_tflops_per_gpu * speed.per_tflops),) if recomputing else ()),
            *((percent(run.mfu),) if has_peak else ()),
            *((percent(run.hfu),) if has_peak and recomputing else ()),
            ratio_cell(run, cohort.reference) if run is not cohort.floor else Cell(NOTHING),
            ratio_cell(run, cohort.floor),
            evidence_cell(run),
        )

    return Table("Step time and throughput", head, per_run(cohort, row))


def brief_table(cohort: Cohort) -> Table:
    """The main table, narrow enough for a terminal."""
    time, speed = TimeUnit.of(cohort), SpeedUnit.of(cohort)
    has_peak = any(run.mfu is not None for run in cohort.members)

    def row(label: str, run: Record) -> tuple[Cell, ...]:
        step = run.step_time_s
        middle = step.median * time.per_second
        spread = range_text(step.min * time.per_second, step.max * time.per_second)
        return (
            word(label),
            Cell(f"{rounded(middle)} ({spread})", middle),
            number(run.samples_per_s),
            number(run.model_tflops_per_gpu * speed.per_tflops),
            *((percent(run.mfu),) if has_peak else ()),
            ratio_cell(run, cohort.reference, "≈ {}") if run is not cohort.floor else Cell(NOTHING),
            evidence_cell(run),
        )

    mfu = ("MFU %",) if has_peak else ()
    head = ("implementation", f"step {time.name} (range)", "samples/s", speed.name, *mfu, "÷ ddp", "evidence")
    return Table(f"{cohort.key} {cohort.title}", head, per_run(cohort, row))


def overview_table(cohorts: Sequence[Cohort]) -> Table:
    """Step time over ddp's: implementations down, cohorts across."""
    with_reference = [cohort for cohort in cohorts if cohort.reference is not None]
    labels = sorted({label for cohort in with_reference for label in cohort.labels})

    def cell(cohort: Cohort, label: str) -> Cell:
        if label not in cohort.labels:
            return Cell(NOTHING)
        return ratio_cell(cohort.runs[cohort.labels.index(label)], cohort.reference)

    rows = tuple((word(label), *(cell(cohort, label) for cohort in with_reference)) for label in labels)
    head = ("implementation", *(_short(cohort) for cohort in with_reference))
    return Table("Step time over that of ddp", head, rows)


def _short(cohort: Cohort) -> str:
    run = cohort.any
    micro_steps = "micro-step" if run.micro_steps == 1 else "micro-steps"
    return f"{cohort.key}: {run.workload}, {run.precision}, {run.micro_steps} {micro_steps}"


def step_time_plot(cohort: Cohort, styles: Mapping[str, Style]) -> Plot:
    """Every timed step, the range, and the median; the floor as a line with its range."""
    unit = TimeUnit.of(cohort)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        row_axes(axes, cohort.labels)
        for row, run in enumerate(cohort.runs):
            style, step = styles[run.impl], run.step_time_s
            repetitions(axes, row, [time * unit.per_second for time in run.step_times_s])
            low, middle, high = (value * unit.per_second for value in (step.min, step.median, step.max))
            range_mark(axes, row, (low, middle, high), style)
        if cohort.floor is not None:
            step = cohort.floor.step_time_s
            axes.axvspan(
                step.min * unit.per_second, step.max * unit.per_second, color=MUTED, alpha=0.18, lw=0
            )
            floor_line(axes, step.median * unit.per_second, "right")
        axes.set_xlabel(f"step time, {unit.name} (lower is better)")

    numbers = ("median", "min", "max", "p95")
    head = ("implementation", *(f"{name} {unit.name}" for name in numbers), "n", "evidence")

    def cells(label: str, run: Record) -> tuple[Cell, ...]:
        step = run.step_time_s
        values = (number(getattr(step, name) * unit.per_second) for name in numbers)
        return word(label), *values, number(step.n, whole), word(run.evidence)

    return cohort_plot(
        cohort,
        "step-time",
        "Step time",
        draw,
        Table("Step time", head, rows_of(cohort, cells)),
        marks=SPREAD.format(", dots: single steps"),
    )


def samples_plot(cohort: Cohort, styles: Mapping[str, Style]) -> Plot:
    """Throughput of all ranks together."""

    def speeds(run: Record) -> tuple[float, float, float]:
        # samples_per_s belongs to the median step; the extremes follow from the step times.
        step = run.step_time_s
        samples = run.samples_per_s * step.median
        return samples / step.max, run.samples_per_s, samples / step.min

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        row_axes(axes, cohort.labels)
        for row, run in enumerate(cohort.runs):
            range_mark(axes, row, speeds(run), styles[run.impl])
        if cohort.floor is not None:
            floor_line(axes, cohort.floor.samples_per_s, "left")
        axes.set_xlabel("samples/s, all ranks (higher is better)")

    def cells(label: str, run: Record) -> tuple[Cell, ...]:
        low, middle, high = speeds(run)
        return word(label), number(middle), number(low), number(high), word(run.evidence)

    head = ("implementation", "samples/s at the median step", "slowest step", "fastest step", "evidence")
    return cohort_plot(
        cohort,
        "samples",
        "Throughput",
        draw,
        Table("Throughput", head, rows_of(cohort, cells)),
        marks=SPREAD.format(""),
    )


def ratio_plot(cohort: Cohort, styles: Mapping[str, Style]) -> Plot:
    """Step time over ddp's and over the floor's; a range that crosses 1 is no difference."""
    references = references_of(cohort)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(references), sharey=True, squeeze=False)[0]
        for axes, reference in zip(panels, references, strict=True):
            row_axes(axes, cohort.labels)
            axes.axvline(1, color=INK, linestyle=":", linewidth=1)
            for row, run in enumerate(cohort.runs):
                if run is not reference:
                    ratio = Ratio.of(run, reference)
                    range_mark(axes, row, (ratio.low, ratio.median, ratio.high), styles[run.impl])
            axes.set_xlabel(f"step time ÷ {reference.impl}")

    def cells(label: str, run: Record) -> tuple[Cell, ...]:
        values: list[Cell] = [word(label)]
        for reference in references:
            ratio = Ratio.of(run, reference)
            differs = "difference" if ratio.differs else "no difference"
            values += [number(ratio.median), number(ratio.low), number(ratio.high), word(differs)]
        return (*values, word(run.evidence))

    names = ("median ÷ {}", "low ÷ {}", "high ÷ {}", "against {}")
    head = ("implementation", *(name.format(item.impl) for item in references for name in names), "evidence")
    rows = tuple(cells(label, run) for label, run in zip(cohort.labels, cohort.runs, strict=True))
    return cohort_plot(
        cohort,
        "ratio",
        "Step time in proportion",
        draw,
        Table("Ratios", head, rows),
        marks=SPREAD.format("; a line that crosses 1 is no difference"),
    )


def references_of(cohort: Cohort) -> list[Record]:
    """What step times are shown in proportion to."""
    reference = cohort.reference if cohort.others else None
    return [record for record in (reference, cohort.floor) if record is not None]
