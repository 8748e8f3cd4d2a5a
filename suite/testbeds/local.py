"""This host as it is: ranks are its processes and talk over its loopback interface."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from suite.testbeds.forked import Site, forked_ranks
from suite.testbeds.ranks import LocalRanks
from suite.testbeds.testbed import Program, Testbed

LOOPBACK = "127.0.0.1"


class LocalTestbed(Testbed):
    """`ranks` processes on this host; `ranks_per_node` only tells the topology."""

    evidence = "measured"

    def __init__(self, ranks: int, ranks_per_node: int, threads: int | None = None) -> None:
        self.ranks = ranks
        self.ranks_per_node = ranks_per_node
        self.threads = threads or threads_per_rank(ranks)

    @contextmanager
    def launch(self, program: Program, startup_timeout_s: float) -> Iterator[LocalRanks]:
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
            _device,
            listener=listener,
        )
        with forked_ranks(program, site, startup_timeout_s) as ranks:
            yield ranks


def threads_per_rank(ranks: int) -> int:
    """An equal share of the cores, at least one."""
    return max(1, (os.cpu_count() or 1) // ranks)


def _device(rank: int) -> tuple[torch.device, str]:
    """This rank's device and the process-group backend for it."""
    if torch.cuda.is_available():
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        return device, "cuda:nccl,cpu:gloo"
    return torch.device("cpu"), "gloo"
