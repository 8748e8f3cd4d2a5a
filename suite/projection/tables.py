"""The projection's tables for a terminal, and the one that the documentation holds."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from suite.projection.against_emulation import Comparison as EmulationComparison
from suite.projection.assumptions import Assumption
from suite.projection.hardware import GIB
from suite.projection.plan import Plan
from suite.projection.project import Projection
from suite.projection.published_runs import Comparison, Sensitivity
from suite.projection.scaling import Curve

PUBLISHED_COLUMNS = ("what", "source", "unit", "published", "projected", "error", "", "aim reached")
ASSUMPTION_COLUMNS = ("assumption", "value", "range", "", "meaning")
ELSEWHERE_COLUMNS = ("run", "published TFLOPS/GPU", "projected", "error", "within 10%")
EMULATION_COLUMNS = (
    "method",
    "nodes",
    "micro-steps",
    "step, s: emulated",
    "projected",
    "error",
    "MB/node",
    "error",
)
PLAN_COLUMNS = (
    "",
    "partition\nsize",
    "micro-\nbatch",
    "micro-\nsteps",
    "hier-\narch.",
    "optim.\nover",
    "step,\ns",
    "TFLOPS\n/GPU",
    "exposed,\ns",
    "GiB\n/GPU",
)
UNMOVED = 1e-3
"""Relative movement below which an assumption moves nothing."""
SENSITIVITY_COLUMNS = ("assumption", "moves most", "at the low end", "now", "at the high end")


def projection_table(projection: Projection) -> Table:
    """One projected step."""
    memory = projection.memory
    table = Table("projected", "", title=projection.config.impl.name, title_justify="left")
    partition = projection.partition_size
    for name, text in (
        ("GPUs", str(projection.world_size)),
        ("partition size", "not sharded" if partition is None else str(partition)),
        ("hierarchical", "yes" if projection.hierarchical else "no"),
        ("step", f"{projection.step_s:.3f} s"),
        ("GPU busy", f"{projection.compute_s:.3f} s"),
        ("exposed communication", f"{projection.exposed_s:.3f} s"),
        *((f"{wire} busy", f"{seconds:.3f} s") for wire, seconds in projection.communication_s.items()),
        ("model TFLOPS/GPU", f"{projection.model_tflops_per_gpu:.1f}"),
        (
            "hardware TFLOPS/GPU",
            f"{projection.hardware_tflops_per_gpu:.1f} ({100 * projection.share_of_peak:.1f}% of peak)",
        ),
        ("samples/s", f"{projection.samples_per_s:.1f}"),
        ("memory", f"{memory.total / GIB:.1f} of {memory.limit / GIB:.0f} GiB{_verdict(memory.fits)}"),
    ):
        table.add_row(name, text)
    return table


def plan_table(plan: Plan) -> Table:
    """The fastest configurations; narrow enough for a terminal of 80 columns."""
    table = Table(*PLAN_COLUMNS, title="projected", box=SIMPLE_HEAD, padding=(0, 1))
    for place, item in enumerate(plan.fastest, 1):
        choice, projection = item.choice, item.projection
        table.add_row(
            str(place),
            str(choice.partition_size),
            str(choice.micro_batch),
            str(choice.micro_steps),
            "yes" if choice.hierarchical else "no",
            "world" if choice.world_optimizer else "group",
            f"{projection.step_s:.2f}",
            f"{projection.hardware_tflops_per_gpu:.1f}",
            f"{projection.exposed_s:.2f}",
            f"{projection.memory.total / GIB:.1f}",
        )
    return table


def plan_text(plan: Plan) -> str:
    """Why the others are not first, and what was tried."""
    others = [f"{place}: {item.reason}" for place, item in enumerate(plan.fastest, 1) if item.reason]
    tried = f"{plan.tried} configurations tried, {plan.out_of_memory} do not fit memory."
    return "\n".join([*others, tried, *plan.lost])


def scaling_table(curve: Curve) -> Table:
    """A weak-scaling curve."""
    end = "scales to the last" if curve.stops_at is None else f"stops scaling at {curve.stops_at} GPUs"
    table = Table("GPUs", "TFLOPS/GPU", "efficiency", "exposed s", title=f"{curve.impl} (projected): {end}")
    for point in curve.points:
        efficiency = "out of memory" if point.efficiency is None else f"{100 * point.efficiency:.1f}%"
        projection = point.projection
        rate = "" if point.efficiency is None else f"{projection.hardware_tflops_per_gpu:.1f}"
        table.add_row(f"{point.gpus:,}", rate, efficiency, f"{projection.exposed_s:.2f}")
    return table


def published_rows(rows: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """Every published number beside the projected one, as text."""
    return [
        (
            row.number.what,
            row.number.source,
            row.number.unit,
            _value(row.number.quantity, row.number.published),
            _value(row.number.quantity, row.projected),
            _error(row),
            row.number.role,
            "yes" if row.within else "no",
        )
        for row in rows
    ]


def elsewhere_rows(rows: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """Runs that nothing was fitted to, as text."""
    return [
        (
            row.number.what,
            _value(row.number.quantity, row.number.published),
            _value(row.number.quantity, row.projected),
            _error(row),
            "yes" if row.within else "no",
        )
        for row in rows
    ]


def emulation_rows(rows: Sequence[EmulationComparison]) -> list[tuple[str, ...]]:
    """Emulated and projected steps, in undilated time, and what a node sends."""
    return [
        (
            " ".join((row.impl, row.options)).strip(),
            str(row.nodes),
            str(row.micro_steps),
            f"{row.measured_s:.3f}",
            f"{row.projected_s:.3f}",
            f"{row.time_error:+.1%}",
            f"{row.measured_node_bytes / 1e6:.2f}",
            f"{row.bytes_error:+.2%}",
        )
        for row in rows
    ]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as the documentation has it."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def assumption_rows(entries: Sequence[Assumption]) -> list[tuple[str, ...]]:
    return [
        (
            f"`{entry.name}`",
            f"{entry.value:.4g}",
            f"{entry.low:g} to {entry.high:g}",
            "fitted" if entry.fitted else "assumed",
            entry.meaning,
        )
        for entry in entries
    ]


def sensitivity_rows(moved: Sequence[Sensitivity], now: Sequence[Comparison]) -> list[tuple[str, ...]]:
    """For every assumption the number that it moves most over its range."""
    values = {row.number.what: row for row in now}
    best: dict[str, tuple[float, Sensitivity]] = {}
    for item in moved:
        row = values[item.what]
        if row.number.quantity == "memory":
            continue
        reach = abs(item.at_high - item.at_low) / row.projected
        if item.assumption not in best or reach > best[item.assumption][0]:
            best[item.assumption] = (reach, item)
    rows: list[tuple[str, ...]] = []
    for name, (reach, item) in best.items():
        if reach < UNMOVED:
            rows.append((f"`{name}`", "none of these numbers", "", "", ""))
            continue
        row = values[item.what]
        low, current, high = (
            _value(row.number.quantity, value) for value in (item.at_low, row.projected, item.at_high)
        )
        rows.append((f"`{name}`", f"{item.what} ({row.number.unit})", low, current, high))
    return rows


def table_of(columns: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> Table:
    table = Table(*columns, title=title)
    for row in rows:
        table.add_row(*row)
    return table


def _value(quantity: str, value: float) -> str:
    if quantity == "memory":
        return "fits" if value else "out of memory"
    return f"{value:.2f}" if quantity == "ratio" else f"{value:.1f}"


def _error(row: Comparison) -> str:
    if row.error is None:
        return ""
    return f"{row.error:+.1f} points" if row.number.quantity == "efficiency" else f"{100 * row.error:+.1f}%"


def _verdict(fits: bool) -> str:
    return "" if fits else ": does not fit"
