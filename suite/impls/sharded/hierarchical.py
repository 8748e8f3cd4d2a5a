"""Collectives of a group that spans several whole nodes, in an inter-node and an intra-node stage.

Each shard crosses into a node once, to the rank of equal local rank, and is passed on from there to
its neighbours: of the p shards of n nodes x k ranks a node receives (p - k), not k (p - k) (S2,
"Hierarchical communication strategy"). The stages overlap message by message: a courier passes each
shard on as soon as it arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import torch
import torch.distributed as dist
from torch import Tensor

from suite.impls.sharded.chain import Courier
from suite.impls.sharded.collectives import Handle, Reduction, Transfer, overlap
from suite.impls.sharded.direct import DirectCollectives, add_covered, wire_dtype


@dataclass(frozen=True)
class Place:
    """Where a rank stands in its group of `nodes` x `local_size` ranks, numbered node by node."""

    node: int
    nodes: int
    local_rank: int
    local_size: int
    in_rank_order: bool = False
    """Whether shards are numbered as the ranks are. Messages find their place either way."""

    def rank(self, node: int, local_rank: int) -> int:
        """The rank at that place, in the group's own numbering."""
        return node * self.local_size + local_rank

    def shard(self, node: int, local_rank: int) -> int:
        """The shard that it holds; those of equal local rank are neighbours."""
        if self.in_rank_order:
            return self.rank(node, local_rank)
        return local_rank * self.nodes + node

    @property
    def own_shard(self) -> int:
        return self.shard(self.node, self.local_rank)

    def other_nodes(self, direction: int = 1) -> list[int]:
        """All nodes but the own, by distance."""
        return [(self.node + direction * step) % self.nodes for step in range(1, self.nodes)]

    @property
    def neighbours(self) -> list[int]:
        """The local ranks of the others on the own node."""
        return [(self.local_rank + step) % self.local_size for step in range(1, self.local_size)]


@dataclass(frozen=True)
class Arrival:
    """A shard on its way here, and whom it is passed on to (ranks of the group)."""

    transfer: Transfer
    values: Tensor
    onward: Sequence[int]


class DirectHierarchicalCollectives(DirectCollectives):
    """Point-to-point messages in two stages: a ring over the nodes, and everybody on a node."""

    def __init__(self, group: dist.ProcessGroup, place: Place) -> None:
        super().__init__(group, place.own_shard, place.nodes * place.local_size)
        self._place = place
        self._reducer = Courier()
        self._own_tags = count()

    def close(self) -> None:
        self._reducer.close()
        super().close()

    def all_gather(self, fulls: Sequence[Tensor], shards: Sequence[Tensor]) -> Handle:
        place, tag = self._place, 2 * next(self._own_tags)
        neighbours = [place.rank(place.node, local) for local in place.neighbours]
        before, behind = (place.rank((place.node + step) % place.nodes, place.local_rank) for step in (1, -1))

        def slot(number: int, node: int, local_rank: int) -> Tensor:
            numel = len(shards[number])
            return fulls[number].narrow(0, place.shard(node, local_rank) * numel, numel)

        arrivals: list[Arrival] = []
        for node in place.other_nodes(-1):
            onward = neighbours if node == (place.node + 1) % place.nodes else [before, *neighbours]
            for number in range(len(shards)):
                values = slot(number, node, place.local_rank)
                arrivals.append(Arrival(self.receive(values, behind, tag), values, onward))
        works: list[Transfer] = []
        for node in (place.node, *place.other_nodes(-1)):
            for local in place.neighbours:
                peer = place.rank(place.node, local)
                works += [self.receive(slot(number, node, local), peer, tag) for number in range(len(shards))]
        for peer in (before, *neighbours):
            works += [self.send(shard, peer, tag) for shard in shards]
        for number, shard in enumerate(shards):
            slot(number, place.node, place.local_rank).copy_(shard)
        return Handle([self._courier.run(lambda: self._pass_on(arrivals, tag)), *works], keep=shards)

    def _pass_on(self, arrivals: Sequence[Arrival], tag: int) -> Sequence[Transfer]:
        works = []
        for arrival in arrivals:
            arrival.transfer.wait()
            works += [self.send(arrival.values, peer, tag) for peer in arrival.onward]
        return works

    def reduce_scatter(self, reductions: Sequence[Reduction]) -> Handle:
        tag = 2 * next(self._own_tags) + 1
        started = [_TwoStageReduction(self, self._place, item, tag) for item in reductions]
        for reduction in started:
            reduction.send_to_neighbours()
        errand = self._reducer.run(lambda: [work for reduction in started for work in reduction.sum_node()])

        def finish() -> None:
            for reduction in started:
                reduction.store()

        return Handle([errand, *(work for r in started for work in r.works)], finish, keep=reductions)


