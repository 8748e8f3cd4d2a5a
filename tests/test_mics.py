"""MiCS: the engine over partition groups of any size, against plain torch that sees every batch."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_scenarios import LAST, Program, Stack, batch_of, compare, one_forward
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from suite.impls import registry
from suite.impls.sharded import checkpoint, shard
from suite.impls.sharded.options import EngineOptions
from suite.impls.trainer import Recipe, Topology
from suite.testbeds.local import LocalTestbed
from suite.testbeds.ranks import LocalRanks

BASE = EngineOptions(poison=True, hierarchical=True)


@pytest.fixture(scope="module", params=[4, 6, 8])
def ranks(request: pytest.FixtureRequest) -> Iterator[LocalRanks]:
    with LocalTestbed(request.param, request.param).launch(MicsProgram, 60) as running:
        yield running


def build_stack() -> Stack:
    torch.manual_seed(3)
    return Stack()


@dataclass
class Batch:
    rank: int
    step: int
    micro_step: int

    def loss(self, model: torch.nn.Module) -> torch.Tensor:
        return one_forward(model, batch_of(self.rank, self.step, self.micro_step))


class MicsProgram(Program):
    def trained(self, name: str, ranks_per_node: int, options: dict[str, Any]) -> list[torch.Tensor]:
        """All losses, then all parameters, of some steps by a registered implementation."""
        topology = Topology(self._rank, self._size, ranks_per_node)
        trainer = registry.build(name, build_stack, Recipe(micro_steps=2, clip=0.1), topology, options)
        losses = [
            trainer.train_step([Batch(self._rank, step, micro_step) for micro_step in range(2)]).loss
            for step in range(5)
        ]
        parameters = list(trainer.full_parameters().values())
        trainer.close()
        return [torch.tensor(losses), *parameters]

    def gathers_before_hop2(self, folder: Path, load: bool) -> tuple[float, float]:
        """How far parameters are off that are asked for (or loaded) right after backward, while hop 2 has not
        even begun on rank 0 and has on the others; and the gradients after that."""
        model, plain = build_stack(), build_stack()
        options = replace(BASE, optimizer_sharding="world")
        engine = shard(model, torch.optim.AdamW(model.parameters()), partition_size=2, options=options)
        checkpointer = checkpoint.Checkpointer(engine)
        checkpointer.save(folder).wait()
        start = engine._two_hop._start_hop2

        def late(*arguments: Any) -> Any:
            time.sleep(0.3)
            return start(*arguments)

        if self._rank == 0:
            engine._two_hop._start_hop2 = late  # type: ignore[method-assign]
        engine.backward(one_forward(model, batch_of(self._rank, 0, 0)))
        if self._rank != 0:
            time.sleep(0.3)
        if load:
            checkpoint.load(folder, engine)
        parameters = dict(engine.full_parameters())
        for rank in range(self._size):
            one_forward(plain, batch_of(rank, 0, 0)).backward()
        ours = dict(engine.full_gradients())
        gradients = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
        checkpointer.close()
        engine.close()
        return compare(parameters, dict(plain.named_parameters())), compare(ours, gradients)


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


@pytest.mark.parametrize("ranks_per_node", [2, None], ids=["nodes of two", "one node"])
def test_one_partition_group_is_bitwise_zero3(ranks: LocalRanks, ranks_per_node: int | None) -> None:
    """Between nodes with the same, flat, collectives: two stages add up in another order."""
    world = len(ranks.pids())
    per_node = ranks_per_node or world
    options = {"partition_size": world, "hierarchical": per_node == world}
    zero3 = ranks.call("trained", "zero3", per_node, {}, timeout_s=60)
    mics = ranks.call("trained", "mics", per_node, options, timeout_s=60)
    for ours, theirs in zip(mics, zero3, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("load", [False, True], ids=["gathered", "loaded"])
def test_parameters_can_be_gathered_while_hop_2_is_on_its_way(tmp_path: Path, load: bool) -> None:
    """With `world` both go over the replication group: in the same order on every rank."""
    with LocalTestbed(4, 4).launch(MicsProgram, 60) as running:
        for parameters, gradients in running.call("gathers_before_hop2", tmp_path / "a", load, timeout_s=30):
            assert parameters == 0 and gradients < 1e-5
