"""Bytes that this process really sent, counted by the kernel on each of its TCP connections.

gloo keeps one TCP connection per pair of ranks and process group open, so the difference of two
readings is the traffic between them, whatever library asked for it. Retransmissions, headers and
other processes are not in it. Ranks of one host that read each other's memory say themselves how much.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

Endpoint = tuple[str, int]

# Offsets in Linux' struct tcp_info (include/uapi/linux/tcp.h), fixed since 4.19.
_BYTES_SENT = 200
_BYTES_RETRANSMITTED = 208
# Column of transmitted bytes in /proc/net/dev, behind the interface's name.
_SENT = 8


@dataclass(frozen=True)
class Connection:
    """One established TCP connection of this process; `sent` in bytes of payload since it opened."""

    local: Endpoint
    peer: Endpoint
    sent: int


class LinkCounter:
    """Bytes, headers included, that have left this rank's node over its network interface: those of all
    its ranks, as they leave a shaped link."""

    def __init__(self, interface: str) -> None:
        self._statistics = os.open("/proc/thread-self/net/dev", os.O_RDONLY)
        self._name = f"{interface}:".encode()

    def read(self) -> int:
        """A few microseconds. Zero where there is no such interface."""
        fields = os.pread(self._statistics, 1 << 16, 0).partition(self._name)[2].split(maxsplit=9)
        return int(fields[_SENT]) if len(fields) > _SENT else 0


def connections() -> list[Connection]:
    """All TCP connections that this process holds."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                connection = _read(int(name))
                if connection is not None:
                    found.append(connection)
    return found


def _read(descriptor: int) -> Connection | None:
    with socket.socket(fileno=os.dup(descriptor)) as duplicate:
        if duplicate.family not in (socket.AF_INET, socket.AF_INET6):
            return None
        if duplicate.type != socket.SOCK_STREAM:
            return None
        local, peer = duplicate.getsockname()[:2], duplicate.getpeername()[:2]
        info = duplicate.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 512)
    if len(info) < _BYTES_RETRANSMITTED + 8:
        return None
    sent, retransmitted = struct.unpack_from("QQ", info, _BYTES_SENT)
    return Connection(local, peer, sent - retransmitted)


def matrix(
    readings: Sequence[Sequence[Connection]], memory_reads: Sequence[Mapping[int, int]] = ()
) -> list[list[int]]:
    """`matrix[i][j]`: bytes that rank i has sent to rank j, from one reading per rank.

    Connections to anything but a rank (the rendezvous store's parent, say) are left out. What rank j
    has read from rank i's memory (`memory_reads[j][i]`) counts as sent.
    """
    owner = {item.local: rank for rank, items in enumerate(readings) for item in items}
    sent = [[0] * len(readings) for _ in readings]
    for rank, items in enumerate(readings):
        for item in items:
            peer = owner.get(item.peer)
            if peer is not None and peer != rank:
                sent[rank][peer] += item.sent
    for reader, reads in enumerate(memory_reads):
        for rank, nbytes in reads.items():
            sent[rank][reader] += nbytes
    return sent


def per_rank(before: list[list[int]], after: list[list[int]]) -> float:
    """Mean bytes that a rank sent between two readings."""
    return (sum(map(sum, after)) - sum(map(sum, before))) / len(after)


def between_nodes(before: list[list[int]], after: list[list[int]], ranks_per_node: int) -> float:
    """Mean bytes that a node sent to other nodes between two readings."""
    total = sum(
        after[i][j] - before[i][j]
        for i in range(len(after))
        for j in range(len(after))
        if i // ranks_per_node != j // ranks_per_node
    )
    return total / (len(after) // ranks_per_node)
