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


@dataclass(frozen=True)
class Mark:
    """Bytes that had left this rank's node by `at_s`, counted from anywhere."""

    at_s: float
    sent_bytes: int


@dataclass(frozen=True)
class Log:
    """What a rank recorded."""

    spans: list[Span]
    marks: list[Mark]


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
        self.marks: list[Mark] = []
        self._tell = tell
        self._doing = ""

    def restart(self) -> None:
        """Forgets what was logged and records from now on."""
        self.spans, self.marks = [], []
        self.recording = True

    @property
    def log(self) -> Log:
        return Log(self.spans, self.marks)

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

    def mark(self, sent_bytes: int) -> None:
        """What the link has carried up to now."""
        if self.recording:
            self.marks.append(Mark(self.now(), sent_bytes))

    @contextmanager
    def span(self, kind: Kind, name: str) -> Iterator[None]:
        """The block of a `with` statement as one span."""
        start_s = self.now()
        if kind is Kind.WAIT:
            self._tell(self._doing, name)
        try:
            yield
        finally:
            self.add(kind, name, start_s)
        if kind is Kind.WAIT:
            self._tell(self._doing, "")

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """A wait that is told but not logged: it is none of the implementation's. What fails in it leaves its
        name as the last that was told."""
        self._tell(self._doing, name)
        yield
        self._tell(self._doing, "")
