"""Collectives made of point-to-point messages, straight from and into their final place.

For gloo: its own reduce-scatter moves an all-reduce's volume and its ring all-gather is slow. Each
rank sends exactly (size - 1) shards per buffer in either collective, and a gradient goes out from
where autograd left it (S1 names such group-batched collectives as future work).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import count

import torch
import torch.distributed as dist
from torch import Tensor

from suite.impls.sharded.chain import Courier
from suite.impls.sharded.collectives import (
    Collectives,
    Handle,
    Piece,
    Reduction,
    Transfer,
    overlap,
    write_own,
)


class DirectCollectives(Collectives):
    """Messages between every pair of ranks; shard i belongs to rank i of `group`."""

    def __init__(self, group: dist.ProcessGroup | None, index: int, size: int) -> None:
        super().__init__(index, size)
        self._group = group
        self._courier = Courier()
        self._tags = count()

    def close(self) -> None:
        self._courier.close()
        super().close()

    def all_gather(self, fulls: Sequence[Tensor], shards: Sequence[Tensor]) -> Handle:
        tag = next(self._tags)
        works: list[Transfer] = []
        for full, shard in zip(fulls, shards, strict=True):
            for peer in self._peers():
                works.append(self.receive(full.narrow(0, peer * len(shard), len(shard)), peer, tag))
        for full, shard in zip(fulls, shards, strict=True):
            for peer in self._peers():
                works.append(self.send(shard, peer, tag))
            full.narrow(0, self.index * len(shard), len(shard)).copy_(shard)
        return Handle(works, keep=shards)

    def reduce_scatter(self, reductions: Sequence[Reduction]) -> Handle:
        tag = next(self._tags)
        works: list[Transfer] = []
        received = [self._post_receives(item, works, tag) for item in reductions]
        for item in reductions:
            for peer in self._peers():
                for _, part in overlap(item.pieces, peer, len(item.shard)):
                    works.append(self.send(part, peer, tag))

        def finish() -> None:
            for item, rows in zip(reductions, received, strict=True):
                self._sum(item, rows)

        return Handle(works, finish, keep=reductions)

    def all_reduce(self, tensors: Sequence[Tensor], wire: torch.dtype) -> Handle:
        """Every rank sums one part and sends it to all: 2 (size - 1) / size of the tensor's volume."""
        # A tag each: all addends are sent before the first sum, so one tag would mix them up.
        jobs = [self._start_all_reduce(tensor, wire, next(self._tags)) for tensor in tensors]
        return Handle([self._courier.run(lambda: [work for job in jobs for work in job()])], keep=tensors)

    def _start_all_reduce(
        self, tensor: Tensor, wire: torch.dtype, tag: int
    ) -> Callable[[], Sequence[Transfer]]:
        """Posts all receives and sends the addends; the job that is returned sums and distributes."""
        outgoing = tensor.to(wire)
        parts = list(outgoing.tensor_split(self.size))
        targets = list(tensor.tensor_split(self.size))
        own = targets[self.index]
        others = list(self._peers()) if len(own) else []
        rows = torch.empty(len(others), len(own), dtype=wire, device=tensor.device)
        addends = [self.receive(row, peer, tag) for row, peer in zip(rows, others, strict=True)]
        filled = [peer for peer in self._peers() if len(parts[peer])]  # gloo refuses empty messages
        # A part's sum can only arrive after its owner has read this rank's addend: it may replace it.
        sums = [self.receive(parts[peer], peer, tag) for peer in filled]
        sent = [self.send(parts[peer], peer, tag) for peer in filled]

        def job() -> Sequence[Transfer]:
            for work, row in zip(addends, rows, strict=True):
                work.wait()
                own.add_(row)
            parts[self.index].copy_(own)  # rounded to what the others get
            distributed = [self.send(parts[self.index], peer, tag) for peer in others]
            for work in [*sent, *sums]:
                work.wait()
            if outgoing is not tensor:
                tensor.copy_(outgoing)
            return distributed

        return job

    def _peers(self) -> Iterator[int]:
        """All others, starting after oneself, so that not everybody sends to the same rank first."""
        return ((self.index + step) % self.size for step in range(1, self.size))

    def send(self, tensor: Tensor, peer: int, tag: int) -> Transfer:
        work = dist.isend(tensor, group=self._group, group_dst=peer, tag=tag)
        assert work is not None
        return work

    def receive(self, tensor: Tensor, peer: int, tag: int) -> Transfer:
        work = dist.irecv(tensor, group=self._group, group_src=peer, tag=tag)
        assert work is not None
        return work

    def _post_receives(self, item: Reduction, works: list[Transfer], tag: int) -> Tensor:
        """One row of this rank's shard per peer; only what pieces cover is received."""
        mine = list(overlap(item.pieces, self.index, len(item.shard)))
        rows = torch.empty(self.size - 1, len(item.shard), dtype=wire_dtype(item), device=item.shard.device)
        for row, peer in zip(rows, self._peers(), strict=True):
            for start, part in mine:
                works.append(self.receive(row.narrow(0, start, len(part)), peer, tag))
        return rows

    def _sum(self, item: Reduction, rows: Tensor) -> None:
        write_own(item, self.index)
        for row in rows:
            add_covered(item.shard, row, overlap(item.pieces, self.index, len(item.shard)))


def wire_dtype(item: Reduction) -> torch.dtype:
    """In which its addends travel."""
    return item.pieces[0][1].dtype if item.pieces else item.shard.dtype


def add_covered(target: Tensor, row: Tensor, covered: Iterator[Piece]) -> None:
    """Adds a received row where pieces lie; elsewhere nothing was received into it."""
    for start, part in covered:
        target.narrow(0, start, len(part)).add_(row.narrow(0, start, len(part)))
