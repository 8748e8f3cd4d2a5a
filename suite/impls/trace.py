"""What a rank does: told at once to whoever watches it, and logged with times for a timeline."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """`COMPUTE` and `WAIT` keep the training thread and exclude each other; any number of `GATHER`s and
    `REDUCE`s may be on their way meanwhile."""

    COMPUTE = "compute"
    WAIT = "wait"
    GATHER = "gather"
    REDUCE = "reduce"


@dataclass(frozen=True)
class Span:
    """Something that lasted from `start_s` to `end_s` on this machine's monotonic clock, which all ranks
    of a host share."""

    kind: Kind
    name: str
    start_s: float
    end_s: float


Tell = Callable[[str, str], None]
"""Hears what the rank is doing and, in it, waiting for (empty: for nothing)."""


def _nobody(doing: str, waiting: str) -> None:
    pass


class Trace:
    """One rank's log. While it is not `recording`, adding to it costs a comparison.

    `tell` hears at once of everything, recorded or not: what it last heard is where a rank was that died.
    """

    def __init__(self, tell: Tell = _nobody) -> None:
        self.recording = False
        self.spans: list[Span] = []
        self._tell = tell
        self._doing = ""

    @staticmethod
    def now() -> float:
        """To be kept by whoever will `add` the span that begins here."""
        return time.perf_counter()

    def at(self, doing: str) -> None:
        """What the training thread does from now on: the forward of a unit, the optimizer step."""
        self._doing = doing
        self._tell(doing, "")

    def add(self, kind: Kind, name: str, start_s: float) -> None:
        """A span that ends now."""
        if self.recording:
            self.spans.append(Span(kind, name, start_s, self.now()))

    @contextmanager
    def span(self, kind: Kind, name: str) -> Iterator[None]:
        """The block of a `with` statement as one span."""
        start_s = self.now()
        try:
            if kind is Kind.WAIT:
                with self.waiting(name):
                    yield
            else:
                yield
        finally:
            self.add(kind, name, start_s)

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """A wait that is told but not logged: it is none of the implementation's. What fails in it leaves its
        name as the last that was told."""
        self._tell(self._doing, name)
        yield
        self._tell(self._doing, "")
