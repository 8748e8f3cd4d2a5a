"""The sources' two figures as the projection redraws them: ZeRO-3 before and after (Z8), and weak
scaling from 128 to 512 GPUs (M5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure

from suite.reports.figures import PALETTE, PAPER, Plot, make_plot, shared_legend
from suite.reports.judges.projections import Row
from suite.reports.tables import Table, number, whole, word

SPEEDUP = ("RoBERTa-10B", "RoBERTa-50B")
STATES = ("before", "after")
SCALING = (
    ("MiCS", "MiCS 100 B, 64 p4d", "MiCS 100 B, 128 → 512 GPUs"),
    ("ZeRO-3", "ZeRO-3 100 B, 64 p4d", "ZeRO-3 100 B, 128 → 512 GPUs"),
)
"""Name, row of the TFLOPS on 512 GPUs, row of the efficiency."""


def paper_figures(rows: Sequence[Row]) -> list[Plot]:
    """Those whose numbers are among the rows."""
    found = {row.what: row for row in rows}
    plots = (_speedup_plot(found), _scaling_plot(found))
    return [plot for plot in plots if plot is not None]


def _speedup_plot(found: dict[str, Row]) -> Plot | None:
    names = [(size, state, f"{size}, ZeRO-3 {state}, 8 p4d") for size in SPEEDUP for state in STATES]
    if not all(name in found for _, _, name in names):
        return None
    bars = [(size, state, found[name]) for size, state, name in names]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for place, (_, _, row) in enumerate(bars):
            axes.bar(place - 0.2, row.published, 0.38, color=PAPER, edgecolor=PALETTE[0], label="published")
            axes.bar(place + 0.2, row.projected, 0.38, color=PALETTE[1], label="projected")
            axes.annotate(f"{row.error:+.1%}", (place + 0.2, row.projected), ha="center", va="bottom", size=8)
        axes.set_xticks(range(len(bars)), [f"{size}\n{state}" for size, state, _ in bars])
        axes.set_ylabel("model TFLOPS per GPU")
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles[:2], labels[:2], loc="outside lower center", ncols=2)

    head = ("model", "ZeRO-3", "published", "projected", "error", "role")
    cells = tuple(
        (
            word(size),
            word(state),
            number(row.published),
            number(row.projected),
            number(row.error, "{:+.1%}".format),
            word(row.role),
        )
        for size, state, row in bars
    )
    return make_plot(
        "zero3-before-after",
        "ZeRO-3 before and after its optimisations (Z8)",
        "Projected beside published (S1, D1): 64 A100 on 8 p4d nodes, micro-batch 16, model FLOPs.",
        "; ".join(f"{size} {state}: {row.text()}" for size, state, row in bars),
        Table("ZeRO-3 before and after", head, cells),
        draw,
        2.6,
    )


def _scaling_plot(found: dict[str, Row]) -> Plot | None:
    if not all(name in found for _, *names in SCALING for name in names):
        return None
    curves = [_curve(name, found[rate], found[efficiency]) for name, rate, efficiency in SCALING]
    if not all(runs for *_, runs in curves):
        return None

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for place, (name, rate, efficiency, runs) in enumerate(curves):
            colour = PALETTE[place]
            left.plot(*zip(*runs, strict=True), "-o", color=colour, markersize=4, label=f"{name}, projected")
            share = efficiency.published / 100
            published = [rate.published / share, rate.published]
            left.plot([gpus for gpus, _ in runs], published, ":D", color=colour, markerfacecolor=PAPER)
            left.plot([], [], ":D", color=colour, markerfacecolor=PAPER, label=f"{name}, published")
            right.bar(place - 0.2, efficiency.published, 0.38, color=PAPER, edgecolor=colour)
            right.bar(place + 0.2, efficiency.projected, 0.38, color=colour)
            right.annotate(
                f"{efficiency.error:+.1f} points",
                (place + 0.2, efficiency.projected),
                ha="center",
                va="bottom",
                size=8,
            )
        left.set_xticks([gpus for gpus, _ in curves[0][3]])
        left.set_ylim(bottom=0)
        left.set_xlabel("GPUs")
        left.set_ylabel("hardware TFLOPS per GPU")
        right.set_xticks(range(len(curves)), [name for name, *_ in curves])
        right.set_ylabel("efficiency, %")
        for axes in (left, right):
            axes.grid(axis="y")
            axes.set_axisbelow(True)
        shared_legend(figure, left, 2)

    return make_plot(
        "weak-scaling-100b",
        "Weak scaling from 128 to 512 GPUs (M5)",
        "Projected beside published (S2): 100 B parameters on p4d. Hollow: published; on 128 GPUs it is "
        "worked out from the efficiency.",
        "; ".join(f"{efficiency.text()}; {rate.text()}" for _, rate, efficiency, _ in curves),
        Table(
            "Weak scaling from 128 to 512 GPUs",
            ("method", "GPUs", "hardware TFLOPS per GPU", "efficiency, %", "published, %", "error, points"),
            tuple(row for curve in curves for row in _scaling_rows(*curve)),
        ),
        draw,
        3.0,
    )


Runs = list[tuple[int, float]]


def _curve(name: str, rate: Row, efficiency: Row) -> tuple[str, Row, Row, Runs]:
    """With the projected (GPUs, hardware TFLOPS) of the runs that the efficiency is made of."""
    runs = (efficiency.record.published or {}).get("runs", [])
    return name, rate, efficiency, sorted((run["gpus"], run["hardware_tflops_per_gpu"]) for run in runs)


def _scaling_rows(name: str, rate: Row, efficiency: Row, runs: Runs) -> Iterator[tuple]:
    for gpus, projected in runs:
        last = gpus == runs[-1][0]
        yield (
            word(name),
            number(gpus, whole),
            number(projected),
            number(efficiency.projected if last else 100.0, "{:.1f}".format),
            number(efficiency.published if last else 100.0, "{:.1f}".format),
            number(efficiency.error if last else None, "{:+.1f}".format),
        )
