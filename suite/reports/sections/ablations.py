"""Ablations: what each switch of the engine, turned off alone, does to the step and to the bytes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from suite.records import Record
from suite.reports.cohorts import Cohort
from suite.reports.figures import INK, PALETTE, Plot, link_label, make_plot, row_axes
from suite.reports.judges.optimisations import ALL_OFF, ENGINE, OPTIONS
from suite.reports.judges.pairs import SLOWER_RULE, Pair, as_it_is, options_of
from suite.reports.judges.partition_groups import MICS
from suite.reports.sections.section import Section
from suite.reports.tables import MIB, Cell, Table, evidence_cell, mebibytes, number, range_text, rounded, word

CLAIM_OF = {**OPTIONS, "hierarchical": "M2", "two_hop": "M3"}
WHOLE = {ENGINE: "Z8", MICS: "M1"}
"""The claim about all of them together."""
NOTE = (
    "The engine as it is, and the same training with something switched off, timed in turns: a bar is the "
    "step time "
    "in proportion, its line the range round by round. " + SLOWER_RULE
)


@dataclass(frozen=True)
class Ablation:
    """What was switched off, the claim that it stands for, and the two runs."""

    label: str
    claim: str
    pair: Pair


def ablation_section(cohorts: Iterable[Cohort]) -> Section | None:
    """Of cohorts in which more than one thing was switched off; a single one has a section of its own."""
    found = [
        (cohort, engine)
        for cohort in cohorts
        for engine in (ENGINE, MICS)
        if len({item.label for item in ablations(cohort, engine)}) > 1
    ]
    if not found:
        return None
    plots = tuple(_ablation_plot(cohort, engine) for cohort, engine in found)
    return Section("ablations", "Ablations", NOTE, (), plots)


def ablations(cohort: Cohort, engine: str) -> list[Ablation]:
    """In the order of the claims; against the engine as it is with the same partition size."""
    return sorted(
        (
            Ablation(_label(run), _claim(run), Pair(on, run))
            for on in cohort.runs
            if as_it_is(engine)(on)
            for run in cohort.runs
            if _is_variant(run, engine) and run.partition_size == on.partition_size
        ),
        key=lambda item: (item.claim, item.label),
    )


def _is_variant(run: Record, engine: str) -> bool:
    return (run.impl == engine and bool(options_of(run))) or (engine == ENGINE and run.impl == ALL_OFF)


def _label(run: Record) -> str:
    words = [f"{key} off" if value is False else f"{key}={value}" for key, value in options_of(run).items()]
    return ", ".join(words) or "all off"


def _claim(run: Record) -> str:
    options = list(options_of(run))
    return CLAIM_OF.get(options[0], "") if len(options) == 1 else WHOLE.get(ENGINE, "") if not options else ""


def ablation_table(cohort: Cohort, engine: str) -> Table:
    head = (
        "switched off",
        "claim",
        "step ÷ as it is",
        "range round by round",
        "slower in rounds",
        "verdict",
        "peak memory, MiB",
        "sent between nodes per node and step, MiB",
        "evidence",
    )
    found = ablations(cohort, engine)
    rows = [_row(item) for item in found]
    return Table(f"{cohort.key}: {engine} with switches off", head, (_base_row(found[0].pair.on), *rows))


def _base_row(run: Record) -> tuple[Cell, ...]:
    resources = mebibytes(run.peak_memory_bytes), mebibytes(run.inter_node_bytes_per_node)
    label = "nothing" + (f" (partition_size={run.partition_size})" if run.impl == MICS else "")
    blank = (Cell("–"), Cell("–"), Cell("–"))
    return (word(label), Cell("–"), number(1.0), *blank, *resources, evidence_cell(run))


def _row(item: Ablation) -> tuple[Cell, ...]:
    pair, ratios = item.pair, sorted(item.pair.ratios)
    return (
        word(item.label),
        Cell(item.claim or "–", item.claim or None, f"#claim-{item.claim}" if item.claim else None),
        number(pair.ratio),
        Cell(range_text(ratios[0], ratios[-1]), ratios[0]),
        Cell(f"{pair.wins} of {len(ratios)}", pair.wins),
        word("slower without" if pair.slower else "no significant difference"),
        mebibytes(pair.off.peak_memory_bytes),
        mebibytes(pair.off.inter_node_bytes_per_node),
        evidence_cell(pair.off),
    )


def _ablation_plot(cohort: Cohort, engine: str) -> Plot:
    found = ablations(cohort, engine)
    sends = engine == MICS and all(item.pair.off.inter_node_bytes_per_node for item in found)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, 2 if sends else 1, sharey=True, squeeze=False)[0]
        row_axes(panels[0], [f"{item.claim} {item.label}".strip() for item in found])
        for label, item in zip(panels[0].get_yticklabels(), found, strict=True):
            link_label(label, f"claim-{item.claim}" if item.claim else "")
        for row, item in enumerate(found):
            _bar(panels[0], row, item)
        panels[0].axvline(1, color=INK, linestyle=":", linewidth=1)
        panels[0].set_xlabel("step time ÷ as it is")
        if sends:
            _draw_bytes(panels[1], found)

    return make_plot(
        f"{cohort.key.lower()}-ablation-{engine}",
        f"{engine}: what each switch is worth",
        f"{cohort.key}: {cohort.title}. {cohort.conditions} Bar: ratio of the medians, hatched where not "
        "significant; line: round by round; dotted: as it is.",
        "; ".join(f"{item.label} {item.pair.ratio:.2f}" for item in found),
        ablation_table(cohort, engine),
        draw,
        1.0 + 0.29 * len(found),
    )


def _bar(axes: Axes, row: int, item: Ablation) -> None:
    ratios = sorted(item.pair.ratios)
    look: dict[str, Any] = {"height": 0.55, "edgecolor": PALETTE[0], "linewidth": 0.6}
    look |= {"color": PALETTE[0], "alpha": 0.75} if item.pair.slower else {"hatch": "////", "fill": False}
    axes.barh(row, item.pair.ratio, **look)
    axes.plot([ratios[0], ratios[-1]], [row, row], color=INK, linewidth=1)


def _draw_bytes(axes: Axes, found: Sequence[Ablation]) -> None:
    """Counted, in proportion to the engine's as it is."""
    for row, item in enumerate(found):
        base, other = (run.inter_node_bytes_per_node or 0 for run in (item.pair.on, item.pair.off))
        axes.barh(row, other / base, height=0.55, color=PALETTE[2], alpha=0.75)
        axes.annotate(
            f"{rounded(other / MIB)} MiB",
            (other / base, row),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.axvline(1, color=INK, linestyle=":", linewidth=1)
    axes.set_xlim(0, 1.35 * axes.get_xlim()[1])
    axes.grid(axis="x")
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("bytes between nodes ÷ as it is")
