"""What reading each other's memory adds to the rules that all collectives keep (test_collectives.py)."""

from __future__ import annotations

import ctypes
import errno
import gc
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from engine_scenarios import Stack, batch_of, one_forward

from suite.errors import RankError
from suite.impls.sharded import checkpoint, cross_memory, peer_memory, shard
from suite.impls.sharded.collectives import Collectives
from suite.impls.sharded.cross_memory import CrossMemoryCollectives
from suite.impls.sharded.groups import make_groups
from suite.impls.sharded.options import EngineOptions
from suite.impls.sharded.peer_memory import CALLS_IN_FLIGHT
from suite.impls.sharded.topology import PartitionTopology
from suite.testbeds.local import LocalTestbed
from suite.testbeds.ranks import LocalRanks
from suite.testbeds.testbed import RankContext

SIZE = 4
NUMEL = 50_000


class Program:
    def __init__(self, context: RankContext) -> None:
        self._rank = context.rank
        self._collectives = CrossMemoryCollectives(dist.group.WORLD, context.rank, SIZE)

    def forget_the_source(self) -> bool:
        """Ranks come to read one after the other, long after the first has dropped its source."""
        full = torch.empty(SIZE * NUMEL)
        handle = self._collectives.all_gather([full], [torch.full((NUMEL,), float(self._rank))])
        time.sleep(0.1 * self._rank)
        handle.wait()
        garbage = [torch.full((NUMEL,), torch.nan) for _ in range(20)]
        self._collectives.quiesce()
        del garbage
        return torch.equal(full, torch.arange(SIZE).float().repeat_interleave(NUMEL))

    def overwrite_after_quiesce(self) -> bool:
        full, source = torch.empty(SIZE * NUMEL), torch.full((NUMEL,), float(self._rank))
        handle = self._collectives.all_gather([full], [source])
        if self._rank != 0:
            time.sleep(0.2)
        handle.wait()
        self._collectives.quiesce()
        source.fill_(torch.nan)
        return torch.equal(full, torch.arange(SIZE).float().repeat_interleave(NUMEL))

    def post_many(self) -> bool:
        """More calls than may be in flight, the last one waited for first."""
        fulls = [torch.empty(SIZE) for _ in range(3 * CALLS_IN_FLIGHT)]
        handles = [
            self._collectives.all_gather([full], [torch.tensor([float(number * self._rank)])])
            for number, full in enumerate(fulls)
        ]
        for handle in reversed(handles):
            handle.wait()
        return all(torch.equal(full, torch.arange(SIZE) * float(n)) for n, full in enumerate(fulls))

    def bytes_read(self) -> dict[int, int]:
        before = self._collectives.read_from
        self._collectives.all_gather([torch.empty(SIZE * NUMEL)], [torch.zeros(NUMEL)]).wait()
        return {peer: count - before[peer] for peer, count in self._collectives.read_from.items()}

    def lose_a_peer(self) -> None:
        if self._rank == 2:
            os._exit(7)
        self._collectives.all_gather([torch.empty(SIZE)], [torch.zeros(1)]).wait()


@pytest.fixture(scope="module")
def ranks() -> Iterator[LocalRanks]:
    with LocalTestbed(SIZE, SIZE).launch(Program, 60) as running:
        yield running


def test_a_source_lives_until_the_last_peer_has_read_it(ranks: LocalRanks) -> None:
    assert all(ranks.call("forget_the_source", timeout_s=30))


def test_a_source_may_be_overwritten_after_quiesce(ranks: LocalRanks) -> None:
    assert all(ranks.call("overwrite_after_quiesce", timeout_s=30))


def test_more_calls_than_fit_in_flight_do_not_lock_each_other(ranks: LocalRanks) -> None:
    assert all(ranks.call("post_many", timeout_s=30))


def test_what_is_read_from_each_peer_is_counted(ranks: LocalRanks) -> None:
    for rank, read in enumerate(ranks.call("bytes_read", timeout_s=30)):
        assert set(read) == set(range(SIZE)) - {rank}
        assert all(4 * NUMEL <= nbytes <= 4 * NUMEL + 64 for nbytes in read.values())


def test_a_lost_peer_ends_the_wait_for_it() -> None:
    with pytest.raises(RankError, match="rank 2 exited with 7"):
        with LocalTestbed(SIZE, SIZE).launch(Program, 60) as running:
            running.call("lose_a_peer", timeout_s=30)


class Hesitant:
    """A C library that reads at most `limit` bytes at a time, of this process."""

    def __init__(self, limit: int) -> None:
        self._limit = limit

    def process_vm_readv(self, _: object, here: Any, count: ctypes.c_ulong, there: Any, *__: object) -> int:
        vectors = ctypes.POINTER(peer_memory._Vector)
        room = self._limit
        for number in range(count.value):
            target, source = (ctypes.cast(each, vectors)[number] for each in (here, there))
            part = min(room, target.length)
            ctypes.memmove(target.base, source.base, part)
            room -= part
        return self._limit - room


