"""A micro-step's fetch, release and reduce decisions as plain data.

The engine reports *events* (a unit's forward or backward begins or ends) and gets *actions*. What
to do at an event depends on what comes after it, so the first micro-step only records the events;
from them `plan` derives all actions once, and later micro-steps only index them (S1, "Precomputation
/caching"). There is no torch in this file: the projection executes the very same schedule.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum


class Phase(Enum):
    """What happens to a unit at an event."""

    FORWARD = "forward"
    FORWARD_END = "forward end"
    BACKWARD = "backward"
    BACKWARD_END = "backward end"

    @property
    def needs_weights(self) -> bool:
        return self in (Phase.FORWARD, Phase.BACKWARD)


@dataclass(frozen=True)
class Event:
    """`unit` is an index into the engine's units."""

    phase: Phase
    unit: int


class Op(Enum):
    """What the engine can be told to do with units."""

    GATHER = "gather"
    """Start the all-gather of these units' weights, in one call."""
    WAIT = "wait"
    """The compute goes on when these units' weights are there."""
    RELEASE = "release"
    """Free these units' gathered weights."""
    REDUCE = "reduce"
    """Start the reduce-scatter of these units' gradients."""


@dataclass(frozen=True)
class Action:
    op: Op
    units: tuple[int, ...]


@dataclass(frozen=True)
class Limits:
    """How far ahead gathers may run.

    `in_flight_bytes` bounds what is gathered ahead of its use (the next unit is always allowed when
    it is above 0; 0 switches prefetching off); `coalesce_bytes` bounds what goes into one call.
    """

    in_flight_bytes: int
    coalesce_bytes: int


@dataclass(frozen=True)
class Schedule:
    """`actions[i]` is what to do at `events[i]`; one micro-step."""

    events: tuple[Event, ...]
    actions: tuple[tuple[Action, ...], ...]

    def gathered_bytes(self, unit_bytes: Sequence[int]) -> int:
        """Sum of the full sizes of all units gathered in the micro-step, in the unit of `unit_bytes`."""
        return sum(
            unit_bytes[unit]
            for actions in self.actions
            for action in actions
            if action.op is Op.GATHER
            for unit in action.units
        )


class Residency:
    """Which units' weights are gathered or on their way, as decisions are taken."""

    def __init__(self, resident: Sequence[int] = ()) -> None:
        self.present = set(resident)
        self.ahead: set[int] = set()
        """Gathered, or on their way, but not used yet."""
        self.in_use: set[int] = set()
        """Between the begin and the end of their forward or backward; units may be nested."""

    def observe(self, event: Event) -> None:
        if event.phase.needs_weights:
            self.in_use.add(event.unit)
        else:
            self.in_use.discard(event.unit)

    def apply(self, action: Action) -> None:
        if action.op is Op.GATHER:
            self.present.update(action.units)
            self.ahead.update(action.units)
        elif action.op is Op.WAIT:
            self.ahead.difference_update(action.units)
        elif action.op is Op.RELEASE:
            self.present.difference_update(action.units)


def decide(
    event: Event, upcoming: Sequence[Event], residency: Residency, unit_bytes: Sequence[int], limits: Limits
) -> tuple[Action, ...]:
    """What to do at `event`, given the events that follow it (empty when they are not known).

    Changes `residency` to what holds after the actions. `unit_bytes[i]`: gathered size of unit i.
    """
    actions: list[Action] = []

    def do(op: Op, *units: int) -> None:
        action = Action(op, units)
        residency.apply(action)
        actions.append(action)

    residency.observe(event)
    if event.phase.needs_weights:
        if event.unit not in residency.present:
            do(Op.GATHER, event.unit)
        do(Op.WAIT, event.unit)
        for units in _prefetches(event.unit, upcoming, residency, unit_bytes, limits):
            do(Op.GATHER, *units)
    elif event.phase is Phase.BACKWARD_END:
        do(Op.REDUCE, event.unit)
        do(Op.RELEASE, event.unit)
    elif not _used_next(event.unit, upcoming, residency):
        do(Op.RELEASE, event.unit)
    return tuple(actions)


