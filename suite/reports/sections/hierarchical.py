"""Partition groups over several nodes: collectives in two stages against flat ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from suite.records import Record
from suite.reports.cohorts import Cohort
from suite.reports.emulated import BOUND_RULE, bound_s, is_emulated
from suite.reports.figures import INK, PALETTE, Plot, Style, make_plot, range_mark, row_axes
from suite.reports.judges.pairs import Pair, as_it_is, options_of, pairs
from suite.reports.judges.partition_groups import MICS
from suite.reports.sections.section import Section
from suite.reports.tables import (
    MIB,
    Cell,
    Table,
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
    "The same training with partition groups that span nodes: each shard crosses into a node once "
    "(hierarchical), or shards pass through every node of a ring (flat). Bytes between nodes are counted by "
    "the kernel and predicted by the topology. " + BOUND_RULE
)
BYTES_LIMIT = 0.01
LOOKS = {True: Style(PALETTE[0], "o", "-"), False: Style(PALETTE[1], "s", "--")}


@dataclass(frozen=True)
class Variant:
    """One side of a pair, as a row."""

    run: Record
    hierarchical: bool

    @property
    def nodes(self) -> float:
        """That a partition group spans."""
        return (self.run.partition_size or self.run.world_size) / self.run.ranks_per_node

    @property
    def label(self) -> str:
        return f"{self.nodes:g} nodes, {'hierarchical' if self.hierarchical else 'flat'}"


def hierarchical_section(cohorts: Iterable[Cohort]) -> Section | None:
    found = [(cohort, both) for cohort in cohorts if (both := hierarchical_pairs(cohort.runs))]
    if not found:
        return None
    plots = tuple(_plot(cohort, both) for cohort, both in found)
    findings = tuple(_sentence(cohort, pair) for cohort, both in found for pair in both)
    return Section("hierarchical", "Hierarchical collectives", NOTE, (), plots, findings)


def hierarchical_pairs(runs: Sequence[Record]) -> list[Pair]:
    """`on` hierarchical, `off` flat, the smallest groups first."""
    found = [
        pair
        for pair in pairs([run for run in runs if is_emulated(run)], as_it_is(MICS), _is_flat)
        if pair.on.partition_size == pair.off.partition_size
        and (pair.on.partition_size or 0) > pair.on.ranks_per_node
    ]
    return sorted(found, key=lambda pair: pair.on.partition_size or 0)


def _is_flat(run: Record) -> bool:
    return run.impl == MICS and options_of(run) == {"hierarchical": False}


def _variants(found: Sequence[Pair]) -> list[Variant]:
    return [Variant(run, run is pair.on) for pair in found for run in (pair.on, pair.off)]


def hierarchical_table(title: str, found: Sequence[Pair]) -> Table:
    head = (
        "partition group",
        "ranks",
        "counted, MiB per node and step",
        "predicted, MiB",
        "difference, %",
        "within 1%",
        "step, median ms",
        "min–max ms",
        "bound, ms",
        "step ÷ bound",
        "exposed communication, ms",
        "overlapped, %",
        "evidence",
    )
    return Table(title, head, tuple(_row(item) for item in _variants(found)))


def _row(item: Variant) -> tuple[Cell, ...]:
    run, step, bound = item.run, item.run.step_time_s, bound_s(item.run)
    off = _off(run)
    return (
        word(item.label),
        number(run.partition_size, whole),
        mebibytes(run.inter_node_bytes_per_node),
        mebibytes(_predicted(run)),
        number(None if off is None else 100 * off, "{:+.2f}".format),
        word(None if off is None else "yes" if abs(off) <= BYTES_LIMIT else "NO"),
        milliseconds(step.median),
        Cell(range_text(1000 * step.min, 1000 * step.max), 1000 * step.min),
        milliseconds(bound),
        number(step.median / bound if bound else None, "{:.2f}".format),
        milliseconds(run.exposed_comm_s),
        overlap_cell(run),
        evidence_cell(run),
    )


def _predicted(run: Record) -> float | None:
    return run.details.get("expected_inter_node_bytes")


def _off(run: Record) -> float | None:
    """Counted against predicted bytes, relative."""
    predicted = _predicted(run)
    counted = run.inter_node_bytes_per_node
    return counted / predicted - 1 if predicted and counted is not None else None


def _sentence(cohort: Cohort, pair: Pair) -> str:
    on, off = (item.inter_node_bytes_per_node or 0 for item in (pair.on, pair.off))
    fewer = f"{1 - on / off:.0%} fewer bytes between nodes" if off else "bytes not counted"
    change = "faster" if pair.slower else "no significant difference in time"
    return (
        f"{cohort.key}, groups over {Variant(pair.on, True).nodes:g} nodes: hierarchical collectives send "
        f"{fewer}; a step takes 1/{pair.ratio:.2f} of a flat one's ({change})."
    )


def _plot(cohort: Cohort, found: Sequence[Pair]) -> Plot:
    rows = _variants(found)

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2, sharey=True)
        row_axes(left, [item.label for item in rows])
        for row, item in enumerate(rows):
            _draw_bytes(left, row, item)
            _draw_time(right, row, item)
        left.set_xlim(left=0)
        left.set_xlabel("MiB per node and step")
        right.set_xlabel("step time, ms")
        right.tick_params(axis="y", length=0)
        right.spines["left"].set_visible(False)
        right.grid(axis="x")

    return make_plot(
        f"{cohort.key.lower()}-hierarchical",
        "Hierarchical against flat collectives",
        f"{cohort.key}: {cohort.title}. {cohort.conditions} Left, bars: counted bytes, hatched where flat; "
        "tick: predicted. Right, marker: median, line: min to max; vertical tick: the bound.",
        "; ".join(f"{item.label} {1000 * item.run.step_time_s.median:.0f} ms" for item in rows),
        hierarchical_table(f"{cohort.key}: hierarchical and flat", found),
        draw,
        1.0 + 0.3 * len(rows),
    )


def _draw_bytes(axes: Axes, row: int, item: Variant) -> None:
    colour = LOOKS[item.hierarchical].colour
    look: dict[str, Any] = {"height": 0.5, "edgecolor": colour, "linewidth": 0.6}
    look |= {"color": colour, "alpha": 0.75} if item.hierarchical else {"hatch": "////", "fill": False}
    axes.barh(row, (item.run.inter_node_bytes_per_node or 0) / MIB, **look)
    predicted = _predicted(item.run)
    if predicted:
        axes.plot([predicted / MIB] * 2, [row - 0.38, row + 0.38], color=INK, linewidth=1.4)


def _draw_time(axes: Axes, row: int, item: Variant) -> None:
    step, bound = item.run.step_time_s, bound_s(item.run)
    range_mark(axes, row, (1000 * step.min, 1000 * step.median, 1000 * step.max), LOOKS[item.hierarchical])
    if bound is not None:
        axes.plot([1000 * bound] * 2, [row - 0.3, row + 0.3], color=INK, linewidth=1.4)
