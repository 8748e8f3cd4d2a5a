"""What can be expected of a cluster before anything is benchmarked on it: equal nodes, clocks that agree,
links that carry what they should."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.distributed as dist

from suite.harness.doctor import Finding
from suite.harness.nodes import Node, differences, nodes_of
from suite.testbeds.testbed import RankContext
from suite.testbeds.torchrun import Seats, TorchrunTestbed

SIZES = [2**10, 2**14, 2**18, 2**22, 2**26]
"""Bytes per all-reduce."""

REPETITIONS = 5
CLOCK_LIMIT_S = 0.05
SLOW_LINK = 0.7
"""A pair of nodes below this share of the median pair is reported."""

TIMEOUT_S = 300.0
PINGS = 20


@dataclass(frozen=True)
class Clock:
    """How far a node's clock is ahead of the first node's; known up to `uncertain_s`."""

    ahead_s: float
    uncertain_s: float


class AllReduce:
    """One rank's part of the sweeps: each answers seconds, the median of a few repetitions."""

    def __init__(self, context: RankContext) -> None:
        self._context = context
        self._pairs: dict[int, dist.ProcessGroup] = {}

    def everybody(self, size: int) -> float:
        """All ranks together, `size` bytes per rank."""
        return self._time(size, None)

    def pair(self, node: int, size: int) -> float | None:
        """All ranks of a node and of the next one; the others wait."""
        context = self._context
        per_node = context.ranks_per_node
        other = (node + 1) % (context.world_size // per_node)
        members = [n * per_node + local for n in sorted((node, other)) for local in range(per_node)]
        group = dist.new_group(members)  # everybody takes part in making it
        seconds = self._time(size, group) if context.rank in members else None
        context.barrier()
        return seconds

    def _time(self, size: int, group: dist.ProcessGroup | None) -> float:
        device = self._context.device
        data = torch.zeros(size // 4, device=device)
        times = []
        for _ in range(1 + REPETITIONS):
            dist.barrier(group)
            _synchronize(device)
            start = time.perf_counter()
            dist.all_reduce(data, group=group)
            _synchronize(device)
            times.append(time.perf_counter() - start)
        return median(times[1:])


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def examine_cluster(seats: Seats, testbed: TorchrunTestbed) -> list[Finding]:
    """Of the nodes that hold those seats; the driver calls it. Takes some seconds."""
    nodes = nodes_of(seats)
    findings = [_equality(nodes), *(Finding(fact, True, value) for fact, value in nodes[0].facts.items())]
    findings.append(_clocks(nodes, [clock_of(seats, n * seats.ranks_per_node) for n in range(seats.nodes)]))
    with testbed.launch(AllReduce, TIMEOUT_S) as ranks:
        for size in SIZES:
            seconds = max(ranks.call("everybody", size, timeout_s=TIMEOUT_S))
            findings.append(Finding(f"all-reduce of {_bytes(size)}", True, _speed(size, seconds, len(seats))))
        if seats.nodes > 2:  # with two nodes the pair is everybody
            size = SIZES[-1]
            pairs = [
                max(s for s in ranks.call("pair", n, size, timeout_s=TIMEOUT_S) if s is not None)
                for n in range(seats.nodes)
            ]
            findings.append(_links(nodes, pairs, size))
    return findings


def clock_of(seats: Seats, rank: int) -> Clock:
    """The seat is asked for its time between two looks at ours; the fastest of some tries says most."""
    best = Clock(0.0, float("inf"))
    for _ in range(PINGS):
        before = time.time()
        theirs = seats.ask(rank, "run", time.time)
        after = time.time()
        uncertain = (after - before) / 2
        if uncertain < best.uncertain_s:
            best = Clock(theirs - (before + after) / 2, uncertain)
    return best


def _equality(nodes: Sequence[Node]) -> Finding:
    found = differences(nodes)
    names = ", ".join(dict.fromkeys(node.name for node in nodes))
    return Finding("equal nodes", not found, f"{len(nodes)} nodes: {names}", "; ".join(found))


def _clocks(nodes: Sequence[Node], clocks: Sequence[Clock]) -> Finding:
    worst = max(range(len(clocks)), key=lambda number: abs(clocks[number].ahead_s))
    clock = clocks[worst]
    ok = abs(clock.ahead_s) <= CLOCK_LIMIT_S + clock.uncertain_s
    ahead, uncertain = clock.ahead_s * 1e3, clock.uncertain_s * 1e3
    detail = f"node {worst} ({nodes[worst].name}) is {ahead:+.1f} ± {uncertain:.1f} ms"
    return Finding("clocks", ok, f"{detail} from node 0", "" if ok else "run chrony or ntpd on every node")


def _links(nodes: Sequence[Node], seconds: Sequence[float], size: int) -> Finding:
    usual = median(seconds)
    slow = [number for number, value in enumerate(seconds) if usual < SLOW_LINK * value]
    worst = f"slowest pair: {size / max(seconds) / 1e9:.2f}, median: {size / usual / 1e9:.2f} GB/s"
    pairs = ", ".join(f"{nodes[number].name} and {nodes[(number + 1) % len(nodes)].name}" for number in slow)
    remedy = f"slow between {pairs}: look at cables, ports and placement" if slow else ""
    return Finding("links between nodes", not slow, worst, remedy)


def _speed(size: int, seconds: float, ranks: int) -> str:
    """Bus bandwidth: what every rank sends if the all-reduce moves no more than it must."""
    bus = size * 2 * (ranks - 1) / ranks / seconds
    return f"{seconds * 1e6:.0f} µs, {bus / 1e9:.2f} GB/s out of each rank"


def _bytes(size: int) -> str:
    return f"{size // 2**20} MiB" if size >= 2**20 else f"{size // 2**10} KiB"
