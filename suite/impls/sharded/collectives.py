"""What the engine asks of collectives: flat buffers, asynchronous, several at once.

A flat buffer of `size * n` elements belongs to a group of `size` ranks; shard i, of n elements, is
its i-th contiguous part. Every call moves several buffers at once and returns a handle; the data
may be used, and the results touched, only after `handle.wait()`, the sources overwritten only after
`quiesce`. All ranks of a group make the same calls in the same order. See `cross_memory`, `direct`,
`ring`, `hierarchical` and `native` for the implementations.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

SMALL_BYTES = 64 * 1024

Piece = tuple[int, Tensor]
"""(offset, values): `values` (any shape, contiguous) lies at `offset` of a flat buffer."""


class Transfer(Protocol):
    """What can be waited for: a `torch.distributed.Work`, or a chain of them."""

    def wait(self) -> Any: ...


class Handle:
    """A collective in flight: transfers to wait for, then what remains to be done locally.

    Its buffers were allocated on the stream that made it, and the allocator hands memory that is given
    back there to that stream's next kernels at once. So they may only be given back where that stream
    has waited: `wait` is for it, `join` and `forget` are for others.
    """

    def __init__(
        self,
        works: Sequence[Transfer],
        finish: Callable[[], None] | None = None,
        keep: Sequence[object] = (),
    ) -> None:
        self._works = works
        self._finish = finish
        self._keep: object = keep  # buffers that must outlive the transfers

    def wait(self) -> None:
        """The current stream (on the CPU: the caller) goes on when the result is there, and the buffers
        are given back."""
        self.join()
        self.forget()

    def join(self) -> None:
        """Like `wait` for a stream that does not own the buffers: they are kept until `forget`."""
        works, finish = self._works, self._finish
        self._works, self._finish = (), None
        for work in works:
            work.wait()
        if finish is not None:
            finish()
        self._keep = (works, finish, self._keep)

    def forget(self) -> None:
        """Gives the buffers back; their own stream has waited for the result."""
        self._keep = ()


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
    """The collectives of one group of `size` ranks, of which this one holds shard `index`."""

    def __init__(self, index: int, size: int) -> None:
        self.index = index
        self.size = size
        self.own_groups: Sequence[dist.ProcessGroup] = ()
        """Made for these collectives alone: `close` ends them."""

    @abstractmethod
    def all_gather(self, fulls: Sequence[Tensor], shards: Sequence[Tensor]) -> Handle:
        """Fills each full [size * n] from the group's shards [n]; equal dtypes."""

    @abstractmethod
    def reduce_scatter(self, reductions: Sequence[Reduction]) -> Handle:
        """Sums over the group; the wire carries the pieces' dtype, the sum is taken in the shard's
        where the primitive allows it."""

    @abstractmethod
    def all_reduce(self, tensors: Sequence[Tensor], wire: torch.dtype) -> Handle:
        """Replaces each tensor by its sum over the group, bitwise the same on every rank; the wire
        carries `wire`."""

    def quiesce(self) -> None:  # noqa: B027 (most have read their sources when a handle is waited for)
        """Until no other rank reads this one's sources (shards, pieces) any more: before they are
        overwritten in place. Every rank calls it, with no call of its own still to come from another
        thread."""

    @property
    def read_from(self) -> dict[int, int]:
        """Bytes that this rank has read from others' memory instead of a connection, by global rank."""
        return {}

    def close(self) -> None:
        """Ends what it holds; every rank calls it, when nothing is on its way any more."""
        for group in self.own_groups:
            end_group(group)
        self.own_groups = ()


def end_group(group: dist.ProcessGroup) -> None:
    """Every rank of it calls it."""
    with suppress(RuntimeError):  # a peer that is gone reads nothing any more
        dist.barrier(group)  # a connection that is closed takes away what a peer has still to read
    dist.destroy_process_group(group)


class AloneCollectives(Collectives):
    """A group of one rank: nothing to move."""

    def all_gather(self, fulls: Sequence[Tensor], shards: Sequence[Tensor]) -> Handle:
        for full, shard in zip(fulls, shards, strict=True):
            if full.data_ptr() != shard.data_ptr():
                full.copy_(shard)
        return Handle(())

    def reduce_scatter(self, reductions: Sequence[Reduction]) -> Handle:
        for item in reductions:
            write_own(item, 0)
        return Handle(())

    def all_reduce(self, tensors: Sequence[Tensor], wire: torch.dtype) -> Handle:
        return Handle(())


def flatten(pieces: Sequence[Piece], numel: int, like: Tensor) -> Tensor:
    """The pieces (in order of their offsets) in one buffer of `numel` elements on `like`'s device, zero
    where none lies. On an accelerator one kernel copies all of them."""
    if len(pieces) == 1 and pieces[0][1].numel() == numel:
        return pieces[0][1].reshape(-1)
    dtype = pieces[0][1].dtype if pieces else like.dtype
    flat = torch.empty(numel, dtype=dtype, device=like.device)
    end = 0
    for offset, values in [*pieces, (numel, flat[:0])]:
        flat[end:offset].zero_()
        end = offset + values.numel()
    if pieces:
        places = [flat.narrow(0, offset, values.numel()) for offset, values in pieces]
        torch._foreach_copy_(places, [values.reshape(-1) for _, values in pieces])
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


def overlap(pieces: Sequence[Piece], index: int, shard_numel: int) -> Iterator[Piece]:
    """The parts of the pieces inside shard `index`: (offset within the shard, flat view)."""
    begin, end = index * shard_numel, (index + 1) * shard_numel
    for offset, values in pieces:
        low, high = max(offset, begin), min(offset + values.numel(), end)
        if low < high:
            yield low - begin, values.reshape(-1).narrow(0, low - offset, high - low)


def write_own(item: Reduction, index: int) -> None:
    """This rank's own addend into its shard."""
    if not item.accumulate:
        item.shard.zero_()
    for start, part in overlap(item.pieces, index, len(item.shard)):
        item.shard.narrow(0, start, len(part)).add_(part)