class _TwoStageReduction:
    """One buffer of a hierarchical reduce-scatter: sums over the node, shard by shard, then over nodes.

    The nodes' sums travel in the dtype of the pieces, as the pieces themselves do.
    """

    def __init__(self, via: DirectCollectives, place: Place, item: Reduction, tag: int) -> None:
        self._via, self._place, self._item, self._tag = via, place, item, tag
        self.works: list[Transfer] = []
        """What `store` needs to be over."""
        numel, device = len(item.shard), item.shard.device
        self._order = [*place.other_nodes(), place.node]
        self._rows = [
            torch.empty(len(place.neighbours), numel, dtype=wire_dtype(item), device=device)
            for _ in self._order
        ]
        self._local = [self._receive_local(n, rows) for n, rows in zip(self._order, self._rows, strict=True)]
        self._sums = torch.zeros(len(self._order), numel, dtype=item.shard.dtype, device=device)
        self._foreign = torch.empty(place.nodes - 1, numel, dtype=wire_dtype(item), device=device)
        end = self._end(place.node)
        for node, row in zip(place.other_nodes(-1), self._foreign, strict=True):
            if end:
                peer = place.rank(node, place.local_rank)
                self.works.append(via.receive(row.narrow(0, 0, end), peer, tag))

    def _covered(self, node: int, local_rank: int) -> list[tuple[int, Tensor]]:
        return list(overlap(self._item.pieces, self._place.shard(node, local_rank), len(self._item.shard)))

    def _end(self, node: int) -> int:
        """How much of the shard that this local rank sums for `node` pieces reach into."""
        covered = self._covered(node, self._place.local_rank)
        return covered[-1][0] + len(covered[-1][1]) if covered else 0

    def _receive_local(self, node: int, rows: Tensor) -> list[Transfer]:
        return [
            self._via.receive(
                row.narrow(0, start, len(part)), self._place.rank(self._place.node, local), self._tag
            )
            for row, local in zip(rows, self._place.neighbours, strict=True)
            for start, part in self._covered(node, self._place.local_rank)
        ]

    def send_to_neighbours(self) -> None:
        for node in self._order:
            for local in self._place.neighbours:
                peer = self._place.rank(self._place.node, local)
                self.works += [
                    self._via.send(part, peer, self._tag) for _, part in self._covered(node, local)
                ]

    def sum_node(self) -> list[Transfer]:
        """The courier's part: adds up what the node has for each node's shard and sends it there."""
        works = []
        for node, rows, transfers, total in zip(
            self._order, self._rows, self._local, self._sums, strict=True
        ):
            for transfer in transfers:
                transfer.wait()
            covered = self._covered(node, self._place.local_rank)
            for start, part in covered:
                total.narrow(0, start, len(part)).copy_(part)
            for row in rows:
                add_covered(total, row, iter(covered))
            end = self._end(node)
            if node != self._place.node and end:
                peer = self._place.rank(node, self._place.local_rank)
                outgoing = total.narrow(0, 0, end).to(wire_dtype(self._item))
                works.append(self._via.send(outgoing, peer, self._tag))
        return works

    def store(self) -> None:
        """All messages have arrived: the sum over the nodes goes into the shard."""
        shard, total, end = self._item.shard, self._sums[-1], self._end(self._place.node)
        for row in self._foreign:
            total.narrow(0, 0, end).add_(row.narrow(0, 0, end))
        shard.add_(total) if self._item.accumulate else shard.copy_(total)
