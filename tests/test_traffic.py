"""Bytes on the wire: what the kernel counted is what the collectives must send."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from suite.harness import traffic
from suite.testbeds.local import LocalTestbed
from suite.testbeds.testbed import RankContext

SIZE = 1 << 20


class Program:
    def __init__(self, context: RankContext) -> None:
        self._context = context
        context.barrier()

    def connections(self) -> list[traffic.Connection]:
        return traffic.connections()

    def all_to_all(self) -> None:
        data = torch.ones(SIZE // 4)
        dist.all_to_all_single(torch.empty_like(data), data)
        self._context.barrier()

    def send_to_next_node(self) -> None:
        """Rank 0 (first node) sends to rank 2 (second node); nothing else."""
        data = torch.ones(SIZE // 4)
        if self._context.rank == 0:
            dist.send(data, 2)
        if self._context.rank == 2:
            dist.recv(data, 0)
        self._context.barrier()


def difference(method: str) -> tuple[list[list[int]], list[list[int]]]:
    with LocalTestbed(4, 2).launch(Program, 30) as ranks:
        before = traffic.matrix(ranks.call("connections", timeout_s=30))
        ranks.call(method, timeout_s=30)
        after = traffic.matrix(ranks.call("connections", timeout_s=30))
    return before, after


def test_an_all_to_all_sends_three_quarters_of_the_buffer_from_each_of_four_ranks() -> None:
    before, after = difference("all_to_all")
    assert traffic.per_rank(before, after) == pytest.approx(0.75 * SIZE, rel=0.01)
    # Two of each rank's three peers are on the other node, and a node has two ranks.
    assert traffic.between_nodes(before, after, 2) == pytest.approx(2 * 0.5 * SIZE, rel=0.01)


def test_traffic_is_attributed_to_the_pair_of_ranks_that_had_it() -> None:
    before, after = difference("send_to_next_node")
    sent = [[after[i][j] - before[i][j] for j in range(4)] for i in range(4)]
    assert sent[0][2] == pytest.approx(SIZE, rel=0.01)
    assert sum(map(sum, sent)) - sent[0][2] < 0.01 * SIZE
