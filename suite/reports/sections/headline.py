"""MiCS against every other system on the most nodes of a slow network, and what the difference is made of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from matplotlib.figure import Figure

from suite.records import Record
from suite.reports.cohorts import Cohort
from suite.reports.emulated import OVERLAP_RULE, emulated_runs, gbit_s, link_s
from suite.reports.figures import INK, SPREAD, Plot, Style, make_plot, range_mark, row_axes
from suite.reports.judges.headline import MICS, PUBLISHED_RATIO, RIVALS, SLOW_GBIT_S
from suite.reports.judges.pairs import SLOWER_RULE, Pair, as_it_is
from suite.reports.sections.section import Section
from suite.reports.sections.step_parts import step_parts_plot
from suite.reports.tables import (
    NOTHING,
    Cell,
    Table,
    best_overlap_cell,
    evidence_cell,
    milliseconds,
    number,
    overlap_cell,
    range_text,
    word,
)

OWN = ("zero3", "zero3-unoptimized")
NOTE = (
    f"Step time of the others over that of {MICS}, as they run on this backend, on the most nodes at no "
    f"more than {SLOW_GBIT_S} Gbit/s each. Libraries overlap as far as they can on the CPU: how far each "
    "did stands beside its number. Comparisons of methods are therefore those with the engine's own "
    f"variants ({' and '.join(OWN)}). {SLOWER_RULE} {OVERLAP_RULE}"
)
STOCK = "stock_collectives"


@dataclass(frozen=True)
class Headline:
    """A cohort with MiCS as it is; `stock` is MiCS on the backend's own collectives, where it was run."""

    cohort: Cohort
    mics: Record
    stock: Record | None

    @property
    def rivals(self) -> list[tuple[str, Record]]:
        """Label and run, slowest first."""
        members = zip(self.cohort.labels, self.cohort.runs, strict=True)
        return [(label, run) for label, run in members if run not in (self.mics, self.stock)][::-1]


def headline_section(cohorts: Iterable[Cohort], styles: Mapping[str, Style]) -> Section | None:
    found = headlines(cohorts)
    if not found:
        return None
    plots = [plot for item in found for plot in (_ratio_plot(item, styles), step_parts_plot(item.cohort))]
    findings = [sentence for item in found for sentence in _sentences(item)]
    return Section("headline", "MiCS against the others", NOTE, (), tuple(plots), tuple(findings))


def headlines(cohorts: Iterable[Cohort]) -> list[Headline]:
    """Per number of micro-steps and cluster the cohort of the most nodes, and of those the one that comes
    closest to the published bandwidth and has the most rivals."""
    largest: dict[tuple[int, str], Headline] = {}
    for item in filter(None, map(_headline, cohorts)):
        key = (item.mics.micro_steps, item.mics.config["cluster"]["name"])
        if key not in largest or _size(largest[key]) < _size(item):
            largest[key] = item
    return list(largest.values())


def _size(item: Headline) -> tuple[int, float, int]:
    return item.mics.nodes, gbit_s(item.mics), len(item.rivals)


def _headline(cohort: Cohort) -> Headline | None:
    mics = next((run for run in emulated_runs(cohort.runs) if as_it_is(MICS)(run)), None)
    if mics is None or gbit_s(mics) > SLOW_GBIT_S:
        return None
    stock = next((item for item in cohort.runs if item.impl == MICS and _is_stock(item)), None)
    item = Headline(cohort, mics, stock)
    return item if any(rival.impl in RIVALS for _, rival in item.rivals) else None


def _is_stock(run: Record) -> bool:
    return (run.config["impl"].get("options") or {}).get(STOCK) is True


def headline_table(item: Headline) -> Table:
    head = (
        "implementation",
        f"step ÷ {MICS}",
        "round by round",
        "verdict",
        *((f"step ÷ {MICS} on the backend's own collectives",) if item.stock else ()),
        "step, median ms",
        "min–max ms",
        "exposed communication, ms",
        "overlapped, %",
        "at best, %",
        "link busy at least, ms",
        f"exposed at × {PUBLISHED_RATIO} would be, ms",
        "evidence",
    )
    rows = [_row(item, label, run) for label, run in [*item.rivals, (MICS, item.mics)]]
    if item.stock is not None:
        rows.append(_row(item, f"{MICS} ({STOCK})", item.stock))
    return Table(f"{item.cohort.key}: against {MICS}", head, tuple(rows))


