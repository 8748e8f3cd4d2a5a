"""A projected step as a picture: what computes and what communicates around the turn to backward."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from suite.records import ProjectionRecord
from suite.reports.figures import PALETTE, PAPER, Plot, make_plot
from suite.reports.tables import Table, number, word

STREAMS = ("compute", "intra-node", "inter-node")
KINDS = ("forward", "recompute", "backward", "all-gather", "reduce-scatter", "all-reduce", "other")
COLOURS = dict(zip(KINDS, (*PALETTE, "#8c8c8c"), strict=True))


def timeline_plot(record: ProjectionRecord, index: int = 1) -> Plot:
    """The record's `timeline`, which must not be empty: one row per stream."""
    spans = [
        (str(stream), str(name), float(start), float(end)) for stream, name, start, end in record.timeline
    ]
    origin = min(start for _, _, start, _ in spans)
    length = max(end for *_, end in spans) - origin

    centred: dict[str, Any] = {"ha": "center", "va": "center", "size": 7, "color": PAPER}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for stream, name, start, end in spans:
            left, width = 1000 * (start - origin), 1000 * (end - start)
            row = STREAMS.index(stream)
            colour = COLOURS[_kind(name)]
            axes.barh(row, width, 0.7, left, color=colour, edgecolor=PAPER, linewidth=0.4)
            if end - start > 0.09 * length and name.startswith("block"):
                words = name.split()
                axes.annotate(words[1], (left + width / 2, row), **centred)
        for kind in dict.fromkeys(_kind(name) for _, name, _, _ in spans):
            axes.barh(0, 0, color=COLOURS[kind], label=kind)
        axes.set_yticks(range(len(STREAMS)), STREAMS)
        axes.set_ylim(len(STREAMS) - 0.5, -0.5)
        axes.set_xlabel("ms")
        axes.grid(axis="x")
        axes.set_axisbelow(True)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)

    place = f"{record.workload} on {record.nodes} {record.cluster} nodes, micro-batch {record.micro_batch}"
    group = f", partition size {record.partition_size}" if record.partition_size else ""
    return make_plot(
        f"projected-timeline-{index}",
        f"Timeline of a projected step: {record.impl}",
        f"Projected; {place}{group}. The forward of the last two blocks (numbers), the head, and their "
        "backward: what the compute stream does beside the wires inside and between nodes.",
        f"{record.impl}: a step of {record.step_time_s:.2f} s waits {record.exposed_comm_s:.2f} s",
        Table(
            "Timeline",
            ("stream", "what", "start, ms", "end, ms"),
            tuple(
                (word(stream), word(name), *(number(1000 * (at - origin)) for at in (start, end)))
                for stream, name, start, end in spans
            ),
        ),
        draw,
        2.2,
    )


def _kind(name: str) -> str:
    return next((kind for kind in KINDS if kind in name), "other")
