"""The executor keeps the rules of an accelerator's streams."""

from __future__ import annotations

import pytest

from suite.projection.network import Collective, Group, Kind, Stage, Wire
from suite.projection.simulate import Compute, Host, Machine, Programs, Start, Wait, run_step

GATHER = Collective(Kind.ALL_GATHER, 1.0, Group(2, 1))


def second(_: Collective) -> tuple[Stage, ...]:
    return (Stage(Wire.INTER, 1.0, 10.0, 5.0),)


def test_a_collective_runs_beside_the_compute_and_only_the_rest_is_waited_for() -> None:
    machine = Machine(second)
    machine.run([Start(("a",), GATHER), Compute("x", 0.75), Wait(("a",)), Compute("y", 1.0)])
    assert machine.compute_s == pytest.approx(2.0) and machine.busy_s == pytest.approx(1.75)


def test_a_collective_starts_behind_the_compute_that_was_issued_before_it() -> None:
    machine = Machine(second)
    machine.run([Compute("x", 2.0), Start(("a",), GATHER), Wait(("a",))])
    assert machine.compute_s == pytest.approx(3.0)


def test_one_wire_carries_one_collective_at_a_time() -> None:
    machine = Machine(second)
    machine.run([Start(("a",), GATHER), Start(("b",), GATHER), Wait(("b",))])
    assert machine.compute_s == pytest.approx(2.0)


def test_work_on_the_host_hides_behind_the_device_unless_the_host_has_waited() -> None:
    ahead, blocked = Machine(second), Machine(second)
    ahead.run([Start(("a",), GATHER), Wait(("a",)), Host(0.5), Compute("x", 1.0)])
    blocked.run([Start(("a",), GATHER), Wait(("a",), blocking=True), Host(0.5), Compute("x", 1.0)])
    assert (ahead.compute_s, blocked.compute_s) == (pytest.approx(2.0), pytest.approx(2.5))


def test_kernels_run_slower_beside_a_collective_for_as_long_as_it_runs() -> None:
    machine = Machine(second, slowdown=0.5)
    machine.run([Start(("a",), GATHER), Compute("x", 3.0)])
    assert machine.compute_s == pytest.approx(3.5)


@pytest.mark.parametrize("micro_steps", [1, 2, 5])
def test_repeated_micro_steps_take_as_long_as_executed_ones(micro_steps: int) -> None:
    step = (Start(("a",), GATHER), Compute("x", 0.5), Wait(("a",)), Compute("y", 0.2))
    programs = Programs(step, (*step, Compute("optimizer", 0.1)))
    short = run_step(programs, micro_steps, second)
    full = run_step(programs, micro_steps, second, timeline=True)
    for name in ("compute_s", "busy_s", "node_bytes", "sent_bytes", "calls"):
        assert getattr(short, name) == pytest.approx(getattr(full, name)), name
