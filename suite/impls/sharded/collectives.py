"""All-gather and reduce-scatter of flat buffers, asynchronous, with the best primitive per backend.

A flat buffer of `size * n` elements belongs to a group of `size` ranks; shard i, of n elements, is
its i-th contiguous part. Every call moves several buffers at once and returns a handle; the data
may be used, and the buffers touched, only after `handle.wait()`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

SMALL_BYTES = 64 * 1024

Piece = tuple[int, Tensor]
"""(offset, values): `values` (any shape, contiguous) lies at `offset` of a flat buffer."""


class Handle:
    """A collective in flight: transfers to wait for, then what remains to be done locally."""

    def __init__(
        self,
        works: Sequence[dist.Work],
        finish: Callable[[], None] | None = None,
        keep: Sequence[object] = (),
    ) -> None:
        self._works = works
        self._finish = finish
        self._keep = keep  # buffers that must outlive the transfers

    def wait(self) -> None:
        """The current stream (on the CPU: the caller) goes on when the result is there."""
        for work in self._works:
            work.wait()
        if self._finish is not None:
            self._finish()
        self._works, self._finish, self._keep = (), None, ()


@dataclass(frozen=True)
class Reduction:
    """One buffer of a reduce-scatter: `shard` becomes (or, with `accumulate`, is increased by) this
    rank's part of the sum over the group.

    `pieces` are this rank's addends where they lie, so that nothing has to be flattened; their
    offsets and sizes are the same on every rank and do not overlap. What no piece covers is padding:
    it is zero in the sum.
    """

    shard: Tensor
    pieces: Sequence[Piece]
    accumulate: bool = False


class Collectives(ABC):
    """The collectives of one group; `index` is this rank's shard."""

    def __init__(self, group: dist.ProcessGroup | None, index: int, size: int) -> None:
        self.group = group
        self.index = index
        self.size = size

    @abstractmethod
    def all_gather(self, fulls: Sequence[Tensor], shards: Sequence[Tensor]) -> Handle:
        """Fills each full [size * n] from the group's shards [n]; equal dtypes."""

    @abstractmethod
    def reduce_scatter(self, reductions: Sequence[Reduction]) -> Handle:
        """Sums over the group; the wire carries the pieces' dtype, the sum is taken in the shard's
        where the primitive allows it."""


class AloneCollectives(Collectives):
    """A group of one rank: nothing to move."""

    def all_gather(self, fulls: Sequence[Tensor], shards: Sequence[Tensor]) -> Handle:
        for full, shard in zip(fulls, shards, strict=True):
            if full.data_ptr() != shard.data_ptr():
                full.copy_(shard)
        return Handle(())

    def reduce_scatter(self, reductions: Sequence[Reduction]) -> Handle:
        for item in reductions:
            _write_own(item, 0)
        return Handle(())


class DirectCollectives(Collectives):
    """Point-to-point messages between every pair of ranks, straight from and into their final place.

    For gloo: its own reduce-scatter moves an all-reduce's volume and its ring all-gather is slow.
    Each rank sends exactly (size - 1) shards per buffer in either collective, and a gradient goes
    out from where autograd left it (S1 names such group-batched collectives as future work).
    """

    def all_gather(self, fulls: Sequence[Tensor], shards: Sequence[Tensor]) -> Handle:
        works: list[dist.Work] = []
        for full, shard in zip(fulls, shards, strict=True):
            for peer in self._peers():
                works.append(self._receive(full.narrow(0, peer * len(shard), len(shard)), peer))
        for full, shard in zip(fulls, shards, strict=True):
            for peer in self._peers():
                works.append(self._send(shard, peer))
            full.narrow(0, self.index * len(shard), len(shard)).copy_(shard)
        return Handle(works, keep=shards)

    def reduce_scatter(self, reductions: Sequence[Reduction]) -> Handle:
        works: list[dist.Work] = []
        received = [self._post_receives(item, works) for item in reductions]
        for item in reductions:
            for peer in self._peers():
                for _, part in _overlap(item.pieces, peer, len(item.shard)):
                    works.append(self._send(part, peer))

        def finish() -> None:
            for item, rows in zip(reductions, received, strict=True):
                self._sum(item, rows)

        return Handle(works, finish, keep=reductions)

    def _peers(self) -> Iterator[int]:
        """All others, starting after oneself, so that not everybody sends to the same rank first."""
        return ((self.index + step) % self.size for step in range(1, self.size))

    def _send(self, tensor: Tensor, peer: int) -> dist.Work:
        work = dist.isend(tensor, group=self.group, group_dst=peer)
        assert work is not None
        return work

    def _receive(self, tensor: Tensor, peer: int) -> dist.Work:
        work = dist.irecv(tensor, group=self.group, group_src=peer)
        assert work is not None
        return work

    def _post_receives(self, item: Reduction, works: list[dist.Work]) -> Tensor:
        """One row of this rank's shard per peer; only what pieces cover is received."""
        mine = list(_overlap(item.pieces, self.index, len(item.shard)))
        dtype = item.pieces[0][1].dtype if item.pieces else item.shard.dtype
        rows = torch.empty(self.size - 1, len(item.shard), dtype=dtype, device=item.shard.device)
        for row, peer in zip(rows, self._peers(), strict=True):
            for start, part in mine:
                works.append(self._receive(row.narrow(0, start, len(part)), peer))
        return rows

    def _sum(self, item: Reduction, rows: Tensor) -> None:
        _write_own(item, self.index)
        for start, part in _overlap(item.pieces, self.index, len(item.shard)):
            target = item.shard.narrow(0, start, len(part))
            for row in rows:
                target.add_(row.narrow(0, start, len(part)))


