"""The backend's own collectives on flat buffers: NCCL's, or stock gloo's for comparison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _coalescing_manager

from suite.impls.sharded.chain import make_chain
from suite.impls.sharded.collectives import Collectives, Handle, Reduction, Transfer, flatten

Call = Callable[[], Transfer | None]
"""Starts one collective."""


def start(calls: Sequence[Call], group: dist.ProcessGroup | None, device: torch.device) -> list[Transfer]:
    """Starts collectives of one kind in `group`: on an accelerator several of them as one kernel."""
    if device.type == "cpu" or len(calls) < 2:
        return [work for call in calls if (work := call()) is not None]
    return start_as_one(calls, group)


def start_as_one(calls: Sequence[Call], group: dist.ProcessGroup | None) -> list[Transfer]:
    """The backend's coalesced call. Torch's interface to it is private, and its own libraries use it."""
    with _coalescing_manager(group, async_ops=True) as started:
        for call in calls:
            call()
    return [started]


def gathers(fulls: Sequence[Tensor], shards: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Call]:
    return [
        partial(dist.all_gather_into_tensor, full, shard, group=group, async_op=True)
        for full, shard in zip(fulls, shards, strict=True)
    ]


def scatters(sums: Sequence[Tensor], flats: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Call]:
    return [
        partial(dist.reduce_scatter_tensor, total, flat, group=group, async_op=True)
        for total, flat in zip(sums, flats, strict=True)
    ]


class NativeCollectives(Collectives):
    """Tensor collectives; shard i belongs to rank i of `group`."""

    def __init__(self, group: dist.ProcessGroup | None, index: int, size: int) -> None:
        super().__init__(index, size)
        self.group = group

    def all_gather(self, fulls: Sequence[Tensor], shards: Sequence[Tensor]) -> Handle:
        if not fulls:
            return Handle(())
        return Handle(start(gathers(fulls, shards, self.group), self.group, fulls[0].device), keep=shards)

    def reduce_scatter(self, reductions: Sequence[Reduction]) -> Handle:
        flats = [flatten(item.pieces, self.size * len(item.shard), item.shard) for item in reductions]
        sums = [flat.new_empty(len(flat) // self.size) for flat in flats]
        works = start(scatters(sums, flats, self.group), self.group, flats[0].device)
        return Handle(works, lambda: _store(reductions, sums), keep=flats)

    def all_reduce(self, tensors: Sequence[Tensor], wire: torch.dtype) -> Handle:
        outgoing = [tensor.to(wire) for tensor in tensors]
        calls = [partial(dist.all_reduce, item, group=self.group, async_op=True) for item in outgoing]

        def finish() -> None:
            for tensor, item in zip(tensors, outgoing, strict=True):
                if item is not tensor:
                    tensor.copy_(item)

        return Handle(start(calls, self.group, outgoing[0].device), finish, keep=outgoing)


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
        super().close()

    def all_gather(self, fulls: Sequence[Tensor], shards: Sequence[Tensor]) -> Handle:
        if not fulls:
            return Handle(())
        segments = [full.chunk(self._local_size)[self._local_rank] for full in fulls]

        def job() -> Sequence[Transfer]:
            device = fulls[0].device
            for work in start(gathers(segments, shards, self._across), self._across, device):
                work.wait()
            return start(gathers(fulls, segments, self._inside), self._inside, device)

        return Handle([self._chain.run(job)], keep=(fulls, shards))

    def reduce_scatter(self, reductions: Sequence[Reduction]) -> Handle:
        # All buffers are made here, on the stream that the result is wanted on, and kept until it has it.
        flats = [flatten(item.pieces, self.size * len(item.shard), item.shard) for item in reductions]
        segments = [flat.new_empty(len(flat) // self._local_size) for flat in flats]
        sums = [flat.new_empty(len(flat) // self.size) for flat in flats]

        def job() -> Sequence[Transfer]:
            device = flats[0].device
            for work in start(scatters(segments, flats, self._inside), self._inside, device):
                work.wait()
            return start(scatters(sums, segments, self._across), self._across, device)

        return Handle([self._chain.run(job)], lambda: _store(reductions, sums), keep=(flats, segments))

    def all_reduce(self, tensors: Sequence[Tensor], wire: torch.dtype) -> Handle:
        raise NotImplementedError("replication groups are flat")
