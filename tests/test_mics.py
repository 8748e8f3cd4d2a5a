"""MiCS: the engine over partition groups of any size, against plain torch that sees every batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from engine_scenarios import LAST, Program
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from suite.impls.sharded.options import EngineOptions
from suite.testbeds.local import LocalTestbed
from suite.testbeds.ranks import LocalRanks

BASE = EngineOptions(poison=True, hierarchical=True)


@pytest.fixture(scope="module", params=[4, 6, 8])
def ranks(request: pytest.FixtureRequest) -> Iterator[LocalRanks]:
    with LocalTestbed(request.param, request.param).launch(Program, 60) as running:
        yield running


@st.composite
def shapes(draw: st.DrawFn, world: int) -> tuple[int, int]:
    """(ranks per node, partition size)"""
    divisors = [size for size in range(1, world + 1) if world % size == 0]
    return draw(st.sampled_from(divisors)), draw(st.sampled_from(divisors))


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(),
    scenario=st.sampled_from(
        ["plain", "tied", "frozen", "unused", "called twice", "checkpointed, reentrant", "no blocks"]
    ),
    hierarchical=st.booleans(),
    two_hop=st.booleans(),
    sharding=st.sampled_from(["partition", "world"]),
    stock=st.booleans(),
    micro_steps=st.sampled_from([1, 3]),
    last=st.sampled_from(sorted(LAST)),
)
def test_any_partition_of_the_world_gives_what_plain_torch_gives(
    ranks: LocalRanks,
    data: st.DataObject,
    scenario: str,
    hierarchical: bool,
    two_hop: bool,
    sharding: str,
    stock: bool,
    micro_steps: int,
    last: str,
) -> None:
    ranks_per_node, partition_size = data.draw(shapes(len(ranks.pids())))
    options = replace(
        BASE,
        hierarchical=hierarchical,
        two_hop=two_hop,
        optimizer_sharding=sharding,
        stock_collectives=stock,
    )
    answers = ranks.call(
        "difference",
        scenario,
        "adamw",
        options,
        micro_steps,
        0.5,
        partition_size,
        ranks_per_node,
        last,
        timeout_s=60,
    )
    assert max(answers) < 5e-5


@pytest.mark.parametrize("stock", [False, True])
@pytest.mark.parametrize("micro_steps", [2, 3, 5])
def test_a_model_of_one_unit_adds_its_micro_steps_up_in_order(
    ranks: LocalRanks, stock: bool, micro_steps: int
) -> None:
    """Its next sum is there before the last one has been waited for, and hop 2 must not overtake."""
    options = replace(BASE, stock_collectives=stock)
    for _ in range(3):
        answers = ranks.call(
            "difference", "no blocks", "adamw", options, micro_steps, None, 2, None, "as it is", timeout_s=60
        )
        assert max(answers) < 5e-5