class NativeCollectives(Collectives):
    """The backend's own tensor collectives on flat buffers (NCCL; stock gloo for comparison)."""

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


class FlatteningCollectives(Collectives):
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
        works, parts, sums = [], [], []
        for item in reductions:
            flat = flatten(item.pieces, self.size * len(item.shard), item.shard)
            own = [part.clone() for part in flat.chunk(self.size)]
            result = torch.empty_like(own[0])
            work = dist.reduce_scatter(result, own, group=self.group, async_op=True)
            assert work is not None
            works.append(work)
            parts.append(own)
            sums.append(result)

        return Handle(works, lambda: _store(reductions, sums), keep=parts)


def flatten(pieces: Sequence[Piece], numel: int, like: Tensor) -> Tensor:
    """The pieces in one buffer of `numel` elements on `like`'s device, zero where none lies."""
    dtype = pieces[0][1].dtype if pieces else like.dtype
    flat = torch.zeros(numel, dtype=dtype, device=like.device)
    for offset, values in pieces:
        flat.narrow(0, offset, values.numel()).copy_(values.reshape(-1))
    return flat


def join_small(pieces: Sequence[Piece]) -> list[Piece]:
    """The same values with runs of adjacent small pieces copied together.

    A message costs the time in which tens of kilobytes are copied: biases and norms travel as one.
    """
    joined: list[list[Piece]] = []
    for piece in pieces:
        if _is_small(piece) and joined and _ends_at(joined[-1][-1]) == piece[0] and _is_small(joined[-1][-1]):
            joined[-1].append(piece)
        else:
            joined.append([piece])
    return [
        run[0] if len(run) == 1 else (run[0][0], torch.cat([values.reshape(-1) for _, values in run]))
        for run in joined
    ]


def _is_small(piece: Piece) -> bool:
    return piece[1].numel() * piece[1].element_size() <= SMALL_BYTES


def _ends_at(piece: Piece) -> int:
    return piece[0] + piece[1].numel()


def _overlap(pieces: Sequence[Piece], index: int, shard_numel: int) -> Iterator[Piece]:
    """The parts of the pieces inside shard `index`: (offset within the shard, flat view)."""
    begin, end = index * shard_numel, (index + 1) * shard_numel
    for offset, values in pieces:
        low, high = max(offset, begin), min(offset + values.numel(), end)
        if low < high:
            yield low - begin, values.reshape(-1).narrow(0, low - offset, high - low)


def _store(reductions: Sequence[Reduction], sums: Sequence[Tensor]) -> None:
    """What a backend's reduce-scatter delivered, into the shards."""
    for item, result in zip(reductions, sums, strict=True):
        item.shard.add_(result) if item.accumulate else item.shard.copy_(result)


def _write_own(item: Reduction, index: int) -> None:
    """This rank's own addend into its shard."""
    if not item.accumulate:
        item.shard.zero_()
    for start, part in _overlap(item.pieces, index, len(item.shard)):
        item.shard.narrow(0, start, len(part)).add_(part)
