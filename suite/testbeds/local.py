"""This host as it is: ranks are its processes and talk over its loopback interface."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

from suite.testbeds.devices import claim_device, on_the_cpu, require_devices
from suite.testbeds.forked import Site, forked_ranks
from suite.testbeds.ranks import LocalRanks
from suite.testbeds.testbed import Program, Testbed

LOOPBACK = "127.0.0.1"


class LocalTestbed(Testbed):
    """`ranks` processes on this host; `ranks_per_node` only tells the topology.

    They compute on the accelerators, one each, where the host has some; `device_type` "cpu" keeps them
    from it.
    """

    evidence = "measured"

    def __init__(
        self, ranks: int, ranks_per_node: int, threads: int | None = None, device_type: str | None = None
    ) -> None:
        self.ranks = ranks
        self.ranks_per_node = ranks_per_node
        self.threads = threads or threads_per_rank(ranks)
        self.device_type = device_type

    @contextmanager
    def launch(self, program: Program, startup_timeout_s: float) -> Iterator[LocalRanks]:
        if self.device_type != "cpu":
            require_devices(self.ranks)
        # The listening socket is made here, on a port that the kernel picks, and inherited by
        # rank 0: nobody can take the port between choosing and using it.
        listener = socket.create_server((LOOPBACK, 0), backlog=max(128, 4 * self.ranks))
        site = Site(
            self.ranks,
            self.ranks_per_node,
            self.threads,
            LOOPBACK,
            listener.getsockname()[1],
            "lo",
            on_the_cpu if self.device_type == "cpu" else claim_device,
            listener=listener,
        )
        with forked_ranks(program, site, startup_timeout_s) as ranks:
            yield ranks


def threads_per_rank(ranks: int) -> int:
    """An equal share of the cores, at least one."""
    return max(1, cores() // ranks)


def cores() -> int:
    """That this process may use: a job on a shared node has a part of them."""
    return len(os.sched_getaffinity(0))
