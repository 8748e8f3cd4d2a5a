"""A seat: a process that torchrun has started. For every implementation that is measured it forks one
rank, so ranks end, fail and start anew as they do on one machine, while the seat stays.

A seat never computes and never touches a GPU: it must stay free to fork.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from suite.testbeds.devices import claim_device
from suite.testbeds.door import Address, knock
from suite.testbeds.forked import Site, fork_rank, raised
from suite.testbeds.local import threads_per_rank
from suite.testbeds.process import KILL_GRACE_S, ChildProcess
from suite.testbeds.testbed import Program

_SIOCGIFADDR = 0x8915


@dataclass(frozen=True)
class Place:
    """Where a seat is. `address` is its end of its connection to the driver, `driver` the other one's;
    `machine` is equal for seats that see each other's processes."""

    local_rank: int
    address: str
    driver: str
    machine: str


class Seat:
    """Answers the driver's calls, each from the seat's only thread (ranks die with the thread that
    forked them)."""

    def __init__(self, number: int, world: int, ranks_per_node: int, door: Address) -> None:
        self.number = number
        self._world = world
        self._ranks_per_node = ranks_per_node
        self._door = door
        self._listener: socket.socket | None = None
        self._ranks: dict[str, ChildProcess] = {}

    def serve(self) -> None:
        """Until the driver hangs up; all ranks have ended then."""
        channel = knock(self._door, "seat", self.number)
        try:
            self._place = _place(channel, self.number % self._ranks_per_node)
            while (message := channel.recv()) is not None:
                method, arguments = message
                try:
                    answer = getattr(self, method)(*arguments)
                except Exception as error:
                    answer = raised(error)
                channel.send(answer)
        except (EOFError, OSError):
            pass  # the driver has gone
        finally:
            for rank in self._ranks.values():
                rank.kill()

    def place(self) -> Place:
        return self._place

    def run(self, function: Callable[[], Any]) -> Any:
        """In this process, before it forks: imports, caches, facts about the machine."""
        return function()

    def open(self) -> int | None:
        """On rank 0: a port on which the next rank will serve the rendezvous. Opened here and inherited,
        so that nobody can take it meanwhile."""
        if self.number != 0:
            return None
        self._listener = socket.create_server(("", 0), backlog=4096)
        return self._listener.getsockname()[1]

    def fork(
        self,
        team: str,
        program: Program,
        port: int,
        addresses: Sequence[str],
        environment: Mapping[str, str],
    ) -> int:
        """A rank of that team, which calls the driver itself; returns its process id. `addresses`: of
        every rank's node."""
        # What the operator has exported wins over the cluster's preset.
        settings = {**environment, **os.environ}
        interface = settings.get("GLOO_SOCKET_IFNAME") or interface_of(addresses[self.number])
        site = Site(
            self._world,
            self._ranks_per_node,
            threads=threads_per_rank(self._ranks_per_node),
            address=self._door.host,
            port=port,
            interface=interface,
            device=self._device,
            enter=lambda rank: os.environ.update(settings),
            listener=self._listener,
        )
        rank = fork_rank(self.number, program, site, knock(self._door, team, self.number))
        self._ranks[team] = rank
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        return rank.pid

    def of(self, team: str, method: str, *arguments: Any) -> Any:
        """What `suite.testbeds.process.Process` offers, asked of that team's rank."""
        return getattr(self._ranks[team], method)(*arguments)

    def discard(self, team: str) -> None:
        """Ends that team's rank, if it was started, and all that it has started."""
        rank = self._ranks.pop(team, None)
        if rank is not None:
            rank.kill()
            rank.join(KILL_GRACE_S)
            rank.close()

    def _device(self, rank: int) -> tuple[torch.device, str]:
        """Called in the rank. Slurm may show a process its own accelerator only."""
        visible = max(1, torch.accelerator.device_count())
        return claim_device((rank % self._ranks_per_node) % visible)


def _place(channel: Connection, local_rank: int) -> Place:
    with socket.socket(fileno=os.dup(channel.fileno())) as duplicate:
        address, driver = duplicate.getsockname()[0], duplicate.getpeername()[0]
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return Place(local_rank, address, driver, f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}")


def interface_of(address: str) -> str:
    """The network interface with that IPv4 address. Raises ValueError when there is none."""
    if address.startswith("127."):
        return "lo"
    for _, name in socket.if_nameindex():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an address
                continue
        if socket.inet_ntoa(answer[20:24]) == address:
            return name
    raise ValueError(f"no network interface has the address {address}; set GLOO_SOCKET_IFNAME")
