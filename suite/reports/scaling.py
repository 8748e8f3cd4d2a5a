"""Weak scaling: the same work per rank on different numbers of nodes.

Runs on different numbers of nodes can't be timed in turns; each of them has its own cohort.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from suite.records import Record
from suite.reports.cohorts import FLOOR, Ratio, cluster_name, labels, training_key

_SIZES = ("ranks", "nodes")


@dataclass(frozen=True)
class Curve:
    """One implementation on ever more nodes, at most one run per number of nodes."""

    label: str
    points: tuple[Record, ...]

    @property
    def impl(self) -> str:
        return self.points[0].impl

    def at(self, nodes: int) -> Record | None:
        return next((run for run in self.points if run.nodes == nodes), None)

    def efficiency(self, run: Record, base_nodes: int) -> Ratio | None:
        """Throughput per rank over that on `base_nodes` nodes, which the same work per rank makes a
        ratio of step times; None where the base is missing or larger."""
        base = self.at(base_nodes)
        return Ratio.of(base, run) if base is not None and base.nodes <= run.nodes else None


@dataclass(frozen=True)
class Family:
    """One training on several numbers of nodes; `floor` is the bound without communication."""

    key: str
    title: str
    curves: tuple[Curve, ...]
    floor: Curve | None

    @property
    def any(self) -> Record:
        return self.curves[0].points[-1]

    @property
    def members(self) -> tuple[Curve, ...]:
        return (*self.curves, self.floor) if self.floor else self.curves


def families(runs: Iterable[Record]) -> list[Family]:
    """All trainings that ran on more than one number of nodes, each with a network of its own between
    them (on one host, more ranks only share the same processors)."""
    groups: dict[str, list[Record]] = {}
    for run in runs:
        if run.testbed != "local" and run.config["train"].get("global_batch") is None:
            groups.setdefault(_family_key(run), []).append(run)
    scaled = [group for group in groups.values() if len({run.nodes for run in group}) > 1]
    found = [_family(f"W{index}", group) for index, group in enumerate(scaled, 1)]
    return [family for family in found if family.curves]


def _family_key(run: Record) -> str:
    evidence, shared = json.loads(training_key(run))
    for section in ("testbed", "cluster"):
        shared[section] = {key: v for key, v in (shared.get(section) or {}).items() if key not in _SIZES}
    return json.dumps([run.stage, evidence, shared], sort_keys=True)


def _family(key: str, group: Sequence[Record]) -> Family:
    named: dict[str, dict[int, Record]] = {}
    ordered = sorted(group, key=lambda run: run.started_at)
    for label, run in zip(labels(ordered), ordered, strict=True):
        named.setdefault(label, {})[run.nodes] = run  # the newest of several
    curves = [
        Curve(label, tuple(points[nodes] for nodes in sorted(points)))
        for label, points in sorted(named.items())
        if len(points) > 1
    ]
    return Family(
        key,
        _title(group[0]),
        tuple(curve for curve in curves if curve.impl != FLOOR),
        next((curve for curve in curves if curve.impl == FLOOR), None),
    )


def _title(run: Record) -> str:
    micro_steps = f"{run.micro_steps} micro-step{'s' if run.micro_steps > 1 else ''}"
    cluster = cluster_name(run)
    words = [
        run.workload,
        run.precision,
        *([cluster] if cluster else []),
        f"{run.ranks_per_node} ranks per node",
    ]
    return " · ".join([*words, f"{micro_steps} × micro-batch {run.micro_batch}"])
