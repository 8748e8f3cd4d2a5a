"""Every kind of collective against plain arithmetic, over world sizes, odd sizes, holes and dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from suite.impls.sharded.collectives import AloneCollectives, Collectives, Reduction
from suite.impls.sharded.cross_memory import CrossMemoryCollectives
from suite.impls.sharded.direct import DirectCollectives
from suite.impls.sharded.native import FlatteningCollectives, NativeCollectives
from suite.impls.sharded.ring import AcrossNodesCollectives, RingCollectives
from suite.testbeds.local import LocalTestbed
from suite.testbeds.ranks import LocalRanks
from suite.testbeds.testbed import RankContext

KINDS: dict[str, Callable[[dist.ProcessGroup, int, int], Collectives]] = {
    kind.__name__: kind
    for kind in (
        CrossMemoryCollectives,
        DirectCollectives,
        RingCollectives,
        AcrossNodesCollectives,
        NativeCollectives,
        FlatteningCollectives,
    )
}
Layout = Sequence[tuple[int, int]]
"""(offset, size) of the pieces of a flat buffer; what lies between them is padding."""


def values(rank: int, number: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Small whole numbers: their sums are exact in every dtype, so results can be compared exactly."""
    generator = torch.Generator().manual_seed(1000 * rank + number)
    return torch.randint(-8, 9, (numel,), generator=generator).to(dtype)


class Program:
    def __init__(self, context: RankContext) -> None:
        self._rank = context.rank
        self._size = context.world_size
        self._made: dict[str, Collectives] = {}

    def _collectives(self, kind: str) -> Collectives:
        if self._size == 1:
            return AloneCollectives(0, 1)
        if kind not in self._made:
            assert dist.group.WORLD is not None
            self._made[kind] = KINDS[kind](dist.group.WORLD, self._rank, self._size)
        return self._made[kind]

    def all_gather(self, kind: str, sizes: Sequence[int], dtype: torch.dtype) -> bool:
        shards = [values(self._rank, number, numel, dtype) for number, numel in enumerate(sizes)]
        fulls = [torch.full((self._size * numel,), torch.nan, dtype=dtype) for numel in sizes]
        self._collectives(kind).all_gather(fulls, shards).wait()
        return all(
            torch.equal(full, torch.cat([values(rank, number, numel, dtype) for rank in range(self._size)]))
            for number, (full, numel) in enumerate(zip(fulls, sizes, strict=True))
        )

    def reduce_scatter(
        self, kind: str, shard_numel: int, layout: Layout, dtype: torch.dtype, accumulate: bool
    ) -> bool:
        before = values(self._rank, 99, shard_numel, torch.float32)
        shard = before.clone() if accumulate else torch.full((shard_numel,), torch.nan)
        addends = [self._addend(rank, shard_numel, layout, dtype) for rank in range(self._size)]
        pieces = [(offset, addends[self._rank].narrow(0, offset, numel).clone()) for offset, numel in layout]
        item = Reduction(shard, pieces, accumulate)
        self._collectives(kind).reduce_scatter([item]).wait()
        total = torch.stack([addend.float() for addend in addends]).sum(0)
        expected = total.narrow(0, self._rank * shard_numel, shard_numel)
        return torch.equal(shard, expected + before if accumulate else expected)

    def _addend(self, rank: int, shard_numel: int, layout: Layout, dtype: torch.dtype) -> Tensor:
        flat = torch.zeros(self._size * shard_numel, dtype=dtype)
        for number, (offset, numel) in enumerate(layout):
            flat.narrow(0, offset, numel).copy_(values(rank, number, numel, dtype))
        return flat

    def all_reduce(self, kind: str, sizes: Sequence[int], wire: torch.dtype) -> bool:
        tensors = [values(self._rank, number, numel, torch.float32) for number, numel in enumerate(sizes)]
        self._collectives(kind).all_reduce(tensors, wire).wait()
        return all(
            torch.equal(tensor, sum(values(rank, number, numel, torch.float32) for rank in range(self._size)))
            for number, (tensor, numel) in enumerate(zip(tensors, sizes, strict=True))
        )

    def rounded_sum(self, kind: str) -> float:
        """256 on one rank and 1 on each other: added up in bf16 it stays 256."""
        tensor = torch.full((64,), 256.0 if self._rank == 0 else 1.0)
        self._collectives(kind).all_reduce([tensor], torch.bfloat16).wait()
        assert torch.equal(tensor, tensor[:1].expand(64))
        return float(tensor[0])

    def two_in_flight(self, kind: str) -> bool:
        """A gather is started before the reduction before it is over, and waited for first."""
        collectives = self._collectives(kind)
        shard, full = torch.empty(5), torch.empty(5 * self._size)
        pieces = [(0, torch.ones(5 * self._size))]
        reduction = collectives.reduce_scatter([Reduction(shard, pieces)])
        gather = collectives.all_gather([full], [torch.full((5,), float(self._rank))])
        gather.wait()
        reduction.wait()
        expected = torch.arange(self._size).repeat_interleave(5).float()
        return torch.equal(full, expected) and torch.equal(shard, torch.full((5,), float(self._size)))


