"""The same training on networks that differ in bandwidth only: which method to choose on which."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from matplotlib.figure import Figure

from suite.records import Record
from suite.reports.cohorts import FLOOR, Ratio
from suite.reports.emulated import bound_s
from suite.reports.figures import (
    INK,
    SPREAD,
    Plot,
    Style,
    doubling_axis,
    draw_band,
    make_plot,
    range_mark,
    row_axes,
    shared_legend,
)
from suite.reports.networks import Network, networks
from suite.reports.sections.section import Section
from suite.reports.tables import (
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
    "The same training, several bandwidths per node, everything else equal; at each bandwidth the "
    "implementations took turns. Bandwidth is that of the cluster that is emulated. Latency is not "
    "emulated, so a fast network here is better than a real one of many nodes."
)


def networks_section(runs: Iterable[Record], styles: Mapping[str, Style]) -> Section | None:
    found = networks(runs)
    if not found:
        return None
    plots = [plot for item in found for plot in (_step_plot(item, styles), _loss_plot(item, styles))]
    tables = tuple(choice_table(item) for item in found)
    return Section("networks", "Network sweep", NOTE, tables, tuple(plots))


def network_table(network: Network) -> Table:
    head = (
        "implementation",
        "Gbit/s",
        "step, median ms",
        "min–max ms",
        "n",
        "÷ fastest",
        "bound, ms",
        "exposed communication, ms",
        "overlapped, %",
        "sent between nodes per node and step, MiB",
        "evidence",
    )
    members = {**network.curves, **({FLOOR: network.floor} if network.floor else {})}
    rows = [
        _row(network, label, speed, points[speed])
        for label, points in members.items()
        for speed in sorted(points)
    ]
    return Table(f"{network.key}: {network.title}", head, tuple(rows))


def _row(network: Network, label: str, speed: float, run: Record) -> tuple[Cell, ...]:
    step = run.step_time_s
    ratio = None if label == FLOOR else Ratio.of(run, network.fastest(speed)).median
    return (
        word(label),
        number(speed, "{:g}".format),
        milliseconds(step.median),
        Cell(range_text(1000 * step.min, 1000 * step.max), 1000 * step.min),
        number(step.n, whole),
        number(ratio, "{:.2f}".format),
        milliseconds(bound_s(run)),
        milliseconds(run.exposed_comm_s),
        overlap_cell(run),
        mebibytes(run.inter_node_bytes_per_node),
        evidence_cell(run),
    )


def choice_table(network: Network) -> Table:
    """Per bandwidth the fastest method, and those that its spread does not tell apart from it."""
    head = ("Gbit/s", "fastest", "step, ms", "min–max ms", "no slower", "next", "next ÷ fastest", "evidence")
    return Table(
        f"{network.key}: what to choose",
        head,
        tuple(_choice(network, speed) for speed in network.bandwidths),
    )


def _choice(network: Network, speed: float) -> tuple[Cell, ...]:
    runs = {label: points[speed] for label, points in network.curves.items() if speed in points}
    best, *others = sorted(runs.items(), key=lambda item: item[1].step_time_s.median)
    alike = [label for label, run in others if not Ratio.of(run, best[1]).differs]
    behind = next(((label, run) for label, run in others if label not in alike), None)
    step = best[1].step_time_s
    return (
        Cell(f"{speed:g}", speed),
        word(best[0]),
        milliseconds(step.median),
        Cell(range_text(1000 * step.min, 1000 * step.max), 1000 * step.min),
        word(", ".join(alike)),
        word(behind[0] if behind else None),
        number(Ratio.of(behind[1], best[1]).median if behind else None, "{:.2f}".format),
        evidence_cell(best[1]),
    )


def _spread(run: Record, unit: float) -> tuple[float, float, float]:
    step = run.step_time_s
    return step.min / unit, step.median / unit, step.max / unit


def _step_plot(network: Network, styles: Mapping[str, Style]) -> Plot:
    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for label, points in network.curves.items():
            style = styles[next(iter(points.values())).impl]
            times = [(speed, _spread(points[speed], 1e-3)) for speed in sorted(points)]
            draw_band(left, label, times, style)
            fastest = {speed: network.fastest(speed).step_time_s.median for speed in points}
            ratios = [(speed, _spread(points[speed], fastest[speed])) for speed in sorted(points)]
            draw_band(right, label, ratios, style)
        if network.floor:
            speeds = sorted(network.floor)
            medians = [1000 * network.floor[speed].step_time_s.median for speed in speeds]
            left.plot(speeds, medians, ":", color=INK, linewidth=1, label="floor (no communication)")
        left.set_ylim(bottom=0)
        left.set_ylabel("step time, ms")
        right.axhline(1, color=INK, linestyle=":", linewidth=1)
        right.set_ylabel("step time ÷ the fastest method's")
        for axes in (left, right):
            doubling_axis(axes, network.bandwidths, "Gbit/s per node")
        shared_legend(figure, left)

    ends = "; ".join(f"{speed:g} Gbit/s: {_choice(network, speed)[1].text}" for speed in network.bandwidths)
    return make_plot(
        f"{network.key.lower()}-network",
        "Step time against bandwidth",
        f"{network.any.evidence.capitalize()}; {network.key}: {network.title}. Bands: min to max.",
        f"Step time over bandwidth; the fastest method at {ends}",
        network_table(network),
        draw,
        3.4,
    )


def loss_table(network: Network) -> Table:
    fast, slow = network.compared()
    head = (
        "implementation",
        f"throughput lost from {fast:g} to {slow:g} Gbit/s, %",
        "low",
        "high",
        "evidence",
    )
    rows = tuple(
        (word(label), *(number(100 * value, "{:.1f}".format) for value in loss), evidence_cell(run))
        for label, run, loss in _losses(network)
    )
    return Table("Throughput lost on the slower network", head, rows)


def _losses(network: Network) -> list[tuple[str, Record, tuple[float, float, float]]]:
    """(label, a run, (median, low, high)) where both bandwidths were run, smallest loss first."""
    fast, slow = network.compared()
    found = []
    for label, points in network.curves.items():
        if fast in points and slow in points:
            ratio = Ratio.of(points[fast], points[slow])
            found.append((label, points[slow], (1 - ratio.median, 1 - ratio.high, 1 - ratio.low)))
    return sorted(found, key=lambda item: item[2][0])


def _loss_plot(network: Network, styles: Mapping[str, Style]) -> Plot:
    found, (fast, slow) = _losses(network), network.compared()

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        row_axes(axes, [label for label, _, _ in found])
        for row, (_, run, (middle, low, high)) in enumerate(found):
            range_mark(axes, row, (100 * low, 100 * middle, 100 * high), styles[run.impl])
        axes.axvline(0, color=INK, linestyle=":", linewidth=1)
        axes.set_xlabel(f"throughput lost from {fast:g} to {slow:g} Gbit/s, %")

    return make_plot(
        f"{network.key.lower()}-network-loss",
        "What a slower network costs",
        f"{network.any.evidence.capitalize()}; {network.key}: {network.title}.{SPREAD.format('')}",
        "Throughput lost: " + "; ".join(f"{label} {100 * loss[0]:.0f}%" for label, _, loss in found),
        loss_table(network),
        draw,
        0.9 + 0.27 * len(found),
    )
