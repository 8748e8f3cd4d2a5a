"""What a rank is doing right now, readable by its parent whatever becomes of the rank."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass

_COUNT = struct.Struct("<Q")
_TEXT = 120
_DOING = slice(_COUNT.size, _COUNT.size + _TEXT)
_WAITING = slice(_COUNT.size + _TEXT, _COUNT.size + 2 * _TEXT)


@dataclass(frozen=True)
class Sighting:
    """`doing` (forward of a unit, the optimizer step) and, while it lasts, what the rank is `waiting` for
    in it (a collective); both empty where the program tells nothing. `count` grows with every change: a
    rank whose count stands still makes no progress."""

    count: int
    doing: str
    waiting: str

    def __str__(self) -> str:
        waiting = f"waiting for {self.waiting}" if self.waiting else ""
        return ", ".join(filter(None, (self.doing, waiting)))


class Whereabouts:
    """A few bytes that a rank shares with the process that forks it.

    The parent makes one per rank before the fork; the rank calls `tell`, which takes about a microsecond,
    and the parent `read`s, also after the rank was killed. In a process that nobody forked it is
    memory like any other.
    """

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, _WAITING.stop)
        self._count = 0

    def tell(self, doing: str, waiting: str = "") -> None:
        """Only from the rank's training thread. Longer texts are cut."""
        self._count += 1
        self._memory[_DOING] = doing.encode()[:_TEXT].ljust(_TEXT, b"\0")
        self._memory[_WAITING] = waiting.encode()[:_TEXT].ljust(_TEXT, b"\0")
        _COUNT.pack_into(self._memory, 0, self._count)

    def read(self) -> Sighting:
        return Sighting(
            _COUNT.unpack_from(self._memory)[0],
            _text(self._memory[_DOING]),
            _text(self._memory[_WAITING]),
        )


def _text(field: bytes) -> str:
    return field.rstrip(b"\0").decode(errors="replace")
