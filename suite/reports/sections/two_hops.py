"""Gradient accumulation with two hops, and with every micro-step paying for the second one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from suite.records import Record
from suite.reports.cohorts import cluster_name, ranks
from suite.reports.emulated import is_emulated, training_but_for
from suite.reports.figures import PALETTE, Plot, Style, doubling_axis, draw_band, make_plot, shared_legend
from suite.reports.judges.pairs import Pair, as_it_is, options_of, pairs
from suite.reports.judges.partition_groups import MICS, hop2_bytes
from suite.reports.sections.section import Section
from suite.reports.tables import (
    MIB,
    Cell,
    Table,
    evidence_cell,
    mebibytes,
    milliseconds,
    number,
    range_text,
    rounded,
    whole,
    word,
)

NOTE = (
    "The same training with ever more micro-steps per optimizer step: gradients summed over the replicas "
    "once per step (two hops) or at every micro-step. Two hops save one sum over the replicas for every "
    "micro-step but the last: 2 (r−1)/r of a node's gradient shards each."
)
ON, OFF = "two hops", "every micro-step"
LOOKS = {ON: Style(PALETTE[0], "o", "-"), OFF: Style(PALETTE[1], "s", "--")}


@dataclass(frozen=True)
class Accumulation:
    """One training over numbers of micro-steps, in that order; `on` has two hops."""

    key: str
    title: str
    pairs: tuple[Pair, ...]

    def curves(self) -> Mapping[str, list[Record]]:
        return {ON: [pair.on for pair in self.pairs], OFF: [pair.off for pair in self.pairs]}


def two_hops_section(runs: Iterable[Record]) -> Section | None:
    found = accumulations(runs)
    if not found:
        return None
    findings = tuple(_sentence(item) for item in found)
    return Section("two-hops", "Two hops", NOTE, (), tuple(map(_plot, found)), findings)


def accumulations(runs: Iterable[Record]) -> list[Accumulation]:
    """Trainings with and without two hops on more than one number of micro-steps."""
    groups: dict[str, dict[int, Pair]] = {}
    emulated = sorted((run for run in runs if is_emulated(run)), key=lambda run: run.started_at)
    for pair in pairs(emulated, as_it_is(MICS), _without):
        if pair.on.partition_size == pair.off.partition_size:
            groups.setdefault(_key(pair.on), {})[pair.on.micro_steps] = pair  # the newest of several
    several = [group for group in groups.values() if len(group) > 1]
    return [
        Accumulation(f"A{index}", _title(group), tuple(group[steps] for steps in sorted(group)))
        for index, group in enumerate(several, 1)
    ]


def _without(run: Record) -> bool:
    return run.impl == MICS and options_of(run) == {"two_hop": False}


def _key(run: Record) -> str:
    return f"{training_but_for(run, 'train', 'micro_steps')} {run.partition_size}"


def _title(group: Mapping[int, Pair]) -> str:
    run = next(iter(group.values())).on
    place = ", ".join(text for text in (run.workload, cluster_name(run), ranks(run)) if text)
    return f"{place}, partition groups of {run.partition_size}"


def _sentence(item: Accumulation) -> str:
    first, last = item.pairs[0], item.pairs[-1]
    ends = " and ".join(
        f"× {pair.ratio:.2f} at {pair.on.micro_steps} micro-step{'s' if pair.on.micro_steps > 1 else ''}"
        + ("" if pair.slower else " (no significant difference)")
        for pair in (first, last)
    )
    return f"{item.key}: without two hops a step takes {ends}."


def two_hops_table(item: Accumulation) -> Table:
    head = (
        "micro-steps",
        "gradients summed over replicas",
        "step, median ms",
        "min–max ms",
        "per micro-step, ms",
        "÷ two hops",
        "round by round",
        "exposed communication, ms",
        "sent between nodes per node and step, MiB",
        "more than two hops, MiB",
        "predicted, MiB",
        "evidence",
    )
    rows = [_row(pair, run) for pair in item.pairs for run in (pair.on, pair.off)]
    return Table(f"{item.key}: {item.title}", head, tuple(rows))


def _row(pair: Pair, run: Record) -> tuple[Cell, ...]:
    step, without, ratios = run.step_time_s, run is pair.off, sorted(pair.ratios)
    known = without and run.precision == "fp32"
    return (
        number(run.micro_steps, whole),
        word(OFF if without else ON),
        milliseconds(step.median),
        Cell(range_text(1000 * step.min, 1000 * step.max), 1000 * step.min),
        milliseconds(step.median / run.micro_steps),
        number(pair.ratio if without else None, "{:.3f}".format),
        Cell(range_text(ratios[0], ratios[-1]), ratios[0]) if without and ratios else number(None),
        milliseconds(run.exposed_comm_s),
        mebibytes(run.inter_node_bytes_per_node),
        mebibytes(_more(pair) if without else None),
        mebibytes((run.micro_steps - 1) * hop2_bytes(run) if known else None),
        evidence_cell(run),
    )


def _more(pair: Pair) -> float | None:
    on, off = pair.on.inter_node_bytes_per_node, pair.off.inter_node_bytes_per_node
    return None if on is None or off is None else off - on


def _plot(item: Accumulation) -> Plot:
    def per_micro_step(run: Record) -> tuple[float, float, float]:
        step, unit = run.step_time_s, 1000 / run.micro_steps
        return unit * step.min, unit * step.median, unit * step.max

    def sent(run: Record) -> tuple[float, float, float]:
        value = (run.inter_node_bytes_per_node or 0) / run.micro_steps / MIB
        return value, value, value

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        for axes, read in ((left, per_micro_step), (right, sent)):
            for label, runs in item.curves().items():
                draw_band(axes, label, _points(runs, read), LOOKS[label])
            axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
            doubling_axis(axes, (pair.on.micro_steps for pair in item.pairs), "micro-steps per step")
        left.set_ylabel("time per micro-step, ms")
        right.set_ylabel("sent between nodes,\nMiB per node and micro-step")
        shared_legend(figure, left)

    run = item.pairs[0].on
    ends = "; ".join(f"× {rounded(pair.ratio)} at {pair.on.micro_steps}" for pair in item.pairs)
    return make_plot(
        f"{item.key.lower()}-two-hops",
        "Two hops against a sum at every micro-step",
        f"{run.evidence.capitalize()}; {item.key}: {item.title}. {run.step_time_s.n} timed steps each, both "
        "in turns. Bands: min to max.",
        f"Step time without two hops over that with them, by micro-steps: {ends}",
        two_hops_table(item),
        draw,
        3.1,
    )


def _points(
    runs: Sequence[Record], read: Callable[[Record], tuple[float, float, float]]
) -> list[tuple[float, tuple[float, float, float]]]:
    return [(run.micro_steps, read(run)) for run in runs]
