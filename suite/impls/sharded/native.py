"""The backend's own collectives on flat buffers: NCCL's, or stock gloo's for comparison."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from suite.impls.sharded.chain import make_chain
from suite.impls.sharded.collectives import Collectives, Handle, Reduction, Transfer, flatten


class NativeCollectives(Collectives):
    """Tensor collectives; shard i belongs to rank i of `group`."""

    def __init__(self, group: dist.ProcessGroup | None, index: int, size: int) -> None:
        super().__init__(index, size)
        self.group = group

    def all_gather(self, fulls: Sequence[Tensor], shards: Sequence[Tensor]) -> Handle:
        works = [
            dist.all_gather_into_tensor(full, shard, group=self.group, async_op=True)
            for full, shard in zip(fulls, shards, strict=True)
        ]
        return Handle([work for work in works if work is not None], keep=shards)

    def reduce_scatter(self, reductions: Sequence[Reduction]) -> Handle:
        works, flats, sums = [], [], []
        for item in reductions:
            flat = flatten(item.pieces, self.size * len(item.shard), item.shard)
            result = torch.empty(len(item.shard), dtype=flat.dtype, device=flat.device)
            work = dist.reduce_scatter_tensor(result, flat, group=self.group, async_op=True)
            assert work is not None
            works.append(work)
            flats.append(flat)
            sums.append(result)

        return Handle(works, lambda: _store(reductions, sums), keep=flats)

    def all_reduce(self, tensors: Sequence[Tensor], wire: torch.dtype) -> Handle:
        outgoing = [tensor.to(wire) for tensor in tensors]
        works = [dist.all_reduce(item, group=self.group, async_op=True) for item in outgoing]

        def finish() -> None:
            for tensor, item in zip(tensors, outgoing, strict=True):
                if item is not tensor:
                    tensor.copy_(item)

        return Handle([work for work in works if work is not None], finish, keep=outgoing)


class FlatteningCollectives(NativeCollectives):
    """The list-based calls of old: results land in temporary tensors and are copied to their place,
    gradients are copied into one buffer first. Kept to measure what pre-flattening buys (Z5)."""

    def all_gather(self, fulls: Sequence[Tensor], shards: Sequence[Tensor]) -> Handle:
        works, results = [], []
        for shard in shards:
            parts = [torch.empty_like(shard) for _ in range(self.size)]
            work = dist.all_gather(parts, shard, group=self.group, async_op=True)
            assert work is not None
            works.append(work)
            results.append(parts)

        def finish() -> None:
            for full, parts in zip(fulls, results, strict=True):
                full.copy_(torch.cat(parts))

        return Handle(works, finish, keep=shards)

    def reduce_scatter(self, reductions: Sequence[Reduction]) -> Handle:
        works, copies, sums = [], [], []
        for item in reductions:
            flat = flatten(item.pieces, self.size * len(item.shard), item.shard)
            # What a list-based call does inside. gloo's own is no copy and send but a hundred
            # milliseconds whatever the size: with it this would measure gloo, not the copies.
            copy = torch.cat([part.clone() for part in flat.chunk(self.size)])
            result = torch.empty_like(copy.chunk(self.size)[0])
            work = dist.reduce_scatter_tensor(result, copy, group=self.group, async_op=True)
            assert work is not None
            works.append(work)
            copies.append(copy)
            sums.append(result)

        return Handle(works, lambda: _store(reductions, sums), keep=copies)


def _store(reductions: Sequence[Reduction], sums: Sequence[Tensor]) -> None:
    """What a backend's reduce-scatter delivered, into the shards."""
    for item, result in zip(reductions, sums, strict=True):
        item.shard.add_(result) if item.accumulate else item.shard.copy_(result)


class NativeHierarchicalCollectives(Collectives):
    """The two stages as two collectives: one among equal local ranks, one on the node.

    Shards of equal local rank are neighbours in the buffer, so the first stage fills one contiguous
    segment in place and the second the whole: the re-arrangement between the stages disappears.
    """

    def __init__(self, across: dist.ProcessGroup, inside: dist.ProcessGroup, device: torch.device) -> None:
        """`across`: the ranks of equal local rank, by node; `inside`: those of the node."""
        nodes, local_size, local_rank = across.size(), inside.size(), inside.rank()
        super().__init__(local_rank * nodes + across.rank(), nodes * local_size)
        self._across, self._inside = across, inside
        self._local_rank, self._local_size = local_rank, local_size
        self._chain = make_chain(device)

    def close(self) -> None:
        self._chain.close()

    def all_gather(self, fulls: Sequence[Tensor], shards: Sequence[Tensor]) -> Handle:
        def job() -> Sequence[Transfer]:
            segments = [full.chunk(self._local_size)[self._local_rank] for full in fulls]
            for segment, shard in zip(segments, shards, strict=True):
                dist.all_gather_into_tensor(segment, shard, group=self._across)
            works = [
                dist.all_gather_into_tensor(full, segment, group=self._inside, async_op=True)
                for full, segment in zip(fulls, segments, strict=True)
            ]
            return [work for work in works if work is not None]

        return Handle([self._chain.run(job)], keep=(fulls, shards))

    def reduce_scatter(self, reductions: Sequence[Reduction]) -> Handle:
        flats = [flatten(item.pieces, self.size * len(item.shard), item.shard) for item in reductions]
        segments = [torch.empty_like(flat.chunk(self._local_size)[0]) for flat in flats]
        sums = [torch.empty_like(flat.chunk(self.size)[0]) for flat in flats]

        def job() -> Sequence[Transfer]:
            for segment, flat in zip(segments, flats, strict=True):
                dist.reduce_scatter_tensor(segment, flat, group=self._inside)
            works = [
                dist.reduce_scatter_tensor(total, segment, group=self._across, async_op=True)
                for total, segment in zip(sums, segments, strict=True)
            ]
            return [work for work in works if work is not None]

        return Handle([self._chain.run(job)], lambda: _store(reductions, sums), keep=(flats, segments))

    def all_reduce(self, tensors: Sequence[Tensor], wire: torch.dtype) -> Handle:
        raise NotImplementedError("replication groups are flat")