def plan(
    events: Sequence[Event], unit_bytes: Sequence[int], limits: Limits, resident: Sequence[int] = ()
) -> Schedule:
    """All decisions of a micro-step whose events are known; `resident` units never need gathering."""
    residency = Residency(resident)
    actions = [
        decide(event, events[index + 1 :], residency, unit_bytes, limits)
        for index, event in enumerate(events)
    ]
    return Schedule(tuple(events), tuple(actions))


def _prefetches(
    current: int,
    upcoming: Sequence[Event],
    residency: Residency,
    unit_bytes: Sequence[int],
    limits: Limits,
) -> list[tuple[int, ...]]:
    """Units to gather ahead, in the order of their use; each tuple is one call."""
    in_flight = sum(unit_bytes[unit] for unit in residency.ahead)
    calls: list[list[int]] = []
    seen, last = {current}, current
    for unit in _needed(upcoming, residency.in_use - {current}):
        if unit in seen and unit != last:
            break  # released between its two uses: it cannot be fetched yet, and nothing may pass it
        seen.add(unit)
        last = unit
        if unit in residency.present or any(unit in call for call in calls):
            continue
        size = unit_bytes[unit]
        if not limits.in_flight_bytes or (in_flight and in_flight + size > limits.in_flight_bytes):
            break
        if calls and sum(unit_bytes[other] for other in calls[-1]) + size <= limits.coalesce_bytes:
            calls[-1].append(unit)
        else:
            calls.append([unit])
        in_flight += size
    return [tuple(call) for call in calls]


def _used_next(unit: int, upcoming: Sequence[Event], residency: Residency) -> bool:
    """Whether this unit's weights are the next to be needed: releasing them would be for nothing.

    With nothing known to follow, a unit is kept out of memory rather than in it.
    """
    return next(_needed(upcoming, residency.in_use), None) == unit


def _needed(upcoming: Sequence[Event], in_use: set[int]) -> Iterator[int]:
    """The units whose weights will be needed, in that order, but for those that are in use all along."""
    return (event.unit for event in upcoming if event.phase.needs_weights and event.unit not in in_use)


class Scheduler:
    """Walks the schedule, one micro-step after the other.

    The first micro-step is recorded and decided without knowing what follows. With `cached` its plan
    is then indexed; without, each decision is taken anew from the recorded events. When a micro-step
    takes another order than the recorded one, the rest of it is decided without looking ahead, and
    what it did becomes the recording.
    """

    def __init__(
        self, unit_bytes: Sequence[int], limits: Limits, cached: bool, resident: Sequence[int] = ()
    ) -> None:
        self._unit_bytes = unit_bytes
        self._limits = limits
        self._cached = cached
        self._resident = resident
        self._plan: Schedule | None = None
        self._recorded: list[Event] = []
        self._residency = Residency(resident)
        self.rerecorded = 0
        """How often the order of events has changed."""

    @property
    def schedule(self) -> Schedule | None:
        """The plan in force; None until a whole micro-step has been recorded."""
        return self._plan

    def at(self, event: Event) -> tuple[Action, ...]:
        """What to do at the next event of the micro-step."""
        position = len(self._recorded)
        self._recorded.append(event)
        plan = self._plan
        if plan is not None and not (position < len(plan.events) and plan.events[position] == event):
            self._leave(plan, position)
            plan = None
        if plan is None:
            return decide(event, (), self._residency, self._unit_bytes, self._limits)
        if self._cached:
            return plan.actions[position]
        upcoming = plan.events[position + 1 :]
        return decide(event, upcoming, self._residency, self._unit_bytes, self._limits)

    def end(self) -> None:
        """The micro-step is over: the recording becomes the plan, if it is not the same already."""
        if self._plan is None or len(self._recorded) != len(self._plan.events):
            self._plan = plan(self._recorded, self._unit_bytes, self._limits, self._resident)
        self._recorded = []
        self._residency = Residency(self._resident)

    def abandon(self) -> None:
        """The micro-step did not come to its end: it is not recorded, and all units are released."""
        self._recorded = []
        self._residency = Residency(self._resident)

    def _leave(self, plan: Schedule, position: int) -> None:
        """Drops a plan that no longer fits; what it has done so far stays true."""
        self.rerecorded += 1
        self._plan = None
        self._residency = Residency(self._resident)
        for event, actions in zip(plan.events[:position], plan.actions[:position], strict=True):
            self._residency.observe(event)
            for action in actions:
                self._residency.apply(action)
