"""What a rank did when: the event log that pacing and implementations fill, for a timeline."""

from __future__ import annotations

import time
from collections.abc import Iterator
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


class Trace:
    """One rank's log. While it is not `recording`, adding to it costs a comparison."""

    def __init__(self) -> None:
        self.recording = False
        self.spans: list[Span] = []
        self.marks: list[Mark] = []

    def restart(self) -> None:
        """Forgets what was logged and records from now on."""
        self.spans, self.marks = [], []
        self.recording = True

    @staticmethod
    def now() -> float:
        """To be kept by whoever will `add` the span that begins here."""
        return time.perf_counter()

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
        try:
            yield
        finally:
            self.add(kind, name, start_s)
