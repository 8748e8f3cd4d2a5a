"""Where processes of a run on several machines call the one that drives it.

Pickled objects travel over these connections, as they do over those of `torch.distributed`: whoever can
talk to them can run code. So every caller first shows the run's token, before anything of it is read;
the network between the nodes must be trusted all the same.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection

PATIENCE_S = 5.0
"""For the first word of somebody who has connected."""


@dataclass(frozen=True)
class Address:
    """How to reach the door; `host` as the other nodes resolve it."""

    host: str
    port: int
    token: str


class Door:
    """The driver's end. To be closed when everybody has come."""

    def __init__(self) -> None:
        # On all interfaces: which one the others come through is theirs to know.
        self._socket = socket.create_server(("", 0), backlog=4096)
        self.port: int = self._socket.getsockname()[1]
        self.token = secrets.token_hex(32)

    def receive(self, purpose: str, count: int, timeout_s: float) -> dict[int, Connection]:
        """The connections of callers 0 .. count-1, by number; of those only who came in time."""
        came: dict[int, Connection] = {}
        deadline = time.monotonic() + timeout_s
        while len(came) < count and (left := deadline - time.monotonic()) > 0:
            self._socket.settimeout(left)
            with suppress(TimeoutError):
                connected, _ = self._socket.accept()
                connected.settimeout(None)
                connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                caller = self._admit(Connection(connected.detach()), purpose)
                if caller is not None:
                    came[caller[0]] = caller[1]
        return came

    def _admit(self, connection: Connection, purpose: str) -> tuple[int, Connection] | None:
        """A stranger, or somebody who comes too late for an earlier purpose, is sent away."""
        with suppress(OSError, EOFError, ValueError):
            if connection.poll(PATIENCE_S):
                token, number, what = connection.recv_bytes(256).split(b" ", 2)
                if hmac.compare_digest(token, self.token.encode()) and what == purpose.encode():
                    return int(number), connection
        connection.close()
        return None

    def close(self) -> None:
        self._socket.close()


def knock(door: Address, purpose: str, number: int) -> Connection:
    """A caller's end. Raises OSError when the driver cannot be reached."""
    connection = Client((door.host, door.port))
    assert isinstance(connection, Connection)
    connection.send_bytes(f"{door.token} {number} {purpose}".encode())
    return connection