def _row(item: Headline, label: str, run: Record) -> tuple[Cell, ...]:
    pair, step = Pair(item.mics, run), run.step_time_s
    ratios, itself = sorted(pair.ratios), run is item.mics
    return (
        word(label),
        number(pair.ratio, "{:.2f}".format),
        Cell(NOTHING) if itself or not ratios else Cell(range_text(ratios[0], ratios[-1]), ratios[0]),
        word(None if itself else _verdict(pair)),
        *((number(Pair(item.stock, run).ratio, "{:.2f}".format),) if item.stock else ()),
        milliseconds(step.median),
        Cell(range_text(1000 * step.min, 1000 * step.max), 1000 * step.min),
        milliseconds(run.exposed_comm_s),
        overlap_cell(run),
        best_overlap_cell(run),
        milliseconds(link_s(run)),
        milliseconds(_exposed_needed(item, run) if run.impl in RIVALS else None),
        evidence_cell(run),
    )


def _verdict(pair: Pair) -> str:
    if pair.slower:
        return "slower"
    return "faster" if Pair(pair.off, pair.on).slower else "no significant difference"


def _exposed_needed(item: Headline, run: Record) -> float | None:
    """How long this rival would have to wait for messages to reach the published ratio."""
    if run.exposed_comm_s is None:
        return None
    return run.exposed_comm_s + PUBLISHED_RATIO * item.mics.step_time_s.median - run.step_time_s.median


def _sentences(item: Headline) -> Iterable[str]:
    for label, run in item.rivals:
        if run.impl not in (*RIVALS, *OWN):
            continue
        pair = Pair(item.mics, run)
        place = f"{run.nodes} nodes, {run.micro_steps} micro-step{'s' if run.micro_steps > 1 else ''}"
        ratio = f"× {pair.ratio:.2f} the step of {MICS} ({_verdict(pair)})"
        yield f"{item.cohort.key}, {place}: {label} takes {ratio}{_explanation(item, run, pair.ratio)}."


def _explanation(item: Headline, run: Record, ratio: float) -> str:
    """Which part of the step the difference is, and what is missing to the published ratio."""
    if run.exposed_comm_s is None or item.mics.exposed_comm_s is None:
        return ""
    waits = 1000 * run.exposed_comm_s, 1000 * item.mics.exposed_comm_s
    apart = 1000 * (run.step_time_s.median - item.mics.step_time_s.median)
    text = f"; it waits {waits[0]:.0f} ms for messages, {MICS} {waits[1]:.0f} ms, of {apart:+.0f} ms in all"
    needed = _exposed_needed(item, run)
    if run.impl in RIVALS and ratio < PUBLISHED_RATIO and needed is not None:
        text += (
            f". The published × {PUBLISHED_RATIO} would need {1000 * needed:.0f} ms of waiting: what is "
            f"missing is exposed communication, {1000 * needed / waits[0]:.1f} times as much as there is here"
        )
    return text


def _ratio_plot(item: Headline, styles: Mapping[str, Style]) -> Plot:
    rows = item.rivals

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        row_axes(axes, [label for label, _ in rows])
        for row, (_, run) in enumerate(rows):
            pair = Pair(item.mics, run)
            ratios = sorted(pair.ratios) or [pair.ratio]
            range_mark(axes, row, (ratios[0], pair.ratio, ratios[-1]), styles[run.impl])
        for value, name, side in ((1.0, MICS, "left"), (PUBLISHED_RATIO, "published, up to", "right")):
            axes.axvline(value, color=INK, linestyle=":", linewidth=1)
            place: dict[str, Any] = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
            axes.annotate(name, (value, 1), xytext=(0, 2), ha=side, fontsize=8, **place)
        axes.set_xlim(left=0.9 * min(1.0, *(Pair(item.mics, run).ratio for _, run in rows)))
        axes.set_xlabel(f"step time ÷ {MICS} (to the right: {MICS} is faster)")

    return make_plot(
        f"{item.cohort.key.lower()}-headline",
        f"Step time over that of {MICS}",
        f"{item.cohort.key}: {item.cohort.title}. "
        f"{item.cohort.conditions}{SPREAD.format(', round by round')}",
        "; ".join(f"{label} {Pair(item.mics, run).ratio:.2f}" for label, run in rows),
        headline_table(item),
        draw,
        1.0 + 0.27 * len(rows),
    )
