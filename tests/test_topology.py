"""Partition and replication groups over random shapes of worlds, nodes and partitions."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from suite.impls.sharded.topology import PartitionTopology


@st.composite
def topologies(draw: st.DrawFn) -> PartitionTopology:
    ranks_per_node = draw(st.integers(1, 6))
    world_size = ranks_per_node * draw(st.integers(1, 6))
    divisors = [size for size in range(1, world_size + 1) if world_size % size == 0]
    return PartitionTopology(world_size, ranks_per_node, draw(st.sampled_from(divisors)))


@given(topologies())
def test_every_rank_is_in_one_partition_group_and_one_replication_group(topology: PartitionTopology) -> None:
    everyone = list(range(topology.world_size))
    assert sorted(rank for group in topology.partition_groups() for rank in group) == everyone
    assert sorted(rank for group in topology.replication_groups() for rank in group) == everyone
    for rank in everyone:
        assert rank in topology.partition_group(rank)
        assert rank in topology.replication_group(rank)


@given(topologies())
def test_a_partition_group_holds_every_shard_once_and_a_replication_group_one_shard(
    topology: PartitionTopology,
) -> None:
    for group in topology.partition_groups():
        assert [topology.shard_index(rank) for rank in group] == list(range(topology.partition_size))
    for group in topology.replication_groups():
        assert len({topology.shard_index(rank) for rank in group}) == 1
        assert len(group) == topology.replicas


@given(topologies())
def test_in_a_group_of_whole_nodes_equal_local_ranks_hold_one_contiguous_segment(
    topology: PartitionTopology,
) -> None:
    if not topology.hierarchical:
        return
    nodes = topology.nodes_per_group
    for group in topology.partition_groups():
        for local_rank in range(topology.ranks_per_node):
            members = [rank for rank in group if rank % topology.ranks_per_node == local_rank]
            shards = sorted(topology.shard_index(rank) for rank in members)
            assert shards == list(range(local_rank * nodes, (local_rank + 1) * nodes))


@pytest.mark.parametrize(("world", "per_node", "partition"), [(8, 3, 8), (8, 4, 3), (8, 4, 0)])
def test_sizes_that_do_not_divide_the_world_are_refused(world: int, per_node: int, partition: int) -> None:
    with pytest.raises(ValueError, match="does not divide world_size=8"):
        PartitionTopology(world, per_node, partition)
