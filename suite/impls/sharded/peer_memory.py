"""Reading another process's memory on the same host, and telling each other when: what NCCL calls a
shared-memory transport, for the CPU.

Linux copies straight from one address space to the other (`process_vm_readv`, "cross-memory
attach"): one copy, where a TCP connection over loopback makes two and runs the network stack.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

CALLS_IN_FLIGHT = 64
"""Collective calls that a rank may have posted and its peers not yet read."""

_SEMAPHORE_STRIDE = 64  # bytes: sizeof(sem_t) is 32, and a cache line each
_ALIVE_CHECK_S = 1.0
_CLOCK_MONOTONIC = 1
_PR_SET_PTRACER = 0x59616D61
_MAX_VECTORS = 1024  # IOV_MAX


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_size_t), ("length", ctypes.c_size_t))


class _Time(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_libc = ctypes.CDLL(None, use_errno=True)


def supported() -> bool:
    """Whether this C library and kernel have what is needed; whether a peer lets itself be read is
    seen only by trying (`Peer.proven`)."""
    return all(hasattr(_libc, name) for name in ("process_vm_readv", "sem_clockwait"))


Span = tuple[int, Tensor]
"""(address in the peer, contiguous tensor of this process that is filled from there)."""


class Board:
    """What one rank shows the others: where the sources of its latest calls lie, and semaphores.

    A page of memory without a name, so that nothing is left behind whatever happens.
    """

    def __init__(self, memory: mmap.mmap, size: int) -> None:
        self._memory = memory
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self.posts = (ctypes.c_int64 * CALLS_IN_FLIGHT).from_buffer(memory)
        """Call number modulo CALLS_IN_FLIGHT -> address of the table of its sources' addresses."""
        first = base + ctypes.sizeof(self.posts)
        semaphores = [Semaphore(first + number * _SEMAPHORE_STRIDE) for number in range(2 * size)]
        self.ready, self.done = semaphores[:size], semaphores[size:]
        """By peer: raised for it when a call is posted, and when this rank has read a call of its."""

    @staticmethod
    def nbytes(size: int) -> int:
        return 8 * CALLS_IN_FLIGHT + 2 * size * _SEMAPHORE_STRIDE


def own_board(size: int) -> tuple[Board, int]:
    """This rank's board, and the file descriptor under which peers open it; then it is to be closed."""
    descriptor = os.memfd_create("suite-board", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, Board.nbytes(size))
        board = Board(mmap.mmap(descriptor, Board.nbytes(size)), size)
        for semaphore in (*board.ready, *board.done):
            semaphore.initialise()
    except OSError:
        os.close(descriptor)
        raise
    return board, descriptor


def allow_peers() -> None:
    """Where Yama lets only a process's ancestors read it, its peers are allowed to as well."""
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    if scope.exists() and scope.read_text().strip() == "1":
        _libc.prctl(_PR_SET_PTRACER, ctypes.c_ulong(-1), 0, 0, 0)


def network_namespace() -> int:
    """A number that ranks on one host share, and nodes of an emulated cluster do not."""
    return os.stat("/proc/self/ns/net").st_ino


class Semaphore:
    """A POSIX semaphore in memory that processes share."""

    def __init__(self, address: int) -> None:
        self._at = ctypes.c_void_p(address)

    def initialise(self) -> None:
        if _libc.sem_init(self._at, 1, 0) != 0:
            raise OSError(ctypes.get_errno(), "sem_init failed")

    def post(self) -> None:
        _libc.sem_post(self._at)

    def taken(self) -> bool:
        """Takes one if there is one."""
        return _libc.sem_trywait(self._at) == 0

    def wait(self, peer: Peer, timeout_s: float) -> None:
        """Raises ConnectionError when the peer that should raise it is gone, TimeoutError when it does
        not within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not self.taken():
            until = time.monotonic() + _ALIVE_CHECK_S
            moment = _Time(int(until), int(until % 1 * 1e9))
            if _libc.sem_clockwait(self._at, _CLOCK_MONOTONIC, ctypes.byref(moment)) == 0:
                return
            peer.require_alive()
            if time.monotonic() > deadline:
                raise TimeoutError(f"rank {peer.rank} did not come to a collective within {timeout_s:g} s")


class Peer:
    """Another rank of this host: its memory, and its board."""

    def __init__(self, rank: int, pid: int) -> None:
        self.rank = rank
        self._pid = pid
        self.read_bytes = 0

    def board(self, descriptor: int, size: int) -> Board:
        """Raises OSError where this process may not look into the other one."""
        with open(f"/proc/{self._pid}/fd/{descriptor}", "r+b") as file:
            return Board(mmap.mmap(file.fileno(), Board.nbytes(size)), size)

    def proven(self, address: int, token: int) -> bool:
        """Whether that process, seen from here, holds `token` at `address`: it is the one meant."""
        found = torch.zeros(1, dtype=torch.int64)
        with suppress(OSError):
            self.read([(address, found)])
        return int(found) == token

    def read(self, spans: Sequence[Span]) -> None:
        """Copies from the peer's memory. Raises ConnectionError when it is gone."""
        for start in range(0, len(spans), _MAX_VECTORS):
            self._read(spans[start : start + _MAX_VECTORS])

    def _read(self, spans: Sequence[Span]) -> None:
        here, there = (_Vector * len(spans))(), (_Vector * len(spans))()
        left = 0
        for number, (address, target) in enumerate(spans):
            nbytes = target.numel() * target.element_size()
            here[number] = _Vector(target.data_ptr(), nbytes)
            there[number] = _Vector(address, nbytes)
            left += nbytes
        first = 0
        while left:
            got = self._read_some(here, there, first)
            if got <= 0:
                raise self._failure(left)
            self.read_bytes += got
            left -= got
            if left:  # Linux moves 2 GiB at a time
                first = _advance(here, there, first, got)

    def _read_some(self, here: ctypes.Array[_Vector], there: ctypes.Array[_Vector], first: int) -> int:
        """Vectors from number `first` on; returns how many bytes were read, -1 when none could be."""
        count = ctypes.c_ulong(len(here) - first)
        return _libc.process_vm_readv(
            ctypes.c_int(self._pid),
            ctypes.byref(here[first]),
            count,
            ctypes.byref(there[first]),
            count,
            ctypes.c_ulong(0),
        )

    def _failure(self, left: int) -> OSError:
        number = ctypes.get_errno()
        if number == errno.ESRCH:
            return self._gone()
        return OSError(number, f"{left} bytes of rank {self.rank} cannot be read: {os.strerror(number)}")

    def require_alive(self) -> None:
        try:
            os.kill(self._pid, 0)
        except ProcessLookupError:
            raise self._gone() from None

    def _gone(self) -> ConnectionError:
        return ConnectionError(f"connection to rank {self.rank} lost: its process is gone")


def _advance(here: ctypes.Array[_Vector], there: ctypes.Array[_Vector], first: int, nbytes: int) -> int:
    """Takes `nbytes`, which have been read, off the vectors from number `first` on; returns the new first."""
    while nbytes >= here[first].length:
        nbytes -= here[first].length
        first += 1
    for vectors in (here, there):
        vectors[first].base += nbytes
        vectors[first].length -= nbytes
    return first