@pytest.fixture(scope="module", params=range(1, 9))
def ranks(request: pytest.FixtureRequest) -> Iterator[LocalRanks]:
    with LocalTestbed(request.param, request.param).launch(Program, 60) as running:
        yield running


quick = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
kinds = st.sampled_from(sorted(KINDS))
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@quick
@given(kind=kinds, sizes=st.lists(st.integers(1, 70), min_size=1, max_size=4), dtype=dtypes)
def test_all_gather_puts_every_shard_in_its_place(
    ranks: LocalRanks, kind: str, sizes: list[int], dtype: torch.dtype
) -> None:
    assert all(ranks.call("all_gather", kind, sizes, dtype, timeout_s=30))


@st.composite
def layouts(draw: st.DrawFn, numel: int) -> Layout:
    """Pieces in order, with holes, of any sizes, inside `numel` elements; some empty."""
    cuts = sorted(draw(st.lists(st.integers(0, numel), min_size=0, max_size=8)))
    return [(begin, end - begin) for begin, end in zip(cuts[::2], cuts[1::2], strict=False)]


@quick
@given(data=st.data(), kind=kinds, dtype=dtypes, accumulate=st.booleans())
def test_reduce_scatter_sums_pieces_where_they_lie_and_leaves_padding_zero(
    ranks: LocalRanks, data: st.DataObject, kind: str, dtype: torch.dtype, accumulate: bool
) -> None:
    shard_numel = data.draw(st.integers(1, 40))
    layout = data.draw(layouts(shard_numel * len(ranks.pids())))
    assert all(ranks.call("reduce_scatter", kind, shard_numel, layout, dtype, accumulate, timeout_s=30))


@quick
@given(kind=kinds, sizes=st.lists(st.integers(1, 70), min_size=1, max_size=4), wire=dtypes)
def test_all_reduce_sums_on_every_rank(
    ranks: LocalRanks, kind: str, sizes: list[int], wire: torch.dtype
) -> None:
    assert all(ranks.call("all_reduce", kind, sizes, wire, timeout_s=30))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_collectives_may_overlap_and_be_waited_for_in_any_order(ranks: LocalRanks, kind: str) -> None:
    assert all(ranks.call("two_in_flight", kind, timeout_s=30))


@pytest.mark.parametrize("kind", ["DirectCollectives", "AcrossNodesCollectives", "CrossMemoryCollectives"])
def test_what_travels_rounded_is_added_up_in_full(ranks: LocalRanks, kind: str) -> None:
    size = len(ranks.pids())
    exact = float(torch.tensor(255.0 + size).bfloat16()) if size > 1 else 256.0
    assert ranks.call("rounded_sum", kind, timeout_s=30) == [exact] * size
