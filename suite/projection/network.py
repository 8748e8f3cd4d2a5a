"""What a collective costs: volume and latency, ring and tree, flat and hierarchical.

Times of a group depend on its shape alone, so they cost the same to compute for 8 ranks as for
100,000. Volumes and latencies are those of S2: a flat ring of p ranks moves (p-1)/p of the buffer
over every link and pays one hop per rank; a hierarchical one moves (p-k)/p between nodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from suite.projection.hardware import Hardware


class Kind(Enum):
    """Logical collectives; sizes are given as in `Collective.nbytes`."""

    ALL_GATHER = "all-gather"
    REDUCE_SCATTER = "reduce-scatter"
    ALL_REDUCE = "all-reduce"
    REDUCE = "reduce"
    BROADCAST = "broadcast"


class Wire(Enum):
    """What a stage of a collective occupies."""

    INTRA = "intra-node"
    INTER = "inter-node"


@dataclass(frozen=True)
class Group:
    """`nodes` x `per_node` ranks; `sharing` groups of this shape share each node's link at once."""

    nodes: int
    per_node: int
    sharing: int = 1

    @property
    def size(self) -> int:
        return self.nodes * self.per_node


@dataclass(frozen=True)
class Groups:
    """The three groups of any rank (see `PartitionTopology`): they are alike for all ranks."""

    partition: Group
    replication: Group
    world: Group


@dataclass(frozen=True)
class Collective:
    """`nbytes` is the whole buffer: the output of a gather, the input of a reduction, on one rank."""

    kind: Kind
    nbytes: float
    group: Group
    hierarchical: bool = False


@dataclass(frozen=True)
class Stage:
    """A part of a collective that occupies one wire. `node_bytes` leave every node in it,
    `sent_bytes` every rank (on average)."""

    wire: Wire
    seconds: float
    node_bytes: float
    sent_bytes: float


def make_groups(world_size: int, ranks_per_node: int, partition_size: int) -> Groups:
    """Ranks are numbered node by node and a partition group is a run of consecutive ranks.

    Raises ValueError when it neither fills whole nodes nor divides one.
    """
    k, p = ranks_per_node, partition_size
    nodes, replicas = world_size // k, world_size // p
    if (p % k and k % p) or world_size % k or world_size % p:
        raise ValueError(f"partition groups of {p} ranks do not fit {nodes} nodes of {k} ranks")
    if p <= k:
        return Groups(Group(1, p, k // p), Group(nodes, k // p, p), Group(nodes, k))
    return Groups(Group(p // k, k), Group(replicas, 1, k), Group(nodes, k))


def stages(collective: Collective, hardware: Hardware) -> tuple[Stage, ...]:
    """What the collective occupies, one stage after the other; empty for a group of one rank."""
    group, kind = collective.group, collective.kind
    if group.size == 1:
        return ()
    if not (collective.hierarchical and group.nodes > 1 and group.per_node > 1):
        return (_flat(kind, collective.nbytes, group, hardware),)
    between = Group(group.nodes, 1, group.per_node * group.sharing)
    inside = Group(1, group.per_node, group.sharing)
    outer = _flat(kind, collective.nbytes / group.per_node, between, hardware)
    if kind is Kind.ALL_GATHER:
        return outer, _flat(kind, collective.nbytes, inside, hardware)
    if kind is Kind.REDUCE_SCATTER:
        return _flat(kind, collective.nbytes, inside, hardware), outer
    raise ValueError(f"there is no hierarchical {kind.value}")


def _flat(kind: Kind, nbytes: float, group: Group, hardware: Hardware) -> Stage:
    ring = _ring(nbytes, group, hardware)
    if kind is not Kind.ALL_REDUCE:
        return ring
    # A ring all-reduce is a reduce-scatter and an all-gather; libraries take a tree where it is faster.
    twice = _scaled(ring, 2.0)
    return min(twice, _tree(nbytes, group, hardware), key=lambda stage: stage.seconds)


def _ring(nbytes: float, group: Group, hardware: Hardware) -> Stage:
    """Each rank passes on all but one of the group's chunks; a reduction or broadcast to or from one
    rank is pipelined around the same ring and passes (nearly) as much."""
    passed = nbytes * (group.size - 1) / group.size
    hops_out = min(group.nodes, group.size - 1) if group.nodes > 1 else 0
    latency = hops_out * hardware.inter.latency_s + (group.size - 1 - hops_out) * hardware.intra.latency_s
    return _stage(passed, passed, latency, group, hardware)


def _tree(nbytes: float, group: Group, hardware: Hardware) -> Stage:
    """Up and down a double binary tree over the nodes, with a chain inside each of them."""
    depth = math.ceil(math.log2(group.nodes)) if group.nodes > 1 else 0
    latency = 2 * (depth * hardware.inter.latency_s + (group.per_node - 1) * hardware.intra.latency_s)
    return _stage(2.0 * nbytes, 2.0 * nbytes, latency, group, hardware)


def _stage(passed: float, leaving: float, latency: float, group: Group, hardware: Hardware) -> Stage:
    inside = passed / hardware.intra.bytes_s
    if group.nodes == 1:
        return Stage(Wire.INTRA, hardware.launch_s + latency + inside, 0.0, passed)
    leaving *= group.sharing
    seconds = hardware.launch_s + latency + max(inside, leaving / hardware.inter.bytes_s)
    return Stage(Wire.INTER, seconds, leaving, passed)


def _scaled(stage: Stage, factor: float) -> Stage:
    return Stage(stage.wire, stage.seconds * factor, stage.node_bytes * factor, stage.sent_bytes * factor)


Cost = Callable[[Collective], tuple[Stage, ...]]
"""What the executor asks for a collective's stages."""


def cost_on(hardware: Hardware) -> Cost:
    """`stages` on this hardware, each distinct collective computed once."""
    known: dict[Collective, tuple[Stage, ...]] = {}

    def cost(collective: Collective) -> tuple[Stage, ...]:
        if collective not in known:
            known[collective] = stages(collective, hardware)
        return known[collective]

    return cost
