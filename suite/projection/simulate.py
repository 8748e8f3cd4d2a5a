"""The discrete-event executor: one rank's program on a compute stream and two communication wires.

All ranks do the same at the same time, so one of them stands for any number. The rules are those of
an accelerator's streams: a collective starts when the compute that was issued before it is done and
its wire is free; the compute goes on past one that it does not wait for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from suite.projection.network import Collective, Cost, Wire

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Compute:
    """Seconds of kernels, behind everything issued to the compute stream before."""

    name: str
    seconds: float


@dataclass(frozen=True)
class Start:
    """Issues a collective, which starts behind the compute that was issued before it, and behind the
    collective `after`, of which it is a continuation."""

    key: Key
    collective: Collective
    after: Key | None = None


@dataclass(frozen=True)
class Wait:
    """The compute goes on when that collective has ended. A `blocking` wait also keeps the host, which
    then cannot issue anything ahead."""

    key: Key
    blocking: bool = False


@dataclass(frozen=True)
class Host:
    """Seconds of work on the host, which hide behind the device's as long as it is ahead of it."""

    seconds: float


Instruction = Compute | Start | Wait | Host


@dataclass(frozen=True)
class Programs:
    """A step: `early` micro-steps, all alike, then `last` with everything up to the updated weights."""

    early: tuple[Instruction, ...]
    last: tuple[Instruction, ...]
    carries_over: bool = False
    """Whether an early micro-step leaves collectives on their way into the next one."""


@dataclass(frozen=True)
class Span:
    """Something on a stream of the timeline, seconds from the begin of the step."""

    stream: str
    name: str
    start_s: float
    end_s: float


@dataclass
class Machine:
    """Where the streams stand, and what has been done so far. Bytes as in `Stage`."""

    cost: Cost
    slowdown: float = 0.0
    """Share by which kernels take longer while a collective runs beside them."""
    host_s: float = 0.0
    compute_s: float = 0.0
    wires_s: dict[Wire, float] = field(default_factory=lambda: dict.fromkeys(Wire, 0.0))
    ends_s: dict[Key, float] = field(default_factory=dict)
    busy_s: float = 0.0
    """Seconds in which the compute stream computed."""
    communication_s: dict[Wire, float] = field(default_factory=lambda: dict.fromkeys(Wire, 0.0))
    node_bytes: float = 0.0
    sent_bytes: float = 0.0
    calls: int = 0
    spans: list[Span] | None = None
    """The timeline; None when nobody wants it."""

    def run(self, program: Iterable[Instruction]) -> None:
        for instruction in program:
            if isinstance(instruction, Compute):
                self._compute(instruction)
            elif isinstance(instruction, Start):
                self._start(instruction)
            elif isinstance(instruction, Wait):
                self._wait(instruction)
            else:
                self.host_s += instruction.seconds

    def drain(self) -> None:
        """Everything issued has ended."""
        self.compute_s = max(self.compute_s, self.host_s, *self.wires_s.values())

    def repeat(self, before: Machine, times: int) -> None:
        """As if what was done since `before` were done `times` more, in the same time each."""
        step = self.compute_s - before.compute_s
        self.compute_s += times * step
        self.host_s += times * step
        self.wires_s = {wire: at + times * step for wire, at in self.wires_s.items()}
        self.ends_s = {key: at + times * step for key, at in self.ends_s.items()}
        self.busy_s += times * (self.busy_s - before.busy_s)
        self.node_bytes += times * (self.node_bytes - before.node_bytes)
        self.sent_bytes += times * (self.sent_bytes - before.sent_bytes)
        self.calls += times * (self.calls - before.calls)
        self.communication_s = {
            wire: now + times * (now - before.communication_s[wire])
            for wire, now in self.communication_s.items()
        }

    def copy(self) -> Machine:
        return Machine(
            self.cost,
            self.slowdown,
            self.host_s,
            self.compute_s,
            dict(self.wires_s),
            dict(self.ends_s),
            self.busy_s,
            dict(self.communication_s),
            self.node_bytes,
            self.sent_bytes,
            self.calls,
        )

    def _compute(self, item: Compute) -> None:
        start = max(self.compute_s, self.host_s)
        shared = min(item.seconds, max(0.0, max(self.wires_s.values()) - start))
        seconds = item.seconds + self.slowdown * shared
        self.compute_s = start + seconds
        self.busy_s += seconds
        self._record("compute", item.name, start, self.compute_s)

    def _start(self, item: Start) -> None:
        at = max(self.compute_s, self.host_s, 0.0 if item.after is None else self.ends_s[item.after])
        for stage in self.cost(item.collective):
            start = max(at, self.wires_s[stage.wire])
            at = start + stage.seconds
            self.wires_s[stage.wire] = at
            self.communication_s[stage.wire] += stage.seconds
            self.node_bytes += stage.node_bytes
            self.sent_bytes += stage.sent_bytes
            if self.spans is not None:
                name = f"{item.collective.kind.value}: {' '.join(map(str, item.key))}"
                self._record(stage.wire.value, name, start, at)
        self.calls += 1
        self.ends_s[item.key] = at

    def _wait(self, item: Wait) -> None:
        self.compute_s = max(self.compute_s, self.ends_s[item.key])
        if item.blocking:
            self.host_s = max(self.host_s, self.compute_s)

    def _record(self, stream: str, name: str, start: float, end: float) -> None:
        if self.spans is not None and end > start:
            self.spans.append(Span(stream, name, start, end))


def run_step(
    programs: Programs,
    micro_steps: int,
    cost: Cost,
    slowdown: float = 0.0,
    timeline: bool = False,
) -> Machine:
    """A step of `micro_steps`.

    Early micro-steps that wait for what they have started take equally long: one of them is executed and
    stands for all, unless the timeline is wanted.
    """
    machine = Machine(cost, slowdown, spans=[] if timeline else None)
    start = machine.copy()
    executed = micro_steps - 1 if timeline or programs.carries_over else min(1, micro_steps - 1)
    for _ in range(executed):
        machine.run(programs.early)
    machine.repeat(start, micro_steps - 1 - executed)
    machine.run(programs.last)
    machine.drain()
    return machine
