"""M1 to M3: what partition groups, hierarchical collectives and two hops do to a node's network."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from suite.records import Record
from suite.reports.judges.pairs import SLOWER_RULE, Pair, as_it_is, both, options_of, pairs, rounds_text
from suite.reports.scaling import Curve, families
from suite.reports.tables import MIB, rounded
from suite.reports.verdicts import NOT_REPRODUCED, PARTLY, REPRODUCED, Finding, Judge, shared

MICS = "mics"
ZERO3 = "zero3"
BYTES_LIMIT = 0.01
"""How far counted bytes may be from predicted ones: headers and acknowledgements take some."""
EXPOSED_LIMIT = 0.05
"""Share of a step by which exposed communication may grow and still be called fixed."""
FP32 = 4


def hop2_bytes(run: Record) -> float:
    """Per node, for summing gradients once over the replicas: an all-reduce in a ring among the nodes
    that hold the same shards, in fp32."""
    partition = run.partition_size or run.world_size
    replicas = max(1, run.world_size // partition)
    per_node = FP32 * run.n_params * run.ranks_per_node / partition
    return 2 * (replicas - 1) / replicas * per_node


def frequent_bytes(run: Record) -> float:
    """What leaves a node for gathers and hop 1: counted, less the hop 2 of every step."""
    return (run.inter_node_bytes_per_node or 0) - hop2_bytes(run)


def _growth(runs: Sequence[Record]) -> Finding | None:
    """M1."""
    found = [
        (mics, zero3)
        for family in families(runs)
        if family.any.precision == "fp32"
        for mics in _on_several_nodes(family.curves, MICS)
        for zero3 in _on_several_nodes(family.curves, ZERO3)
    ]
    if not found:
        return None
    compared = [run for pair in found for curve in pair for run in curve]
    return Finding(
        compared[0].evidence,
        _growth_outcome(found),
        "; ".join(f"{_growth_text(MICS, mics)}, {_growth_text(ZERO3, zero3)}" for mics, zero3 in found),
        "exposed communication is a median over the timed steps; step times "
        + ", ".join(f"± {(run.step_time_s.max / run.step_time_s.min - 1) / 2:.1%}" for run in compared),
        tuple(compared),
    )


def _on_several_nodes(curves: Sequence[Curve], impl: str) -> list[list[Record]]:
    """The curve's runs on two and more nodes with one partition size or, for ZeRO-3, the whole world."""
    result = []
    for curve in curves:
        points = [run for run in curve.points if run.nodes > 1 and run.inter_node_bytes_per_node is not None]
        sizes = {run.partition_size for run in points}
        comparable = impl == ZERO3 or len(sizes) == 1
        if len(points) > 1 and as_it_is(impl)(points[0]) and comparable:
            result.append(points)
    return result


def _growth_outcome(found: Sequence[tuple[list[Record], list[Record]]]) -> str:
    fixed = growing = calm = 0
    for mics, zero3 in found:
        model = FP32 * mics[0].n_params
        fixed += all(abs(frequent_bytes(run) - frequent_bytes(mics[0])) < BYTES_LIMIT * model for run in mics)
        growing += frequent_bytes(zero3[-1]) - frequent_bytes(zero3[0]) > BYTES_LIMIT * model
        calm += _more_exposed(mics) <= EXPOSED_LIMIT
    if fixed == growing == calm == len(found):
        return REPRODUCED
    return PARTLY if fixed and growing else NOT_REPRODUCED


def _more_exposed(runs: Sequence[Record]) -> float:
    """By how much exposed communication grows from the first to the last, as a share of the first's step."""
    first, last = runs[0], runs[-1]
    if first.exposed_comm_s is None or last.exposed_comm_s is None:
        return float("inf")
    return (last.exposed_comm_s - first.exposed_comm_s) / first.step_time_s.median


def _growth_text(name: str, runs: Sequence[Record]) -> str:
    first, last = runs[0], runs[-1]
    exposed = " → ".join(
        "–" if run.exposed_comm_s is None else f"{rounded(1000 * run.exposed_comm_s)} ms"
        for run in (first, last)
    )
    volume = " → ".join(rounded(max(0.0, frequent_bytes(run)) / MIB) for run in (first, last))
    return (
        f"{name} from {first.nodes} to {last.nodes} nodes: {volume} MiB per node and step for gathers and "
        f"hop 1, exposed communication {exposed}"
    )


