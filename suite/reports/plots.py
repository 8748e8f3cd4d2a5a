"""Figures, each with the table that it shows. Drawn deterministically; readable without colour.

Rows are labelled, curves differ in marker and line style as well as in colour. `floor` is drawn as
the lower bound, a line, never as a competitor.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from suite.records import Record
from suite.reports.cohorts import FLOOR, REFERENCE, Cohort, Ratio
from suite.reports.tables import (
    MIB,
    Cell,
    Table,
    TimeUnit,
    fidelity_table,
    members,
    number,
    rounded,
    whole,
    word,
)

# Okabe and Ito's colours without black and yellow, which vanish on a dark or a light page.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", "h", ">")
LINES = ("-", "--", "-.", ":")
INK = "#24292f"
MUTED = "#7d8590"
PAPER = "#ffffff"

_SPREAD = " Marker: median, line: min to max{}."

WIDTH = 5.6
"""Inches; narrow enough for a phone to show it with legible text."""

_SETTINGS: dict[Any, Any] = {
    "svg.hashsalt": "suite",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelsize": 8.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.6,
    "axes.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "figure.facecolor": PAPER,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8,
    "grid.color": MUTED,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@dataclass(frozen=True)
class Style:
    """How an implementation looks in every figure of a report."""

    colour: str
    marker: str
    line: str


@dataclass(frozen=True)
class Plot:
    """A finished figure. `caption` holds evidence and conditions, `alt` what there is to see."""

    name: str
    title: str
    caption: str
    alt: str
    svg: str
    pdf: bytes
    table: Table

    def save(self, folder: Path) -> None:
        """Writes NAME.svg, NAME.pdf and NAME.csv."""
        (folder / f"{self.name}.svg").write_text(self.svg, encoding="utf-8")
        (folder / f"{self.name}.pdf").write_bytes(self.pdf)
        (folder / f"{self.name}.csv").write_text(self.table.to_csv(), encoding="utf-8")

    def inline(self) -> str:
        """The SVG as a part of an HTML page: its ink follows the page's, its ids are its own."""
        svg = self.svg[self.svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{self.name}-", svg)
        svg = svg.replace(INK, "currentColor").replace(PAPER, "none")
        svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
        svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
        label = f'<title id="{self.name}-alt">{_escape(self.alt)}</title>'
        head, rest = svg.split(">", 1)
        return f'{head} role="img" aria-labelledby="{self.name}-alt">{label}{rest}'


def styles_for(impls: Sequence[str]) -> dict[str, Style]:
    """A look of its own for every implementation of a report."""
    return {
        impl: Style(PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)], LINES[i % len(LINES)])
        for i, impl in enumerate(sorted(set(impls)))
    }


def cohort_plots(cohort: Cohort, styles: Mapping[str, Style]) -> list[Plot]:
    """Every figure of a cohort for which something was measured."""
    if not cohort.runs:
        return []
    plots = [step_time_plot(cohort, styles), samples_plot(cohort, styles)]
    if _references(cohort):
        plots.append(ratio_plot(cohort, styles))
    if any(run.peak_memory_bytes is not None or run.bytes_sent_per_rank is not None for run in cohort.runs):
        plots.append(resources_plot(cohort))
    if any(run.losses for run in cohort.runs):
        plots.append(loss_plot(cohort, styles))
    return plots


