"""Collectives among ranks of one host: each reads what it needs from where its peers have it.

A call is posted at once and read when it is waited for, so that what is gathered is still in the
cache when it is used. Nothing is staged: a gathered shard is read from the arena, a gradient from
where autograd left it, each byte copied once.
"""

from __future__ import annotations

import os
import secrets
import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from suite.impls.sharded.collectives import Collectives, Handle, Reduction, Transfer, overlap, write_own
from suite.impls.sharded.peer_memory import (
    CALLS_IN_FLIGHT,
    Board,
    Peer,
    allow_peers,
    network_namespace,
    own_board,
    supported,
)

TIMEOUT_S = 1800.0
"""As long as gloo waits by default."""

SUM_CHUNK_BYTES = 256 * 1024
"""Addends are read and added in parts that stay in the cache in between."""

Read = Callable[[int, list[int]], None]
"""Reads from one peer: (its index, the addresses of its sources)."""


@dataclass(frozen=True)
class _Call:
    """One collective: this rank's sources, which peers read, and what this rank does when it is read:
    first `own`, then `read` from each peer.

    All ranks of the group give sources of the same number and sizes.
    """

    sources: Sequence[Tensor]
    table: Tensor
    own: Callable[[], None]
    read: Read


class CrossMemoryCollectives(Collectives):
    """Sources may be changed only after `quiesce`; they are kept alive until all peers have read them."""

    def __init__(self, group: dist.ProcessGroup | None, index: int, size: int) -> None:
        """Collective. Raises OSError on all ranks alike when one of them cannot read another."""
        super().__init__(index, size)
        self._board, self._peers, self._boards = _introduce(group, index, size)
        self._posting, self._reading = threading.Lock(), threading.Lock()
        self._posted = self._read = self._forgotten = 0
        self._unread: deque[_Call] = deque()
        self._kept: deque[_Call] = deque()
        """Posted and perhaps not yet read by everybody, oldest first."""
        self._acknowledged = dict.fromkeys(self._peers, 0)

    def all_gather(self, fulls: Sequence[Tensor], shards: Sequence[Tensor]) -> Handle:
        pairs = list(zip(fulls, shards, strict=True))

        def own() -> None:
            for full, shard in pairs:
                full.narrow(0, self.index * len(shard), len(shard)).copy_(shard)

        def read(index: int, addresses: list[int]) -> None:
            targets = (full.narrow(0, index * len(shard), len(shard)) for full, shard in pairs)
            self._peers[index].read(list(zip(addresses, targets, strict=True)))

        return self._post(shards, own, read)

    def reduce_scatter(self, reductions: Sequence[Reduction]) -> Handle:
        def own() -> None:
            for item in reductions:
                write_own(item, self.index)

        def read(index: int, addresses: list[int]) -> None:
            remaining = iter(addresses)
            for item in reductions:
                self._add(self._peers[index], item, [next(remaining) for _ in item.pieces])

        return self._post([values for item in reductions for _, values in item.pieces], own, read)

    def _add(self, peer: Peer, item: Reduction, addresses: Sequence[int]) -> None:
        """The peer's addends for this rank's shard, whose pieces begin at `addresses`."""
        for address, piece in zip(addresses, item.pieces, strict=True):
            for start, part in overlap([piece], self.index, len(item.shard)):
                skipped = part.data_ptr() - piece[1].data_ptr()
                add_from(peer, address + skipped, item.shard.narrow(0, start, len(part)), part.dtype)

    def all_reduce(self, tensors: Sequence[Tensor], wire: torch.dtype) -> Handle:
        """Every rank sums one part, then reads the others: 2 (size - 1) / size of the tensors' volume.
        The first half is over when this returns."""
        numels = [-(-len(tensor) // self.size) for tensor in tensors]
        sums = [torch.empty(numel, dtype=tensor.dtype) for numel, tensor in zip(numels, tensors, strict=True)]
        self.reduce_scatter(
            [Reduction(part, [(0, tensor.to(wire))]) for part, tensor in zip(sums, tensors, strict=True)]
        ).wait()
        fulls = [torch.empty(self.size * numel, dtype=wire) for numel in numels]
        gather = self.all_gather(fulls, [part.to(wire) for part in sums])

        def finish() -> None:
            for tensor, full in zip(tensors, fulls, strict=True):
                tensor.copy_(full[: len(tensor)])

        return Handle([gather], finish)

    def quiesce(self) -> None:
        self._read_through(self._posted)
        with self._posting:
            self._forget(self._posted, wait=True)

    def close(self) -> None:
        """Collective: who leaves earlier takes away what others have still to read."""
        with suppress(ConnectionError):  # a peer that is gone reads nothing any more
            self.quiesce()
        super().close()

    @property
    def read_from(self) -> dict[int, int]:
        return {peer.rank: peer.read_bytes for peer in self._peers.values()}

    # --- one order for all calls, the same on every rank: posted in it, read in it

    def _post(self, sources: Sequence[Tensor], own: Callable[[], None], read: Read) -> Handle:
        with self._posting:
            number = self._posted
            if number - self._forgotten == CALLS_IN_FLIGHT:
                # What lies unread here is read first: the peer that is waited for may wait for that.
                self._read_through(number)
                self._forget(number - CALLS_IN_FLIGHT + 1, wait=True)
            self._forget(number, wait=False)
            table = torch.tensor([source.data_ptr() for source in sources], dtype=torch.int64)
            call = _Call(sources, table, own, read)
            self._kept.append(call)
            self._unread.append(call)
            self._board.posts[number % CALLS_IN_FLIGHT] = table.data_ptr()
            self._posted += 1
            for index in self._peers:
                self._board.ready[index].post()
        return Handle([_Turn(self, number)])

    def _read_through(self, end: int) -> None:
        """Reads all calls before number `end` that are still unread."""
        with self._reading:
            while self._read < end:
                call = self._unread.popleft()
                call.own()
                for index, peer in self._peers.items():
                    self._boards[index].ready[self.index].wait(peer, TIMEOUT_S)
                    addresses = torch.empty_like(call.table)
                    peer.read([(self._boards[index].posts[self._read % CALLS_IN_FLIGHT], addresses)])
                    call.read(index, addresses.tolist())
                    self._board.done[index].post()
                self._read += 1

    def _forget(self, end: int, wait: bool) -> None:
        """Lets go of the sources of calls before number `end`, as far as all peers have read them."""
        for index, peer in self._peers.items():
            done = self._boards[index].done[self.index]
            while self._acknowledged[index] < end:
                if wait:
                    done.wait(peer, TIMEOUT_S)
                elif not done.taken():
                    break
                self._acknowledged[index] += 1
        while self._forgotten < min(self._acknowledged.values()):
            self._kept.popleft()
            self._forgotten += 1


class _Turn(Transfer):
    """The call with that number, read when it is waited for."""

    def __init__(self, collectives: CrossMemoryCollectives, number: int) -> None:
        self._collectives = collectives
        self._number = number

    def wait(self) -> None:
        self._collectives._read_through(self._number + 1)


def add_from(peer: Peer, address: int, target: Tensor, dtype: torch.dtype) -> None:
    """Adds the peer's values (of `dtype`) at `address` to `target`, part by part through the cache."""
    chunk = torch.empty(min(len(target), SUM_CHUNK_BYTES // dtype.itemsize), dtype=dtype)
    for start in range(0, len(target), len(chunk)):
        values = chunk[: len(target) - start]
        peer.read([(address + start * dtype.itemsize, values)])
        target.narrow(0, start, len(values)).add_(values)


def _introduce(
    group: dist.ProcessGroup | None, index: int, size: int
) -> tuple[Board, dict[int, Peer], dict[int, Board]]:
    """This rank's board; the others and their boards, by index, the next one first, so that not all begin
    with the same.

    Each shows where it keeps a random number: who reads it there can read all the rest. A rank without a
    board takes part all the same, because the others wait for it.
    """
    board, descriptor, own_namespace = None, -1, -1
    with suppress(OSError):
        if supported():
            allow_peers()
            own_namespace = network_namespace()
            board, descriptor = own_board(size)
    token = torch.tensor([secrets.randbits(62)])
    card = torch.tensor([own_namespace, os.getpid(), descriptor, token.data_ptr(), int(token)])
    cards = [torch.empty_like(card) for _ in range(size)]
    dist.all_gather(cards, card, group=group)
    ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
    peers: dict[int, Peer] = {}
    boards: dict[int, Board] = {}
    able = torch.tensor([int(board is not None)])
    for other in ((index + step) % size for step in range(1, size)):
        namespace, pid, their_descriptor, address, number = cards[other].tolist()
        peers[other] = Peer(ranks[other], pid)
        if not able or namespace != own_namespace or not peers[other].proven(address, number):
            able.zero_()
            continue
        try:
            boards[other] = peers[other].board(their_descriptor, size)
        except OSError:
            able.zero_()
    dist.all_reduce(able, dist.ReduceOp.MIN, group=group)
    if descriptor >= 0:
        os.close(descriptor)  # all have opened it
    if board is None or not able:
        raise OSError("not all ranks of the group can read each other's memory")
    return board, peers, boards
