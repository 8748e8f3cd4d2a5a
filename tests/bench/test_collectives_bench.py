"""The engine's collectives against stock gloo: `make bench` prints the table.

A call moves one flat buffer of the named size; the time is that of the slowest rank. Run as a plain
test (benchmarks disabled) each case is executed once, so that it cannot rot.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from suite.impls.sharded.collectives import Reduction
from suite.impls.sharded.cross_memory import CrossMemoryCollectives
from suite.impls.sharded.direct import DirectCollectives
from suite.impls.sharded.native import NativeCollectives
from suite.testbeds.local import LocalTestbed
from suite.testbeds.ranks import LocalRanks
from suite.testbeds.testbed import RankContext

KINDS: dict[str, type[CrossMemoryCollectives | DirectCollectives | NativeCollectives]] = {
    "cross memory": CrossMemoryCollectives,
    "direct": DirectCollectives,
    "stock gloo": NativeCollectives,
}


class Program:
    def __init__(self, context: RankContext) -> None:
        self._context = context

    def prepare(self, kind: str, mebibytes: int) -> None:
        size = self._context.world_size
        self._collectives = KINDS[kind](dist.group.WORLD, self._context.rank, size)
        shard_numel = mebibytes * 2**20 // 4 // size
        self._shard = torch.ones(shard_numel)
        self._full = torch.ones(shard_numel * size)

    def all_gather(self) -> float:
        self._context.barrier()
        start = time.perf_counter()
        self._collectives.all_gather([self._full], [self._shard]).wait()
        return time.perf_counter() - start

    def reduce_scatter(self) -> float:
        self._context.barrier()
        start = time.perf_counter()
        self._collectives.reduce_scatter([Reduction(self._shard, [(0, self._full)])]).wait()
        return time.perf_counter() - start


@pytest.fixture(scope="module", params=[2, 4, 8], ids="{} ranks".format)
def ranks(request: pytest.FixtureRequest) -> Iterator[LocalRanks]:
    with LocalTestbed(request.param, request.param).launch(Program, 60) as running:
        yield running


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mebibytes", [1, 16, 64], ids="{} MiB".format)
@pytest.mark.parametrize("operation", ["all_gather", "reduce_scatter"])
def test_collective(benchmark, ranks: LocalRanks, operation: str, mebibytes: int, kind: str) -> None:  # type: ignore[no-untyped-def]
    ranks.call("prepare", kind, mebibytes, timeout_s=60)
    benchmark.group = f"{operation}, {mebibytes} MiB, {len(ranks.pids())} ranks"
    times = benchmark.pedantic(
        ranks.call, args=(operation,), kwargs={"timeout_s": 60}, rounds=7, warmup_rounds=1
    )
    assert len(times) == len(ranks.pids()) and min(times) > 0
