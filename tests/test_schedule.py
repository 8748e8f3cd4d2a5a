"""The schedule as data: what it promises for any order of events."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from suite.impls.sharded.schedule import Event, Limits, Op, Phase, Scheduler, plan

ROOT = 0
FAR = Limits(in_flight_bytes=1 << 60, coalesce_bytes=0)
NO_PREFETCH = Limits(in_flight_bytes=0, coalesce_bytes=0)


def micro_step(order: list[int], root: bool = True) -> list[Event]:
    """Forward through the units in `order`, then backward through them in reverse."""
    events = [Event(Phase.FORWARD, ROOT)] if root else []
    for unit in order:
        events += [Event(Phase.FORWARD, unit), Event(Phase.FORWARD_END, unit)]
    events += [Event(Phase.FORWARD_END, ROOT), Event(Phase.BACKWARD, ROOT)] if root else []
    for unit in reversed(order):
        events += [Event(Phase.BACKWARD, unit), Event(Phase.BACKWARD_END, unit)]
    return events + ([Event(Phase.BACKWARD_END, ROOT)] if root else [])


class Machine:
    """Carries out a plan and remembers what is gathered, to hold the plan against its promises."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes
        self.gathered: set[int] = set()
        self.unused: set[int] = set()
        self.most_unused = 0
        self.gathers = 0
        self.calls = 0

    def do(self, event: Event, actions: object) -> None:
        for action in actions:  # type: ignore[attr-defined]
            if action.op is Op.GATHER:
                assert not self.gathered & set(action.units), "gathered twice"
                self.gathered.update(action.units)
                self.unused.update(action.units)
                self.gathers += len(action.units)
                self.calls += 1
            elif action.op is Op.WAIT:
                assert set(action.units) <= self.gathered, "waited for something not on its way"
                self.unused.difference_update(action.units)
            elif action.op is Op.RELEASE:
                assert set(action.units) <= self.gathered, "released twice"
                self.gathered.difference_update(action.units)
            self.most_unused = max(self.most_unused, sum(self.sizes[unit] for unit in self.unused))
        if event.phase.needs_weights:
            assert event.unit in self.gathered and event.unit not in self.unused, "used before it was there"


units = st.lists(st.integers(1, 5), min_size=1, max_size=8)
sizes = st.lists(st.integers(1, 50), min_size=6, max_size=6)
limits = st.builds(Limits, st.integers(0, 200), st.integers(0, 100))


def run(events: list[Event], sizes: list[int], limits: Limits) -> Machine:
    machine = Machine(sizes)
    schedule = plan(events, sizes, limits)
    for event, actions in zip(schedule.events, schedule.actions, strict=True):
        machine.do(event, actions)
    return machine


@given(units, sizes, limits)
def test_weights_are_there_when_they_are_used_and_gone_at_the_end(
    order: list[int], sizes: list[int], limits: Limits
) -> None:
    order = list(dict.fromkeys(order))
    machine = run(micro_step(order), sizes, limits)
    assert not machine.gathered


@given(units, sizes, limits)
def test_what_is_gathered_ahead_stays_within_the_bound_or_is_one_unit(
    order: list[int], sizes: list[int], limits: Limits
) -> None:
    machine = run(micro_step(list(dict.fromkeys(order))), sizes, limits)
    assert machine.most_unused <= max(limits.in_flight_bytes, max(sizes))


@given(units, sizes, limits)
def test_looking_ahead_moves_no_more_than_fetching_on_demand(
    order: list[int], sizes: list[int], limits: Limits
) -> None:
    events = micro_step(list(dict.fromkeys(order)))
    ahead, demand = run(events, sizes, limits), run(events, sizes, NO_PREFETCH)
    assert ahead.gathers == demand.gathers


def test_a_block_is_gathered_once_for_forward_and_once_for_backward_and_the_root_once() -> None:
    events = micro_step([1, 2, 3])
    schedule = plan(events, [10, 1, 1, 1], FAR)
    gathered = [
        unit for step in schedule.actions for act in step if act.op is Op.GATHER for unit in act.units
    ]
    assert sorted(gathered) == [0, 1, 1, 2, 2, 3]  # the last block stays: its backward comes next
    assert schedule.gathered_bytes([10, 1, 1, 1]) == 15


def test_the_next_unit_is_on_its_way_while_one_computes() -> None:
    events = micro_step([1, 2, 3], root=False)
    schedule = plan(events, [0, 1, 1, 1], Limits(in_flight_bytes=1, coalesce_bytes=0))
    first = schedule.actions[0]
    assert [(action.op, action.units) for action in first] == [
        (Op.GATHER, (1,)),
        (Op.WAIT, (1,)),
        (Op.GATHER, (2,)),
    ]


def test_small_units_are_gathered_in_one_call() -> None:
    events = micro_step([1, 2, 3, 4], root=False)
    single = run(events, [0, 1, 1, 1, 1], FAR)
    together = run(events, [0, 1, 1, 1, 1], Limits(in_flight_bytes=1 << 60, coalesce_bytes=3))
    assert together.gathers == single.gathers
    assert together.calls < single.calls


def test_gradients_of_every_unit_are_reduced_once() -> None:
    schedule = plan(micro_step([1, 2, 3]), [1] * 4, FAR)
    reduced = [unit for step in schedule.actions for act in step if act.op is Op.REDUCE for unit in act.units]
    assert sorted(reduced) == [0, 1, 2, 3]


def walk(scheduler: Scheduler, machine: Machine, events: list[Event]) -> None:
    for event in events:
        machine.do(event, scheduler.at(event))
    scheduler.end()


@given(st.lists(st.permutations([1, 2, 3, 4, 5]), min_size=1, max_size=4), sizes, limits, st.booleans())
def test_a_changed_order_is_followed_correctly_and_recorded_anew(
    orders: list[list[int]], sizes: list[int], limits: Limits, cached: bool
) -> None:
    scheduler = Scheduler(sizes, limits, cached)
    machine = Machine(sizes)
    for order in orders:
        walk(scheduler, machine, micro_step(order))
        assert scheduler.schedule is not None
        assert scheduler.schedule.events == tuple(micro_step(order))
    changes = sum(before != after for before, after in pairwise(orders))
    assert scheduler.rerecorded == changes


@given(units, sizes, limits)
def test_cached_decisions_are_the_ones_that_would_be_taken_anew(
    order: list[int], sizes: list[int], limits: Limits
) -> None:
    events = micro_step(list(dict.fromkeys(order)))
    cached, fresh = Scheduler(sizes, limits, cached=True), Scheduler(sizes, limits, cached=False)
    for _ in range(3):
        assert [cached.at(event) for event in events] == [fresh.at(event) for event in events]
        cached.end()
        fresh.end()
