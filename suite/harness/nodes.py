"""Whether the nodes of a cluster are alike: numbers from nodes that differ mean nothing."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite.errors import UsageError
from suite.harness.environment import environment
from suite.testbeds.torchrun import ASK_TIMEOUT_S, Seats, network_settings

MEMORY_TOLERANCE = 0.05
"""Nodes of one kind differ a little in the memory that their firmware leaves over."""


@dataclass(frozen=True)
class Node:
    """One node's name and what has to be equal on all; `memory_bytes` only nearly so."""

    name: str
    memory_bytes: int
    facts: dict[str, str]


def describe_node() -> Node:
    """Of this machine; runs on every node."""
    env = environment()
    packages = {f"version of {name}": str(version) for name, version in env["packages"].items()}
    variables = [f"{name}={value}" for name, value in network_settings(os.environ).items()]
    facts = {
        "version of python": env["python"],
        **packages,
        "commit": f"{env['commit']}{' (modified)' if env['modified'] else ''}",
        "kernel": env["system"],
        "processor": f"{env['cores']} x {env['cpu']}",
        "accelerators": _counted(env["accelerators"]),
        "network interfaces": _counted(network_interfaces()),
        "network settings": " ".join(variables) or "none",
    }
    return Node(socket.gethostname(), env["memory_bytes"], facts)


def network_interfaces() -> list[str]:
    """What each physical port can do, by speed and frame size rather than name: names may differ."""
    found = []
    for port in sorted(Path("/sys/class/net").glob("*")):
        if (port / "device").exists():
            found.append(f"{_read(port / 'speed')} Mbit/s, MTU {_read(port / 'mtu')}")
    # EFA and InfiniBand devices, both of which the kernel lists here.
    found += [_read(rate) for rate in sorted(Path("/sys/class/infiniband").glob("*/ports/*/rate"))]
    return found


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:  # the kernel refuses to tell the speed of an interface that is down
        return "unknown"


def _counted(things: Sequence[str]) -> str:
    counts = Counter(things)
    return ", ".join(f"{count} x {thing}" for thing, count in sorted(counts.items())) or "none"


def nodes_of(seats: Seats) -> list[Node]:
    """One description per node, in rank order."""
    every = seats.call("run", describe_node, timeout_s=ASK_TIMEOUT_S)
    return every[:: seats.ranks_per_node]


def differences(nodes: Sequence[Node]) -> list[str]:
    """One line for everything in which a node differs from most of the others."""
    found = []
    for fact in nodes[0].facts:
        values = [node.facts.get(fact, "unknown") for node in nodes]
        usual, _ = Counter(values).most_common(1)[0]
        for number, value in enumerate(values):
            if value != usual:
                found.append(f"{fact}: {_name(nodes, number)} has {value}, most nodes have {usual}")
    memory = sorted(node.memory_bytes for node in nodes)
    if memory[0] < (1 - MEMORY_TOLERANCE) * memory[-1]:
        found.append(f"memory: between {memory[0] / 2**30:.0f} and {memory[-1] / 2**30:.0f} GiB")
    return found


def _name(nodes: Sequence[Node], number: int) -> str:
    return f"node {number} ({nodes[number].name})"


def require_equal(nodes: Sequence[Node]) -> None:
    """Raises UsageError for a cluster whose nodes differ."""
    found = differences(nodes)
    if found:
        more = f" (and {len(found) - 1} more; see `suite doctor --cluster`)" if len(found) > 1 else ""
        raise UsageError(f"the nodes differ, so nothing is measured on them: {found[0]}{more}")


def summary(nodes: Sequence[Node]) -> dict[str, Any]:
    """For the records: equal on all nodes."""
    kept = ("accelerators", "network interfaces")
    return {"count": len(nodes), **{key: nodes[0].facts[key] for key in kept}}
