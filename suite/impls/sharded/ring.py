"""Flat collectives of a group that spans several nodes: rings, so that each link is crossed once.

Messages between every pair would cross from a node of k ranks k (p - k) times per shard's worth of
buffer; in a ring ordered by node one rank of each node sends the (p - 1) shards that go round.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from suite.impls.sharded.collectives import Handle, Reduction, Transfer, overlap
from suite.impls.sharded.direct import DirectCollectives, wire_dtype
from suite.impls.sharded.hierarchical import DirectHierarchicalCollectives, Place
from suite.impls.sharded.native import NativeCollectives


class RingCollectives(DirectHierarchicalCollectives):
    """Shard i belongs to rank i of `group`, whose ranks are numbered node by node.

    The all-gather is the inter-node stage of the hierarchical one, as if every rank were a node.
    """

    def __init__(self, group: dist.ProcessGroup, index: int, size: int) -> None:
        super().__init__(group, Place(index, size, 0, 1))
        self._native = NativeCollectives(group, index, size)

    def reduce_scatter(self, reductions: Sequence[Reduction]) -> Handle:
        tag = 2 * next(self._own_tags) + 1
        started = [_RingReduction(self, self._place, item, tag) for item in reductions]
        errand = self._reducer.run(lambda: [work for reduction in started for work in reduction.pass_on()])

        def finish() -> None:
            for reduction in started:
                reduction.store()

        return Handle([errand], finish, keep=reductions)

    def all_reduce(self, tensors: Sequence[Tensor], wire: torch.dtype) -> Handle:
        """The backend's own is a ring already. It adds in the dtype that travels."""
        return self._native.all_reduce(tensors, wire)


class AcrossNodesCollectives(DirectCollectives):
    """Of a group with one rank on each node, where messages between all pairs cross a link no more often than
    a ring's do."""

    def __init__(self, group: dist.ProcessGroup | None, index: int, size: int) -> None:
        super().__init__(group, index, size)
        self._native = NativeCollectives(group, index, size)

    def all_reduce(self, tensors: Sequence[Tensor], wire: torch.dtype) -> Handle:
        """The backend's own is a ring, whose messages go to a neighbour alone, and the faster one over many
        nodes; but it adds in the dtype that travels, which must be the tensors' own."""
        if all(tensor.dtype == wire for tensor in tensors):
            return self._native.all_reduce(tensors, wire)
        return super().all_reduce(tensors, wire)


class _RingReduction:
    """One buffer of a reduce-scatter: the sum for rank i begins at rank i + 1 and travels to rank i,
    every rank adding its part. It travels in the dtype of the pieces."""

    def __init__(self, via: RingCollectives, place: Place, item: Reduction, tag: int) -> None:
        self._via, self._item, self._tag = via, item, tag
        self._order = [*place.other_nodes(-1), place.node]
        self._next, behind = (place.node + 1) % place.nodes, (place.node - 1) % place.nodes
        self._rows = torch.empty(
            place.nodes - 1, len(item.shard), dtype=wire_dtype(item), device=item.shard.device
        )
        self._arriving = [
            via.receive(row.narrow(0, 0, self._end(owner)), behind, tag) if self._end(owner) else None
            for owner, row in zip(self._order[1:], self._rows, strict=True)
        ]
        self._total = torch.empty(0)

    def _covered(self, owner: int) -> list[tuple[int, Tensor]]:
        return list(overlap(self._item.pieces, owner, len(self._item.shard)))

    def _end(self, owner: int) -> int:
        """How far pieces reach into the shard of `owner`."""
        covered = self._covered(owner)
        return covered[-1][0] + len(covered[-1][1]) if covered else 0

    def pass_on(self) -> list[Transfer]:
        """The courier's part: receives, adds, sends on; the own shard comes last."""
        works = []
        for step, owner in enumerate(self._order):
            total, end = torch.zeros_like(self._item.shard), self._end(owner)
            for start, part in self._covered(owner):
                total.narrow(0, start, len(part)).copy_(part)
            arriving = self._arriving[step - 1] if step else None
            if arriving is not None:
                arriving.wait()
                total.narrow(0, 0, end).add_(self._rows[step - 1].narrow(0, 0, end))
            if step == len(self._order) - 1:
                self._total = total
            elif end:
                outgoing = total.narrow(0, 0, end).to(wire_dtype(self._item))
                works.append(self._via.send(outgoing, self._next, self._tag))
        return works

    def store(self) -> None:
        shard = self._item.shard
        shard.add_(self._total) if self._item.accumulate else shard.copy_(self._total)
