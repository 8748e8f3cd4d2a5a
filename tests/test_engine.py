"""The engine against plain torch on models that are nobody's preset: every shape of use it promises."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from engine_scenarios import OPTIMIZERS, SCENARIOS, Program

from suite.impls.sharded.options import EngineOptions, UnoptimizedOptions
from suite.testbeds.local import LocalTestbed
from suite.testbeds.ranks import LocalRanks


@pytest.fixture(scope="module", params=[1, 2, 3])
def ranks(request: pytest.FixtureRequest) -> Iterator[LocalRanks]:
    with LocalTestbed(request.param, request.param).launch(Program, 60) as running:
        yield running


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("options", [EngineOptions(poison=True), UnoptimizedOptions(poison=True)], ids=type)
def test_any_use_of_a_model_gives_what_plain_torch_gives(
    ranks: LocalRanks, scenario: str, options: EngineOptions
) -> None:
    answers = ranks.call("difference", scenario, "adamw", options, 2, 0.5, timeout_s=60)
    assert max(answers) < 2e-5


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_any_element_wise_optimizer_with_groups_and_a_schedule_gives_what_plain_torch_gives(
    ranks: LocalRanks, optimizer: str, clip: float | None
) -> None:
    answers = ranks.call("difference", "plain", optimizer, EngineOptions(poison=True), 1, clip, timeout_s=60)
    assert max(answers) < 2e-5


SWITCHES = ("fine_grained_sync", "cached_schedule", "coalesced", "preflattened")
SWITCHES += ("contiguous_arenas", "one_kernel_norm", "group_batched")


@pytest.mark.parametrize("switch", [*SWITCHES, "stock_collectives"])
def test_each_optimisation_can_be_switched_alone(ranks: LocalRanks, switch: str) -> None:
    options = EngineOptions(poison=True, **{switch: switch == "stock_collectives"})
    assert max(ranks.call("difference", "tied", "adamw", options, 2, 0.5, timeout_s=60)) < 2e-5


@pytest.mark.parametrize("prefetch_mb", [0.0, 0.001, 0.004, 1.0])
def test_any_prefetch_bound_gives_the_same(ranks: LocalRanks, prefetch_mb: float) -> None:
    options = EngineOptions(poison=True, prefetch_mb=prefetch_mb)
    assert max(ranks.call("difference", "plain", "adamw", options, 2, None, timeout_s=60)) < 2e-5
