"""A cluster's network inside this machine: one network namespace per node, joined by shaped links.

The namespaces have no names: file descriptors of the process that built them, and later the ranks
inside, are all that keeps them. Whatever ends those processes, the kernel then removes namespaces,
links and shaping; nothing can be left behind, and nothing else's namespaces are ever touched.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from suite.errors import UsageError
from suite.testbeds.signals import uninterrupted

INTERFACE = "eth0"
MTU = 9000
MAX_NODES = 200

# The largest packet that the stack hands over is 64 KB, which must fit into the burst; the queue
# takes several layers, so that nothing is ever lost and sent again.
_SHAPING = "tbf rate {rate:.0f}bit burst 64kb limit 16mb"

# What makes TCP use a slow link fully and steadily: no new slow start after the pause of a compute
# phase, no retransmission for what only waits in a queue, a simple congestion control.
_SYSCTLS = {
    "ipv4/tcp_slow_start_after_idle": "0",
    "ipv4/tcp_early_retrans": "0",
    "ipv4/tcp_recovery": "0",
    "ipv4/tcp_reordering": "300",
    "ipv4/tcp_congestion_control": "reno",
    # No address of the other family, which would still be tentative when the ranks start.
    "ipv6/conf/all/disable_ipv6": "1",
}
_ROUTE = "initcwnd 300 initrwnd 300 rto_min 3s quickack 1"

_NEW_USER = 0x10000000  # CLONE_NEWUSER, CLONE_NEWNET: Python has them from 3.12 on
_NEW_NET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


def address_of(node: int) -> str:
    """IPv4 address of a node (0, 1, ...) inside the network."""
    return f"10.77.0.{node + 1}"


class Network:
    """The namespaces of one cluster, kept alive by this object until `close` (or the process ends).

    `user` is there only when the network was built without privileges.
    """

    def __init__(self, descriptors: Sequence[int], has_user: bool) -> None:
        self._descriptors = list(descriptors)
        self._user = self._descriptors[0] if has_user else None
        self._nodes = self._descriptors[2:] if has_user else self._descriptors[1:]

    def enter(self, node: int) -> None:
        """Moves this (single-threaded) process into a node, for good."""
        if self._user is not None:
            _set_namespace(self._user, _NEW_USER)
        _set_namespace(self._nodes[node], _NEW_NET)

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def build_network(nodes: int, bits_per_s: float) -> Network:
    """Nodes on one switch; each one's link carries `bits_per_s` in either direction (Ethernet and
    IP headers included). As root, or without privileges in a user namespace of its own.

    Raises UsageError when this machine cannot: no `ip` or `tc`, no permission, no such kernel module.
    """
    if not 1 <= nodes <= MAX_NODES:
        raise UsageError(f"testbed.nodes={nodes} is not possible here; use 1 to {MAX_NODES} nodes")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise UsageError(f"testbed=emulated needs the command {tool!r}; install iproute2")
    ours, theirs = socket.socketpair()
    with ours:
        with uninterrupted():
            builder = os.fork()
            if builder == 0:
                ours.close()
                _builder(nodes, bits_per_s, theirs)
        theirs.close()
        try:
            message, descriptors, _, _ = socket.recv_fds(ours, 4096, MAX_NODES + 2)
        except BaseException:
            os.kill(builder, signal.SIGKILL)
            raise
        finally:
            os.waitpid(builder, 0)
    if not descriptors:
        reason = message.decode(errors="replace") or "the process that builds it died"
        raise UsageError(f"testbed=emulated cannot build its network here: {reason}")
    return Network(descriptors, has_user=message == b"user")


def why_not() -> str | None:
    """What keeps this host from emulating a cluster; None when nothing does. Builds one and lets go."""
    try:
        build_network(1, 1e9).close()
    except UsageError as error:
        return str(error)
    return None


def _builder(nodes: int, bits_per_s: float, channel: socket.socket) -> NoReturn:
    """A process of its own, because it walks through all the namespaces; sends them to the parent."""
    try:
        user = _new_namespaces()
        fabric = _here("net")
        members = []
        for node in range(nodes):
            _unshare(_NEW_NET)
            members.append(_here("net"))
            _set_up_node(node, bits_per_s, fabric)
        _set_namespace(fabric, _NEW_NET)
        _set_up_switch(nodes, bits_per_s)
        descriptors = [*([] if user is None else [user]), fabric, *members]
        socket.send_fds(channel, [b"root" if user is None else b"user"], descriptors)
    except BaseException as error:
        reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        with suppress(OSError):
            channel.send(" ".join(str(reason).split()).encode()[:4096])
    finally:
        os._exit(0)  # whatever happens: this is a copy of somebody else's process


def _new_namespaces() -> int | None:
    """Leaves this process in a new network namespace; returns the user namespace that it needed."""
    try:
        _unshare(_NEW_NET)
        return None
    except PermissionError:
        uid, gid = os.geteuid(), os.getegid()
        _unshare(_NEW_USER | _NEW_NET)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {uid} 1")
        Path("/proc/self/gid_map").write_text(f"0 {gid} 1")
        return _here("user")


def _set_up_node(node: int, bits_per_s: float, fabric: int) -> None:
    """Addresses, link and shaping of the node in whose namespace this process is."""
    for name, value in _SYSCTLS.items():
        setting = Path("/proc/sys/net", name)
        if setting.exists():
            setting.write_text(value)
    address, network = address_of(node), "10.77.0.0/24"
    _batch(
        "ip",
        [
            "link set lo up",
            f"link add {INTERFACE} mtu {MTU} type veth"
            f" peer name node{node} mtu {MTU} netns /proc/self/fd/{fabric}",
            f"address add {address}/24 dev {INTERFACE}",
            f"link set {INTERFACE} up",
            f"route replace {network} dev {INTERFACE} src {address} {_ROUTE}",
        ],
        fabric,
    )
    _batch("tc", [f"qdisc add dev {INTERFACE} root {_SHAPING.format(rate=bits_per_s)}"])


def _set_up_switch(nodes: int, bits_per_s: float) -> None:
    ports = [f"node{node}" for node in range(nodes)]
    _batch(
        "ip",
        [
            f"link add fabric mtu {MTU} type bridge",
            "link set fabric up",
            *(f"link set {port} master fabric up" for port in ports),
        ],
    )
    _batch("tc", [f"qdisc add dev {port} root {_SHAPING.format(rate=bits_per_s)}" for port in ports])


def _batch(tool: str, commands: Sequence[str], *descriptors: int) -> None:
    subprocess.run(
        [tool, "-batch", "-"],
        input="\n".join(commands),
        text=True,
        capture_output=True,
        check=True,
        pass_fds=descriptors,
    )


def _here(kind: str) -> int:
    """A descriptor of this process's namespace of that kind."""
    return os.open(f"/proc/self/ns/{kind}", os.O_RDONLY | os.O_CLOEXEC)


def _unshare(flags: int) -> None:
    _checked(_libc.unshare(flags), "unshare")


def _set_namespace(descriptor: int, kind: int) -> None:
    _checked(_libc.setns(descriptor, kind), "setns")


def _checked(result: int, call: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
