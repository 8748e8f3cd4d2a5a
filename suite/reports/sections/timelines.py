"""Pictures of a step: what a rank did when, for implementations side by side and for all ranks of one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from suite.records import Record
from suite.reports.cohorts import Cohort
from suite.reports.emulated import gbit_s
from suite.reports.figures import INK, MUTED, PALETTE, Plot, make_plot
from suite.reports.judges.headline import SLOW_GBIT_S
from suite.reports.sections.section import Section
from suite.reports.tables import Cell, Table, milliseconds, number, whole, word
from suite.reports.timelines import LOGGED, RankTrack, Timeline, Traced, traced

NOTE = (
    "The last timed step of each run: blocks' modelled compute on the training thread, what the engine "
    "gathers, reduces and waits for, and how busy the link out of the node was, mean between two readings. "
    "Libraries log no messages: where they do not compute they wait or do the host's own work, and the link "
    "shows when their bytes leave. Each trace opens in ui.perfetto.dev, with all ranks."
)
MOST_MICRO_STEPS = 4
"""Beyond it a picture of a step is a grey bar."""
MOST_RANKS = 8
IDLE = "not computing"
LOOKS: dict[str, dict[str, Any]] = {
    "compute": {"facecolor": PALETTE[0], "edgecolor": "white", "linewidth": 0.4},
    "wait": {"facecolor": "none", "edgecolor": PALETTE[1], "hatch": "/////", "linewidth": 0.6},
    "gather": {"facecolor": PALETTE[5], "edgecolor": INK, "linewidth": 0.3},
    "reduce": {"facecolor": "none", "edgecolor": PALETTE[3], "hatch": ".....", "linewidth": 0.6},
    IDLE: {"facecolor": "none", "edgecolor": MUTED, "hatch": "\\\\\\\\", "linewidth": 0.4},
}


def timelines_section(cohorts: Iterable[Cohort], timelines: Sequence[Timeline]) -> Section | None:
    shown = shown_cohorts(cohorts, timelines)
    if not shown:
        return None
    plots = tuple(_side_by_side(cohort, found) for cohort, found in shown)
    return Section("timelines", "Timelines", NOTE, (), plots)


def shown_cohorts(
    cohorts: Iterable[Cohort], timelines: Sequence[Timeline]
) -> list[tuple[Cohort, list[Traced]]]:
    """Of each stage the cohort on most nodes, with few micro-steps and closest to the published network."""
    best: dict[str, tuple[Cohort, list[Traced]]] = {}
    for cohort in cohorts:
        found = traced(cohort, timelines)
        if not found or cohort.any.nodes < 2 or cohort.any.micro_steps > MOST_MICRO_STEPS:
            continue
        stage = cohort.any.stage
        if stage not in best or _telling(cohort.any) > _telling(best[stage][0].any):
            best[stage] = (cohort, found)
    return list(best.values())


def _telling(run: Record) -> tuple[float, ...]:
    return run.nodes, -abs(gbit_s(run) - SLOW_GBIT_S), -run.micro_steps


def all_ranks_plot(impl: str, shown: Iterable[tuple[Cohort, list[Traced]]]) -> Plot | None:
    """Every rank of one implementation, in the first of these cohorts that has it."""
    for cohort, found in shown:
        for item in found:
            if item.run.impl == impl:
                return _all_ranks(cohort, item)
    return None


def _side_by_side(cohort: Cohort, found: Sequence[Traced]) -> Plot:
    """Rank 0 of each run on a common axis."""
    end = max(item.timeline.end for item in found)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(found), 1, sharex=True, squeeze=False)[:, 0]
        for axes, item in zip(panels, found, strict=True):
            _draw_lanes(axes, item.timeline.ranks[0])
            axes.set_title(item.label, fontsize=8, fontweight="normal", pad=2)
        panels[-1].set_xlim(0, end)
        panels[-1].set_xlabel("ms from the begin of the step")
        _legend(figure)

    return make_plot(
        f"{cohort.key.lower()}-timeline",
        "One step of rank 0",
        f"{cohort.key}: {cohort.title}. Emulated; the lowest lane of each is the link out of the node, full "
        "height: busy.",
        "One step: " + "; ".join(f"{item.label} {item.timeline.end:.0f} ms" for item in found),
        timeline_table(found),
        draw,
        0.9 + 0.62 * len(found),
    )


def timeline_table(found: Sequence[Traced]) -> Table:
    head = (
        "implementation",
        "rank",
        "computing, ms",
        "waiting as logged, ms",
        "gather under way, ms",
        "reduction under way, ms",
        "step, median ms",
        "trace",
        "evidence",
    )
    rows = [
        _row(item, rank, track)
        for item in found
        for rank, track in enumerate(item.timeline.ranks[:MOST_RANKS])
    ]
    return Table("Traced steps", head, tuple(rows))


def _row(item: Traced, rank: int, track: RankTrack) -> tuple[Cell, ...]:
    times = [track.total(kind) if track.has_messages else None for kind in LOGGED]
    return (
        word(item.label),
        number(rank, whole),
        number(track.total("compute")),
        *(number(value) for value in times),
        milliseconds(item.run.step_time_s.median),
        Cell(item.timeline.file.name, item.timeline.file.name, item.timeline.link),
        word(item.run.evidence),
    )


def _draw_lanes(axes: Axes, track: RankTrack) -> None:
    """From the top: the training thread, gathers, reductions, the link."""
    lanes = {
        "compute": (3, 0.9),
        "wait": (3, 0.9),
        IDLE: (3, 0.9),
        "gather": (2.2, 0.6),
        "reduce": (1.4, 0.6),
    }
    for kind, (bottom, height) in lanes.items():
        _draw_kind(axes, track, kind, bottom, height)
    if track.link:
        moments = [moment for moment, _ in track.link]
        shares = [min(share, 100.0) / 100 for _, share in track.link]
        axes.fill_between(moments, shares, step="post", color=MUTED, alpha=0.7, linewidth=0)
    axes.set_ylim(0, 4)
    axes.set_yticks([0.5, 1.7, 2.5, 3.45], ["link", "reduce", "gather", "thread"], fontsize=6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def _draw_kind(axes: Axes, track: RankTrack, kind: str, bottom: float, height: float) -> None:
    found = track.intervals.get(kind, [])
    if kind == IDLE and not track.has_messages:
        found = track.idle()
    bars = [(item.start, item.length) for item in found if item.length > 0]
    axes.broken_barh(bars, (bottom, height), **LOOKS[kind])


def _all_ranks(cohort: Cohort, item: Traced) -> Plot:
    tracks = item.timeline.ranks[:MOST_RANKS]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for row, track in enumerate(tracks):
            # y grows downwards: the thread above, what is in flight below it.
            for kind, bottom, height in (
                ("compute", row - 0.42, 0.42),
                ("wait", row - 0.42, 0.42),
                (IDLE, row - 0.42, 0.42),
                ("gather", row + 0.02, 0.16),
                ("reduce", row + 0.2, 0.16),
            ):
                _draw_kind(axes, track, kind, bottom, height)
        names = [f"rank {rank}, node {rank // item.timeline.ranks_per_node}" for rank in range(len(tracks))]
        axes.set_yticks(range(len(tracks)), names)
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(tracks) - 0.5, -0.5)
        axes.set_xlim(0, item.timeline.end)
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        axes.set_xlabel("ms from the begin of the step")
        _legend(figure)

    left_out = len(item.timeline.ranks) - len(tracks)
    return make_plot(
        f"timeline-{item.run.impl}",
        f"{item.run.impl}: one step, all ranks",
        f"{cohort.key}: {cohort.title}. Emulated"
        + (f"; {left_out} more ranks are in the trace." if left_out else "."),
        f"One step of {item.label} on {len(item.timeline.ranks)} ranks, {item.timeline.end:.0f} ms",
        timeline_table([item]),
        draw,
        0.9 + 0.36 * len(tracks),
    )


def _legend(figure: Figure) -> None:
    patches = [Patch(label=kind, **look) for kind, look in LOOKS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches))
