"""M4, M5 and M7: MiCS against the ZeRO-3 of others and against our own, on a slow network."""

from __future__ import annotations

from collections.abc import Sequence

from suite.records import Record
from suite.reports.cohorts import has_network
from suite.reports.judges.pairs import SLOWER_RULE, Pair, as_it_is, both, pairs, rounds_text
from suite.reports.judges.projections import POINTS_LIMIT, RELATIVE_LIMIT, efficiencies, headline
from suite.reports.scaling import families
from suite.reports.verdicts import NOT_REPRODUCED, NOT_TESTABLE, PARTLY, REPRODUCED, Finding, Judge, shared

MICS = "mics"
PUBLISHED_RATIO = 2.82
RIVALS = ("deepspeed-zero3", "deepspeed-zero2")
SLOW_GBIT_S = 100
BASE_NODES = 2


def _slow_cluster(run: Record) -> bool:
    """Several nodes behind a network like that of the published runs (or slower)."""
    cluster = run.config.get("cluster") or {}
    return has_network(run) and (cluster.get("inter_node_gbit_s") or float("inf")) <= SLOW_GBIT_S


def _headline(runs: Sequence[Record]) -> Finding | None:
    """M4. "Up to": the best ratio counts, all are shown."""
    slow = [run for run in runs if _slow_cluster(run)]
    found = [pair for rival in RIVALS for pair in pairs(slow, as_it_is(MICS), as_it_is(rival))]
    if not found:
        return None
    best = max(pair.ratio for pair in found)
    slower = [pair.ratio for pair in found if pair.slower]
    reached = max(slower, default=0.0) >= (1 - RELATIVE_LIMIT) * PUBLISHED_RATIO
    outcome = REPRODUCED if reached else PARTLY if slower else NOT_REPRODUCED
    return Finding(
        found[0].on.evidence,
        outcome,
        f"up to × {best:.2f}: " + "; ".join(_text(pair) for pair in found),
        rounds_text(found),
        both(found),
    )


def _text(pair: Pair) -> str:
    cluster = (pair.on.config.get("cluster") or {}).get("name", "")
    exposed = ", ".join(
        f"{run.impl} waits for messages {run.exposed_comm_s / run.step_time_s.median:.0%} of its step"
        for run in (pair.on, pair.off)
        if run.exposed_comm_s is not None
    )
    return f"{cluster}: {pair.text(pair.off.impl)}" + (f", {exposed}" if exposed else "")


def _smaller_counts(runs: Sequence[Record]) -> Finding | None:
    """M7."""
    found = pairs([run for run in runs if _slow_cluster(run)], as_it_is(MICS), as_it_is("zero3"))
    if not found:
        return None
    found.sort(key=lambda pair: pair.on.world_size)
    return Finding(
        found[0].on.evidence,
        shared(sum(pair.slower for pair in found), len(found)),
        "; ".join(pair.text("zero3") for pair in found),
        rounds_text(found),
        both(found),
    )


def _efficiencies(runs: Sequence[Record]) -> Finding | None:
    """M5: other sizes than the published ones, so they are shown and decide nothing."""
    found = [
        (curve, curve.points[-1], ratio)
        for family in families(runs)
        for curve in family.curves
        if curve.impl in (MICS, "zero3", *RIVALS)
        and curve.points[-1].nodes > BASE_NODES
        and (ratio := curve.efficiency(curve.points[-1], BASE_NODES))
    ]
    if not found:
        return None
    return Finding(
        found[0][1].evidence,
        NOT_TESTABLE,
        "; ".join(
            f"{curve.label} {ratio.median:.1%} from {BASE_NODES} to {last.nodes} nodes of "
            f"{last.ranks_per_node}"
            for curve, last, ratio in found
        ),
        ", ".join(f"{curve.label} {ratio.low:.1%} to {ratio.high:.1%}" for curve, _, ratio in found),
        tuple(run for curve, last, _ in found for run in (curve.at(BASE_NODES), last) if run is not None),
    )


HEADLINE_JUDGES = {
    "M5": Judge(
        f"Projected: both efficiencies are within {POINTS_LIMIT:g} percentage points of the published ones. "
        "Partly: one is; not reproduced: none. Weak scaling of other sizes is shown and decides nothing.",
        _efficiencies,
        efficiencies,
    ),
    "M4": Judge(
        f"Step time of {' or '.join(RIVALS)} over that of {MICS}, both as they are, on several nodes with "
        f"at most {SLOW_GBIT_S} Gbit/s each. Reproduced: the largest ratio of a slower one is at least "
        f"{1 - RELATIVE_LIMIT:.0%} of {PUBLISHED_RATIO}; partly: {MICS} is faster; not reproduced: it is "
        f"not. Projected: the same rule on the projected ratio. {SLOWER_RULE}",
        _headline,
        headline,
    ),
    "M7": Judge(
        f"zero3 is slower than {MICS}, both as they are, on several nodes with at most {SLOW_GBIT_S} Gbit/s "
        f"each. Reproduced: at every number of ranks; not reproduced: at none; partly: between. "
        f"{SLOWER_RULE}",
        _smaller_counts,
    ),
}
