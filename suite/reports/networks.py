"""Network sweeps: the same training on networks that differ in bandwidth only."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from suite.records import Record
from suite.reports.cohorts import FLOOR, labels, ranks
from suite.reports.emulated import emulated_runs, gbit_s, training_but_for

FAST_GBIT_S, SLOW_GBIT_S = 400, 100
"""Of the claim about networks (Z1); where a sweep has others, the nearest are compared."""


@dataclass(frozen=True)
class Network:
    """One training over bandwidths: `curves[label][gbit_s]`; `floor` likewise, empty without one."""

    key: str
    title: str
    curves: dict[str, dict[float, Record]]
    floor: dict[float, Record]

    @property
    def bandwidths(self) -> list[float]:
        return sorted({speed for points in self.curves.values() for speed in points})

    @property
    def any(self) -> Record:
        return next(iter(next(iter(self.curves.values())).values()))

    def fastest(self, speed: float) -> Record:
        runs = [points[speed] for points in self.curves.values() if speed in points]
        return min(runs, key=lambda run: run.step_time_s.median)

    def compared(self) -> tuple[float, float]:
        """(fast, slow)."""
        fast, slow = self._nearest(FAST_GBIT_S), self._nearest(SLOW_GBIT_S)
        return (fast, slow) if fast > slow else (self.bandwidths[-1], self.bandwidths[0])

    def _nearest(self, aim: float) -> float:
        return min(self.bandwidths, key=lambda speed: max(speed / aim, aim / speed))


def networks(runs: Iterable[Record]) -> list[Network]:
    """Trainings that were run on more than one bandwidth, whatever stage asked for it. Of several cohorts at
    one bandwidth the one with the most implementations counts: only what was timed in turns is compared."""
    groups: dict[str, dict[float, dict[str, list[Record]]]] = {}
    for run in emulated_runs(runs):
        cohorts = groups.setdefault(training_but_for(run, "cluster", "inter_node_gbit_s"), {}).setdefault(
            gbit_s(run), {}
        )
        cohorts.setdefault(run.cohort, []).append(run)
    several = [
        [run for cohorts in group.values() for run in max(cohorts.values(), key=len)]
        for group in groups.values()
        if len(group) > 1
    ]
    found = [_network(f"N{index}", group) for index, group in enumerate(several, 1)]
    return [network for network in found if network.curves]


def _network(key: str, group: Sequence[Record]) -> Network:
    curves: dict[str, dict[float, Record]] = {}
    for label, run in zip(labels(group), group, strict=True):
        curves.setdefault(label, {})[gbit_s(run)] = run
    floor = curves.pop(FLOOR, {})
    run = group[0]
    steps = f"{run.micro_steps} micro-step{'s' if run.micro_steps > 1 else ''}"
    title = f"{run.workload} as {run.config['workload'].get('scale_of')} on {run.config['cluster']['name']}"
    return Network(key, f"{title}, {ranks(run)}, {steps}", dict(sorted(curves.items())), floor)
