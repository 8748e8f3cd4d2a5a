"""Who holds what: partition groups, replication groups and shard order, as pure arithmetic.

Ranks are numbered node by node. A partition group is a run of consecutive ranks that together hold
one replica of the model states; a replication group is the ranks that hold the same shard (S2,
"Scale-aware model partitioning").
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PartitionTopology:
    """Groups for `world_size` ranks on nodes of `ranks_per_node`, sharded over `partition_size` ranks.

    `wants_hierarchical` asks for collectives in two stages where a partition group is made of several
    whole nodes; elsewhere (a group inside one node, or across parts of nodes) they are flat.
    Raises ValueError when the partition size does not divide the world, or the nodes do not fill it.
    """

    world_size: int
    ranks_per_node: int
    partition_size: int
    wants_hierarchical: bool = True

    def __post_init__(self) -> None:
        for name, value in (
            ("ranks_per_node", self.ranks_per_node),
            ("partition_size", self.partition_size),
        ):
            if value < 1 or self.world_size % value:
                raise ValueError(f"{name}={value} does not divide world_size={self.world_size}")

    @property
    def replicas(self) -> int:
        """How many copies of the model states the world holds."""
        return self.world_size // self.partition_size

    @property
    def hierarchical(self) -> bool:
        """Whether collectives run in two stages: asked for, and several whole nodes of several ranks."""
        fills_nodes = self.partition_size % self.ranks_per_node == 0
        several = self.partition_size > self.ranks_per_node > 1
        return self.wants_hierarchical and fills_nodes and several

    @property
    def crosses_nodes(self) -> bool:
        """Whether some partition group has ranks on several nodes."""
        return self.ranks_per_node % self.partition_size != 0

    @property
    def nodes_per_group(self) -> int:
        """Nodes that a partition group is made of, when its collectives are hierarchical."""
        return self.partition_size // self.ranks_per_node

    def shard_index(self, rank: int) -> int:
        """Which shard this rank holds, 0 .. partition_size - 1: in rank order when collectives are flat.

        Otherwise, in a group of n nodes x k local ranks it is `local_rank * n + node`: then what the ranks of
        equal local rank hold together is one contiguous segment, so that the inter-node stage of a
        hierarchical all-gather delivers that segment in place and the intra-node stage the whole,
        with no re-arrangement copy between them.
        """
        position = rank % self.partition_size
        if not self.hierarchical:
            return position
        node, local_rank = divmod(position, self.ranks_per_node)
        return local_rank * self.nodes_per_group + node

    def partition_group(self, rank: int) -> list[int]:
        """The ranks of this rank's partition group, in shard order."""
        first = rank - rank % self.partition_size
        return sorted(range(first, first + self.partition_size), key=self.shard_index)

    def replication_group(self, rank: int) -> list[int]:
        """The ranks that hold the same shard as this one, in rank order."""
        return list(range(rank % self.partition_size, self.world_size, self.partition_size))

    def partition_groups(self) -> list[list[int]]:
        """All partition groups, each in shard order."""
        return [self.partition_group(first) for first in range(0, self.world_size, self.partition_size)]

    def replication_groups(self) -> list[list[int]]:
        """All replication groups, each in rank order."""
        return [self.replication_group(rank) for rank in range(self.partition_size)]

    # --- bytes that leave a node, by which methods differ on a slow network

    def gather_inter_node_bytes(self, nbytes: float) -> float:
        """Per node, for one all-gather (or reduce-scatter) of a full buffer of `nbytes` in every
        partition group: (p - k) / p of it when hierarchical, (p - 1) / p in a flat ring (S2). Where
        groups do not fill whole nodes, the ring's edges that cross are counted."""
        shard = nbytes / self.partition_size
        if self.hierarchical:
            return shard * (self.partition_size - self.ranks_per_node)
        nodes = self.world_size // self.ranks_per_node
        crossing = sum(self._crossing_edges(sorted(group)) for group in self.partition_groups())
        return shard * (self.partition_size - 1) * crossing / nodes

    def hop2_inter_node_bytes(self, nbytes: float) -> float:
        """Per node, for adding up the shards of a full buffer of `nbytes` over the replicas: an
        all-reduce in a ring, 2 (r - 1) / r of each shard over every edge that crosses."""
        nodes = self.world_size // self.ranks_per_node
        shard = nbytes / self.partition_size
        crossing = sum(self._crossing_edges(group) for group in self.replication_groups())
        return 2 * shard * (self.replicas - 1) / self.replicas * crossing / nodes

    def _crossing_edges(self, ring: list[int]) -> int:
        """Neighbours in a ring of ranks that are on different nodes."""
        following = [*ring[1:], ring[0]]
        return sum(
            a // self.ranks_per_node != b // self.ranks_per_node for a, b in zip(ring, following, strict=True)
        )