def _hierarchical(runs: Sequence[Record]) -> Finding | None:
    """M2: `on` is hierarchical, `off` flat."""
    found = [
        pair
        for impl in (MICS, ZERO3)
        for pair in pairs(runs, as_it_is(impl), _only(impl, hierarchical=False))
        if _spans_nodes(pair.on) and pair.on.partition_size == pair.off.partition_size
        if _counted(pair) and frequent_bytes(pair.on) > 0
    ]
    if not found:
        return None
    exact = sum(abs(_cut(pair) / _predicted_cut(pair.on) - 1) <= BYTES_LIMIT for pair in found)
    fewer = sum(_cut(pair) > 1 for pair in found)
    return Finding(
        found[0].on.evidence,
        shared(exact, len(found)) if exact else PARTLY if fewer else NOT_REPRODUCED,
        "; ".join(_hierarchical_text(pair) for pair in found),
        f"bytes are counted, not sampled; {rounds_text(found)}",
        both(found),
    )


def _only(impl: str, **switched: object) -> Callable[[Record], bool]:
    """Picks the implementation with just these switched."""
    return lambda run: run.impl == impl and options_of(run) == switched


def _counted(pair: Pair) -> bool:
    return all(run.inter_node_bytes_per_node for run in (pair.on, pair.off)) and pair.on.precision == "fp32"


def _spans_nodes(run: Record) -> bool:
    partition = run.partition_size or run.world_size
    return partition > run.ranks_per_node


def _cut(pair: Pair) -> float:
    return frequent_bytes(pair.off) / frequent_bytes(pair.on)


def _predicted_cut(run: Record) -> float:
    partition = run.partition_size or run.world_size
    return (partition - 1) / (partition - run.ranks_per_node)


def _hierarchical_text(pair: Pair) -> str:
    on, off = pair.on, pair.off
    partition, local = on.partition_size or on.world_size, on.ranks_per_node
    return (
        f"{on.impl}, p = {partition}, k = {local}: without hop 2 {rounded(frequent_bytes(off) / MIB)} MiB "
        f"per node and step flat, {rounded(frequent_bytes(on) / MIB)} MiB hierarchical: × {_cut(pair):.3f}, "
        f"predicted ({partition}−1)/({partition}−{local}) = {_predicted_cut(on):.3f}; " + pair.text("flat")
    )


def _two_hop(runs: Sequence[Record]) -> Finding | None:
    """M3: `off` sums gradients over the replicas at every micro-step."""
    found = [
        pair
        for pair in pairs(runs, as_it_is(MICS), _only(MICS, two_hop=False))
        if pair.on.partition_size == pair.off.partition_size and _counted(pair) and _predicted_saving(pair.on)
    ]
    if not found:
        return None
    exact = sum(abs(_saved(pair) / _predicted_saving(pair.on) - 1) <= BYTES_LIMIT for pair in found)
    faster = sum(pair.slower for pair in found)
    fewer = sum(_saved(pair) > 0 for pair in found)
    outcome = REPRODUCED if exact == faster == len(found) else PARTLY if fewer else NOT_REPRODUCED
    return Finding(
        found[0].on.evidence,
        outcome,
        "; ".join(
            f"{pair.on.micro_steps} micro-steps: {rounded(_saved(pair) / MIB)} MiB per node and step saved "
            f"(predicted {rounded(_predicted_saving(pair.on) / MIB)}); " + pair.text()
            for pair in found
        ),
        f"bytes are counted, not sampled; {rounds_text(found)}",
        both(found),
    )


def _saved(pair: Pair) -> float:
    return (pair.off.inter_node_bytes_per_node or 0) - (pair.on.inter_node_bytes_per_node or 0)


def _predicted_saving(run: Record) -> float:
    return (run.micro_steps - 1) * hop2_bytes(run)


PARTITION_JUDGES = {
    "M1": Judge(
        "Weak scaling from 2 nodes on. Counted bytes between nodes, less the hop 2 that every step needs "
        f"once (2 (r−1)/r of the gradients), are those of gathers and hop 1. Reproduced: for {MICS} they "
        f"stay the same within {BYTES_LIMIT:.0%} of the model's bytes and its exposed communication grows "
        f"by at most {EXPOSED_LIMIT:.0%} of a step, while {ZERO3}'s bytes grow. Partly: only the bytes "
        "behave so. Not reproduced: otherwise.",
        _growth,
    ),
    "M2": Judge(
        "The same training with hierarchical collectives and with flat ones, partition groups over several "
        "nodes; counted bytes between nodes, less hop 2. Reproduced: flat over hierarchical is within "
        f"{BYTES_LIMIT:.0%} of (p−1)/(p−k) in every pair. Not reproduced: no fewer bytes in any; partly: "
        f"between.",
        _hierarchical,
    ),
    "M3": Judge(
        "The same training of several micro-steps with and without two_hop. Reproduced: in every pair the "
        f"bytes saved are within {BYTES_LIMIT:.0%} of one hop 2 per micro-step but the last, and the step "
        f"is slower without. Not reproduced: no bytes are saved; partly: between. {SLOWER_RULE}",
        _two_hop,
    ),
}