@pytest.mark.parametrize("limit", [1, 13, 1000])
def test_a_read_that_ends_early_goes_on(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    """As beyond 2 GiB."""
    monkeypatch.setattr(peer_memory, "_libc", Hesitant(limit))
    sources = [torch.randint(256, (size,), dtype=torch.uint8) for size in (13, 0, 1000, 7)]
    targets = [torch.zeros_like(source) for source in sources]
    peer = peer_memory.Peer(0, os.getpid())
    peer.read([(source.data_ptr(), target) for source, target in zip(sources, targets, strict=True)])
    assert all(torch.equal(source, target) for source, target in zip(sources, targets, strict=True))
    assert peer.read_bytes == 1020


class Chooser:
    """Which collectives the engine takes for a partition group of the world."""

    def __init__(self, context: RankContext) -> None:
        self._context = context

    def choice(self, ranks_per_node: int, one_namespace: bool, cross_memory_on: bool) -> str:
        if not one_namespace:
            cross_memory.network_namespace = lambda: self._context.rank
        size = self._context.world_size
        topology = PartitionTopology(size, ranks_per_node, size, False)
        options = EngineOptions(cross_memory=cross_memory_on)
        groups = make_groups(topology, options, torch.device("cpu"))
        chosen: Collectives = groups.partition
        groups.close()
        return type(chosen).__name__

    def choice_across_replicas(self, ranks_per_node: int, partition_size: int) -> str:
        topology = PartitionTopology(self._context.world_size, ranks_per_node, partition_size, False)
        groups = make_groups(topology, EngineOptions(), torch.device("cpu"))
        chosen: Collectives = groups.replication
        groups.close()
        return type(chosen).__name__

    def choice_without_a_board(self) -> str:
        """When one rank has no descriptors left."""
        if self._context.rank == 1:
            cross_memory.own_board = refuse
        return self.choice(self._context.world_size, True, True)


def refuse(size: int) -> tuple[peer_memory.Board, int]:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.mark.parametrize(
    ("ranks_per_node", "one_namespace", "cross_memory_on", "expected"),
    [
        (2, True, True, "CrossMemoryCollectives"),
        (2, True, False, "DirectCollectives"),
        (1, True, True, "RingCollectives"),
        (2, False, True, "DirectCollectives"),
    ],
    ids=["one host", "switched off", "two nodes", "one node of two hosts"],
)
def test_memory_is_read_only_within_a_node_that_is_one_host(
    ranks_per_node: int, one_namespace: bool, cross_memory_on: bool, expected: str
) -> None:
    with LocalTestbed(2, 2).launch(Chooser, 60) as running:
        chosen = running.call("choice", ranks_per_node, one_namespace, cross_memory_on, timeout_s=30)
    assert chosen == [expected] * 2


@pytest.mark.parametrize(
    ("ranks_per_node", "partition_size", "expected"),
    [
        (4, 2, "CrossMemoryCollectives"),
        (2, 2, "AcrossNodesCollectives"),
        (2, 1, "RingCollectives"),
        (1, 2, "AcrossNodesCollectives"),
    ],
    ids=["one host", "a replica per node", "several replicas per node", "a replica on two nodes"],
)
def test_replicas_add_up_by_what_their_nodes_allow(
    ranks_per_node: int, partition_size: int, expected: str
) -> None:
    with LocalTestbed(4, 4).launch(Chooser, 60) as running:
        chosen = running.call("choice_across_replicas", ranks_per_node, partition_size, timeout_s=30)
    assert chosen == [expected] * 4


def test_a_rank_that_cannot_take_part_is_waited_for_by_none() -> None:
    with LocalTestbed(2, 2).launch(Chooser, 60) as running:
        assert running.call("choice_without_a_board", timeout_s=20) == ["DirectCollectives"] * 2


class Closer:
    """Makes engines and closes them."""

    def __init__(self, context: RankContext) -> None:
        self._batch = batch_of(context.rank, 0, 0)

    def left_open(self, options: EngineOptions, times: int) -> int:
        """How many more descriptors are open after that many engines than after the first one."""
        counts = []
        for _ in range(times):
            self._train(options)
            gc.collect()
            dist.barrier()
            counts.append(len(os.listdir("/proc/self/fd")))
        return counts[-1] - counts[0]

    def _train(self, options: EngineOptions) -> None:
        model = Stack()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        engine = shard(model, optimizer, partition_size=2, options=options)
        checkpointer = checkpoint.Checkpointer(engine)
        engine.backward(one_forward(model, self._batch))
        engine.step()
        engine.backward(one_forward(model, self._batch))  # it is closed with hop 2 still on its way
        checkpointer.close()
        engine.close()


@pytest.mark.parametrize("cross_memory_on", [True, False])
def test_a_closed_engine_leaves_nothing_open(cross_memory_on: bool) -> None:
    with LocalTestbed(4, 4).launch(Closer, 60) as running:
        options = EngineOptions(cross_memory=cross_memory_on)
        assert running.call("left_open", options, 4, timeout_s=60) == [0] * 4


class Changer:
    """Doubles the weights by hand after an evaluation in which rank 1 reads late."""

    def __init__(self, context: RankContext) -> None:
        self._late = context.rank == 1

    def losses(self) -> list[float]:
        torch.manual_seed(7)
        model, batch = Stack(), batch_of(0, 0, 0)
        engine = shard(model, torch.optim.SGD(model.parameters(), lr=0.1))
        collectives = engine._groups.partition
        assert isinstance(collectives, CrossMemoryCollectives)
        read = collectives._read_through

        def read_late(end: int) -> None:
            time.sleep(0.1)
            read(end)

        if self._late:
            collectives._read_through = read_late  # type: ignore[method-assign]
        with torch.no_grad():
            before = one_forward(model, batch).item()
            engine.quiesce()
            for bucket in (bucket for unit in engine.units for bucket in unit.buckets):
                bucket.master.mul_(2)
            engine.refresh_weights()
            return [before, one_forward(model, batch).item()]


def test_masters_can_be_changed_by_hand_once_nobody_reads_them() -> None:
    torch.manual_seed(7)
    model, batch = Stack(), batch_of(0, 0, 0)
    with torch.no_grad():
        expected = [one_forward(model, batch).item()]
        for parameter in model.parameters():
            parameter.mul_(2)
        expected.append(one_forward(model, batch).item())
    with LocalTestbed(2, 2).launch(Changer, 60) as running:
        for losses in running.call("losses", timeout_s=30):
            assert losses == pytest.approx(expected, rel=1e-6)
