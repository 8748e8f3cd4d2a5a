"""The process groups of a topology, each with the best collectives for its backend."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist

from suite.impls.sharded.collectives import AloneCollectives, Collectives
from suite.impls.sharded.cross_memory import CrossMemoryCollectives
from suite.impls.sharded.direct import DirectCollectives
from suite.impls.sharded.hierarchical import DirectHierarchicalCollectives, Place
from suite.impls.sharded.native import (
    FlatteningCollectives,
    NativeCollectives,
    NativeHierarchicalCollectives,
)
from suite.impls.sharded.options import EngineOptions
from suite.impls.sharded.ring import AcrossNodesCollectives, RingCollectives
from suite.impls.sharded.topology import PartitionTopology


@dataclass(frozen=True)
class Groups:
    """What a rank communicates through.

    `partition` gathers weights and reduces gradients at every micro-step (hop 1), `replication` adds
    gradients up across the replicas (hop 2).
    """

    topology: PartitionTopology
    partition: Collectives
    replication: Collectives

    @property
    def world_size(self) -> int:
        return self.partition.size * self.replication.size

    def quiesce(self) -> None:
        """Until no other rank reads this one's weights and gradients; every rank calls it."""
        self.partition.quiesce()
        self.replication.quiesce()

    @property
    def read_from(self) -> dict[int, int]:
        """Bytes read from other ranks' memory, by global rank."""
        # No rank is in both groups but this one itself.
        return self.partition.read_from | self.replication.read_from

    def close(self) -> None:
        self.partition.close()
        self.replication.close()


def make_groups(topology: PartitionTopology, options: EngineOptions, device: torch.device) -> Groups:
    """Every rank calls it, after `init_process_group`: the groups of all ranks are made in one order."""
    partition = make_partition(topology, options, device)
    # Where a node holds several replicas of a shard, a ring keeps them from all crossing to all.
    ring = topology.partition_size < topology.ranks_per_node < topology.world_size
    kind = _flat_kind(options, device, ring)
    if kind in (CrossMemoryCollectives, DirectCollectives) and topology.ranks_per_node < topology.world_size:
        kind = AcrossNodesCollectives
    replication = _flat(topology.replication_groups(), topology.ranks_per_node, kind)
    return Groups(topology, partition, replication)


def make_partition(
    topology: PartitionTopology,
    options: EngineOptions,
    device: torch.device,
    in_rank_order: bool = False,
) -> Collectives:
    """The collectives of this rank's partition group.

    `in_rank_order` asks for shards to be numbered as the ranks are, also where that is not the
    topology's order; native hierarchical collectives cannot do that.
    """
    kind = _flat_kind(options, device, ring=topology.crosses_nodes)
    if topology.hierarchical and options.preflattened:
        return _hierarchical(topology, dist.get_rank(), device, kind is RingCollectives, in_rank_order)
    return _flat(topology.partition_groups(), topology.ranks_per_node, kind)


Flat = type[CrossMemoryCollectives | DirectCollectives | RingCollectives | NativeCollectives]


def _flat_kind(options: EngineOptions, device: torch.device, ring: bool) -> Flat:
    if not options.preflattened:
        return FlatteningCollectives
    if device.type != "cpu" or dist.get_backend() != "gloo" or options.stock_collectives:
        return NativeCollectives
    # gloo is served better by point-to-point messages than by itself, and memory better than by either.
    if ring:
        return RingCollectives
    return CrossMemoryCollectives if options.cross_memory else DirectCollectives


def _hierarchical(
    topology: PartitionTopology, rank: int, device: torch.device, direct: bool, in_rank_order: bool
) -> Collectives:
    members = [sorted(group) for group in topology.partition_groups()]
    position = rank % topology.partition_size
    node, local_rank = divmod(position, topology.ranks_per_node)
    if direct:
        place = Place(node, topology.nodes_per_group, local_rank, topology.ranks_per_node, in_rank_order)
        group = _own_group(members)
        return _owning(DirectHierarchicalCollectives(group, place), group)
    step = topology.ranks_per_node
    across = _own_group([group[local::step] for group in members for local in range(step)])
    inside = _own_group([group[i : i + step] for group in members for i in range(0, len(group), step)])
    return _owning(NativeHierarchicalCollectives(across, inside, device), across, inside)


def _flat(members: Sequence[Sequence[int]], ranks_per_node: int, kind: Flat) -> Collectives:
    size, rank = len(members[0]), dist.get_rank()
    if size == 1:
        return AloneCollectives(0, 1)
    own = next(ranks for ranks in members if rank in ranks)
    group, index = _own_group(members), own.index(rank)
    if kind is CrossMemoryCollectives:
        nodes = {member // ranks_per_node for member in own}
        return _owning(_within_host(group, index, size, nodes), group)
    return _owning(kind(group, index, size), group)


def _within_host(group: dist.ProcessGroup, index: int, size: int, nodes: set[int]) -> Collectives:
    """By memory where the topology says that the group is on one node and its ranks can do it."""
    if len(nodes) == 1:
        with suppress(OSError):
            return CrossMemoryCollectives(group, index, size)
    return DirectCollectives(group, index, size)


def _owning(collectives: Collectives, *groups: dist.ProcessGroup) -> Collectives:
    """The groups were made for these collectives, and end with them."""
    collectives.own_groups = groups
    return collectives


def _own_group(members: Sequence[Sequence[int]]) -> dist.ProcessGroup:
    """A new process group for each of `members`; the one that this rank is in."""
    own, _ = dist.new_subgroups_by_enumeration([list(ranks) for ranks in members])
    assert own is not None
    return own
