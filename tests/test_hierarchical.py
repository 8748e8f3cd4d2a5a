"""Two-stage and ring collectives against plain arithmetic, over shapes of nodes, in both orders."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_collectives import Layout, layouts, values
from torch import Tensor

from suite.impls.sharded.collectives import Reduction
from suite.impls.sharded.groups import make_partition
from suite.impls.sharded.options import EngineOptions
from suite.impls.sharded.topology import PartitionTopology
from suite.testbeds.local import LocalTestbed
from suite.testbeds.ranks import LocalRanks
from suite.testbeds.testbed import RankContext

CPU = torch.device("cpu")


class Program:
    def __init__(self, context: RankContext) -> None:
        self._rank, self._size = context.rank, context.world_size

    def correct(
        self,
        ranks_per_node: int,
        partition_size: int,
        hierarchical: bool,
        stock: bool,
        in_rank_order: bool,
        shard_numel: int,
        layout: Layout,
        dtype: torch.dtype,
    ) -> bool:
        """Whether a gather and a reduce-scatter, both in flight twice, are right on this rank."""
        topology = PartitionTopology(self._size, ranks_per_node, partition_size, hierarchical)
        options = EngineOptions(stock_collectives=stock)
        collectives = make_partition(topology, options, CPU, in_rank_order and not stock)
        members = topology.partition_group(self._rank)
        if in_rank_order and not stock:
            members = sorted(members)
        assert collectives.index == members.index(self._rank)
        fulls = [torch.full((partition_size * shard_numel,), torch.nan, dtype=dtype) for _ in range(2)]
        shards = [torch.full((shard_numel,), torch.nan) for _ in range(2)]
        handles = []
        for number in range(2):
            own = values(self._rank, number, shard_numel, dtype)
            handles.append(collectives.all_gather([fulls[number]], [own]))
            addend = self._addend(self._rank, number, partition_size * shard_numel, layout, dtype)
            pieces = [(offset, addend.narrow(0, offset, numel).clone()) for offset, numel in layout]
            handles.append(collectives.reduce_scatter([Reduction(shards[number], pieces)]))
        for handle in reversed(handles):
            handle.wait()
        collectives.close()
        return all(
            torch.equal(fulls[n], torch.cat([values(rank, n, shard_numel, dtype) for rank in members]))
            and torch.equal(shards[n], self._sum(members, n, collectives.index, shard_numel, layout, dtype))
            for n in range(2)
        )

    def _sum(
        self,
        members: list[int],
        number: int,
        index: int,
        shard_numel: int,
        layout: Layout,
        dtype: torch.dtype,
    ) -> Tensor:
        numel = len(members) * shard_numel
        addends = [self._addend(rank, number, numel, layout, dtype).float() for rank in members]
        return torch.stack(addends).sum(0).narrow(0, index * shard_numel, shard_numel)

    def _addend(self, rank: int, number: int, numel: int, layout: Layout, dtype: torch.dtype) -> Tensor:
        flat = torch.zeros(numel, dtype=dtype)
        for piece, (offset, size) in enumerate(layout):
            flat.narrow(0, offset, size).copy_(values(rank, 10 * number + piece, size, dtype))
        return flat


@pytest.fixture(scope="module", params=range(1, 9))
def ranks(request: pytest.FixtureRequest) -> Iterator[LocalRanks]:
    with LocalTestbed(request.param, request.param).launch(Program, 60) as running:
        yield running


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    hierarchical=st.booleans(),
    stock=st.booleans(),
    in_rank_order=st.booleans(),
    shard_numel=st.integers(1, 40),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_gather_and_reduce_scatter_are_right_for_any_shape_of_nodes(
    ranks: LocalRanks,
    data: st.DataObject,
    hierarchical: bool,
    stock: bool,
    in_rank_order: bool,
    shard_numel: int,
    dtype: torch.dtype,
) -> None:
    world = len(ranks.pids())
    divisors = [size for size in range(1, world + 1) if world % size == 0]
    ranks_per_node, partition_size = (data.draw(st.sampled_from(divisors)) for _ in range(2))
    layout = data.draw(layouts(shard_numel * partition_size))
    arguments = (
        ranks_per_node,
        partition_size,
        hierarchical,
        stock,
        in_rank_order,
        shard_numel,
        layout,
        dtype,
    )
    assert all(ranks.call("correct", *arguments, timeout_s=30))