def step_time_plot(cohort: Cohort, styles: Mapping[str, Style]) -> Plot:
    """Every timed step, the range, and the median; the floor as a line with its range."""
    unit = TimeUnit.of(cohort)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        _row_axes(axes, cohort.labels)
        for row, run in enumerate(cohort.runs):
            style, step = styles[run.impl], run.step_time_s
            _repetitions(axes, row, [time * unit.per_second for time in run.step_times_s])
            low, middle, high = (value * unit.per_second for value in (step.min, step.median, step.max))
            _range_mark(axes, row, (low, middle, high), style)
        if cohort.floor is not None:
            step = cohort.floor.step_time_s
            axes.axvspan(
                step.min * unit.per_second, step.max * unit.per_second, color=MUTED, alpha=0.18, lw=0
            )
            _floor_line(axes, step.median * unit.per_second, "right")
        axes.set_xlabel(f"step time, {unit.name} (lower is better)")

    numbers = ("median", "min", "max", "p95")
    head = ("implementation", *(f"{name} {unit.name}" for name in numbers), "n", "evidence")

    def cells(label: str, run: Record) -> tuple[Cell, ...]:
        step = run.step_time_s
        values = (number(getattr(step, name) * unit.per_second) for name in numbers)
        return word(label), *values, number(step.n, whole), word(run.evidence)

    return _cohort_plot(
        cohort,
        "step-time",
        "Step time",
        draw,
        Table("Step time", head, _rows(cohort, cells)),
        marks=_SPREAD.format(", dots: single steps"),
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
        _row_axes(axes, cohort.labels)
        for row, run in enumerate(cohort.runs):
            _range_mark(axes, row, speeds(run), styles[run.impl])
        if cohort.floor is not None:
            _floor_line(axes, cohort.floor.samples_per_s, "left")
        axes.set_xlabel("samples/s, all ranks (higher is better)")

    def cells(label: str, run: Record) -> tuple[Cell, ...]:
        low, middle, high = speeds(run)
        return word(label), number(middle), number(low), number(high), word(run.evidence)

    head = ("implementation", "samples/s at the median step", "slowest step", "fastest step", "evidence")
    return _cohort_plot(
        cohort,
        "samples",
        "Throughput",
        draw,
        Table("Throughput", head, _rows(cohort, cells)),
        marks=_SPREAD.format(""),
    )


def ratio_plot(cohort: Cohort, styles: Mapping[str, Style]) -> Plot:
    """Step time over ddp's and over the floor's; a range that crosses 1 is no difference."""
    references = _references(cohort)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(references), sharey=True, squeeze=False)[0]
        for axes, reference in zip(panels, references, strict=True):
            _row_axes(axes, cohort.labels)
            axes.axvline(1, color=INK, linestyle=":", linewidth=1)
            for row, run in enumerate(cohort.runs):
                if run is not reference:
                    ratio = Ratio.of(run, reference)
                    _range_mark(axes, row, (ratio.low, ratio.median, ratio.high), styles[run.impl])
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
    return _cohort_plot(
        cohort,
        "ratio",
        "Step time in proportion",
        draw,
        Table("Ratios", head, rows),
        marks=_SPREAD.format("; a line that crosses 1 is no difference"),
    )


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
            _row_axes(axes, cohort.labels)
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
        return word(label), *(number(_mebibytes(read(run))) for _, read in kinds), word(run.evidence)

    head = ("implementation", *(name for name, _ in kinds), "evidence")
    return _cohort_plot(
        cohort,
        "resources",
        "Memory and bytes sent",
        draw,
        Table("Memory and bytes", head, _rows(cohort, cells)),
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
            for label, run in cohort.others:
                _curve(below, label, _absolute(run.losses, reference.losses), styles[run.impl])
            below.set_yscale("symlog", linthresh=1e-7)
            below.set_ylim(bottom=0)
            below.set_ylabel(f"|difference to {REFERENCE}|")
        for index, (label, run) in enumerate(runs):
            # Curves that coincide hide each other; markers at different steps show that all are there.
            every = (index % len(run.losses), max(1, len(runs) // 2))
            _curve(axes, label, run.losses, styles[run.impl], every)
        axes.set_ylabel("loss")
        figure.axes[-1].set_xlabel("step (warm-up included)")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)

    table = fidelity_table(cohort)
    return _cohort_plot(cohort, "loss", "Loss curves", draw, table, height=4.2 + 0.17 * (len(runs) // 3))


def implementation_plot(impl: str, cohorts: Sequence[Cohort]) -> Plot:
    """One implementation: its timed steps with their median, and its loss curves, per cohort."""
    found = [(cohort.key, run) for cohort in cohorts for _, run in members(cohort) if run.impl == impl]
    styles = styles_for([key for key, _ in found])

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        _row_axes(left, [key for key, _ in found])
        times = [time for _, run in found for time in run.step_times_s]
        if max(times) > 5 * min(times):
            left.set_xscale("log")
            left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            left.xaxis.set_minor_formatter(NullFormatter())
        for row, (key, run) in enumerate(found):
            style, step = styles[key], run.step_time_s
            _repetitions(left, row, run.step_times_s)
            _range_mark(left, row, (step.min, step.median, step.max), style)
        left.set_xlabel("step time, s")
        for key, run in found:
            _curve(right, key, run.losses, styles[key])
        right.set_xlabel("step")
        right.set_ylabel("loss")

    rows = tuple(
        (word(key), number(run.step_time_s.median), number(index, whole), number(seconds), word(run.evidence))
        for key, run in found
        for index, seconds in enumerate(run.step_times_s, 1)
    )
    table = Table("Timed steps", ("cohort", "median s", "repetition", "step time s", "evidence"), rows)
    evidence = ", ".join(sorted({run.evidence for _, run in found}))
    return _plot(
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


def _references(cohort: Cohort) -> list[Record]:
    """What step times are shown in proportion to."""
    reference = cohort.reference if cohort.others else None
    return [record for record in (reference, cohort.floor) if record is not None]


def _rows(cohort: Cohort, cells: Callable[[str, Record], tuple[Cell, ...]]) -> tuple[tuple[Cell, ...], ...]:
    return tuple(cells(label, run) for label, run in members(cohort))


def _row_axes(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def _range_mark(axes: Axes, row: int, spread: tuple[float, float, float], style: Style) -> None:
    """`spread` is (low, middle, high)."""
    low, middle, high = spread
    look: dict[str, Any] = {"markersize": 6, "markeredgecolor": PAPER, "markeredgewidth": 0.6}
    axes.plot([low, high], [row, row], color=style.colour, linewidth=1.6, solid_capstyle="butt")
    axes.plot([middle], [row], style.marker, color=style.colour, **look)


def _floor_line(axes: Axes, value: float, side: str) -> None:
    """The bound, named at its top on the `left` or `right` of the line."""
    axes.axvline(value, color=INK, linestyle=":", linewidth=1)
    place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    offset, ha = ((2, 2), "left") if side == "right" else ((-2, 2), "right")
    axes.annotate(FLOOR, (value, 1), xytext=offset, ha=ha, fontsize=8, **place)


def _repetitions(axes: Axes, row: int, times: Sequence[float]) -> None:
    """Every timed step, just below its row."""
    axes.plot(times, [row + 0.3] * len(times), ".", color=MUTED, markersize=2.5)


def _curve(
    axes: Axes, label: str, values: Sequence[float], style: Style, every: tuple[int, int] = (0, 1)
) -> None:
    # A loss that is no number is None in a record; drawn as a gap.
    points = [float("nan") if value is None else value for value in values]
    axes.plot(
        range(1, len(points) + 1),
        points,
        style.line,
        color=style.colour,
        marker=style.marker,
        markersize=4,
        markevery=every,
        label=label,
    )
    axes.grid(axis="y")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _absolute(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    pairs = zip(ours, theirs, strict=False)
    return [float("nan") if a is None or b is None else abs(a - b) for a, b in pairs]


def _mebibytes(value: int | None) -> float | None:
    return None if value is None else value / MIB


def _cohort_plot(
    cohort: Cohort,
    kind: str,
    title: str,
    draw: Callable[[Figure], None],
    table: Table,
    height: float | None = None,
    marks: str = "",
) -> Plot:
    best = "; ".join(f"{row[0].text} {row[1].text}" for row in table.rows)
    return _plot(
        name=f"{cohort.key.lower()}-{kind}",
        title=title,
        caption=f"{cohort.key}: {cohort.title}. {cohort.conditions}{marks}",
        alt=f"{title}, {table.head[1]}: {best}",
        table=table,
        draw=draw,
        height=height or 0.8 + 0.27 * len(cohort.runs),
    )


def _plot(
    name: str, title: str, caption: str, alt: str, table: Table, draw: Callable[[Figure], None], height: float
) -> Plot:
    with matplotlib.rc_context(_SETTINGS):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        draw(figure)
        svg, pdf = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None})
        figure.savefig(pdf, format="pdf", metadata={"CreationDate": None})
    return Plot(name, title, caption, alt, svg.getvalue(), pdf.getvalue(), table)


def _escape(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
