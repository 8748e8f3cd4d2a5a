"""A cluster on this machine: a network namespace per node, with links as slow as a scale model asks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from suite.testbeds.devices import on_the_cpu
from suite.testbeds.forked import Site, forked_ranks
from suite.testbeds.local import threads_per_rank
from suite.testbeds.network import INTERFACE, address_of, build_network
from suite.testbeds.ranks import LocalRanks
from suite.testbeds.testbed import Program, Testbed

PORT = 29500
"""Of the rendezvous. Nobody else lives in the node's namespace, so any port is free."""


class EmulatedTestbed(Testbed):
    """`nodes` x `ranks_per_node` processes; between nodes `bits_per_s` per node and direction, inside
    a node its loopback interface, as fast as it is. Ranks compute on the CPU."""

    evidence = "emulated"
    device_type = "cpu"
    busy_limit = 0.6

    def __init__(self, nodes: int, ranks_per_node: int, bits_per_s: float) -> None:
        self.nodes = nodes
        self.ranks_per_node = ranks_per_node
        self.bits_per_s = bits_per_s

    @contextmanager
    def launch(self, program: Program, startup_timeout_s: float) -> Iterator[LocalRanks]:
        """Raises UsageError, too, where the network cannot be built."""
        ranks = self.nodes * self.ranks_per_node
        with build_network(self.nodes, self.bits_per_s) as network:
            site = Site(
                ranks,
                self.ranks_per_node,
                threads_per_rank(ranks),
                address_of(0),
                PORT,
                INTERFACE,
                on_the_cpu,
                enter=lambda rank: network.enter(rank // self.ranks_per_node),
            )
            with forked_ranks(program, site, startup_timeout_s) as running:
                yield running
