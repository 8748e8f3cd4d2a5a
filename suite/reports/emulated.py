"""What a record of the emulated cluster says beyond its step time: lower bounds, and overlap.

All seconds are undilated: those of the cluster that is emulated.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from suite.records import Record
from suite.reports.cohorts import FLOOR, training_key

CONTROL_BYTES = 1e5
"""What losses, norms and barriers of a step send at most: below it nothing worth overlapping left."""

BOUND_RULE = (
    "Bound: a step takes at least the modelled time of its blocks, and at least what the bytes that were "
    "counted out of a node take over its link. It knows nothing of what has to wait for what, so only "
    "perfect overlap would reach it."
)
OVERLAP_RULE = (
    "Overlapped: of the bytes that left a node, the share that did while a rank's training thread spent a "
    "block's modelled time, read from the link's own counter at begin and end of every block; mean over "
    "ranks and steps. At best: as much as fits beside the blocks. ≥ marks older records, which have no "
    "such counter: one minus exposed communication over the link's time, a lower bound."
)


@dataclass(frozen=True)
class Overlap:
    """Share of the bytes sent during compute; `at_least` where it is only bounded from below."""

    share: float
    at_least: bool


def is_emulated(run: Record) -> bool:
    return run.evidence == "emulated" and "dilation" in run.details


def gbit_s(run: Record) -> float:
    """Of a real node's link."""
    return float((run.config.get("cluster") or {}).get("inter_node_gbit_s") or 0)


def compute_s(run: Record) -> float | None:
    """Modelled time of all blocks of a step."""
    paced = run.details.get("paced_host_s")
    return None if paced is None else paced / run.details["dilation"]


def link_s(run: Record) -> float | None:
    """What the bytes that were counted out of a node take over its link."""
    rate, sent = run.details.get("emulated_link_mbit_per_s"), run.inter_node_bytes_per_node
    return None if not rate or sent is None else 8 * sent / (rate * 1e6 * run.details["dilation"])


def bound_s(run: Record) -> float | None:
    """See BOUND_RULE."""
    compute, link = compute_s(run), link_s(run)
    return None if compute is None or link is None else max(compute, link)


def overlap(run: Record) -> Overlap | None:
    """See OVERLAP_RULE. None where nothing worth overlapping leaves a node."""
    link = link_s(run)
    if run.impl == FLOOR or not link or (run.inter_node_bytes_per_node or 0) < CONTROL_BYTES:
        return None
    share = run.details.get("sent_while_computing_share")
    if share is not None:
        return Overlap(share, at_least=False)
    if run.exposed_comm_s is None:
        return None
    return Overlap(max(0.0, 1 - run.exposed_comm_s / link), at_least=True)


def best_overlap(run: Record) -> float | None:
    """The share of a step's bytes that fits beside its blocks."""
    compute, link = compute_s(run), link_s(run)
    return min(1.0, compute / link) if compute is not None and link and overlap(run) else None


def training_but_for(run: Record, section: str, key: str) -> str:
    """Equal for runs whose training and place differ in that key of the configuration only, and in how
    often a step was timed; whatever stage asked for them."""
    evidence, shared = json.loads(training_key(run))
    ignored = {(section, key), ("train", "steps"), ("train", "warmup")}
    for name in {name for name, _ in ignored}:
        shared[name] = {item: value for item, value in shared[name].items() if (name, item) not in ignored}
    return json.dumps([evidence, shared], sort_keys=True)


def emulated_runs(runs: Iterable[Record]) -> list[Record]:
    """Those of several nodes, as only these use the emulated network."""
    return [run for run in runs if is_emulated(run) and run.nodes > 1]
