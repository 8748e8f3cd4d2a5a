"""Ranks that do not make the same collectives: the first difference is reported, not waited for."""

from __future__ import annotations

import time

import pytest
import torch
from engine_scenarios import Program as Scenarios
from engine_scenarios import Stack, batch_of, groups, one_forward
from torch import Tensor, nn

from suite.errors import RankError
from suite.impls.sharded import shard
from suite.impls.sharded.ledger import SharedLedger
from suite.impls.sharded.options import EngineOptions
from suite.testbeds.local import LocalTestbed
from suite.testbeds.testbed import RankContext

CHECKED = EngineOptions(fingerprint=True, fingerprint_timeout_s=3, coalesce_mb=0)


class OtherOrder(Stack):
    def body(self, x: Tensor) -> Tensor:
        for index in (1, 0, 2):
            x = self.blocks[index](x)
        return x


class OneLess(Stack):
    def body(self, x: Tensor) -> Tensor:
        for block in self.blocks[:2]:
            x = block(x)
        return x


class Wider(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].spare = nn.Parameter(torch.ones(1000))


class Program:
    """Rank 2 is different."""

    def __init__(self, context: RankContext) -> None:
        self._odd = context.rank == 2
        self._rank = context.rank

    def train(
        self, odd: type[Stack], options: EngineOptions, partition_size: int, odd_micro_steps: int = 2
    ) -> None:
        torch.manual_seed(7)
        model = odd() if self._odd else Stack()
        optimizer = torch.optim.AdamW(groups(model))
        engine = shard(model, optimizer, partition_size=partition_size, ranks_per_node=2, options=options)
        for step in range(2):
            for micro_step in range(odd_micro_steps if self._odd and step else 2):
                engine.backward(one_forward(model, batch_of(self._rank, step, micro_step)))
            engine.step()


def report_of(*arguments: object) -> str:
    with pytest.raises(RankError) as caught, LocalTestbed(4, 2).launch(Program, 60) as ranks:
        ranks.call("train", *arguments, timeout_s=30)
    return str(caught.value)


@pytest.mark.parametrize("partition_size", [4, 2], ids=["zero3", "mics"])
@pytest.mark.parametrize(
    ("odd", "difference"),
    [
        (OtherOrder, "rank 2: gather of blocks.1, {} bytes; ranks 0, 1, 3: gather of blocks.0, {} bytes"),
        (OneLess, "rank 2: {}; ranks 0, 1, 3: gather of blocks.2, {} bytes"),
        (Wider, "rank 2: gather of blocks.1, {} bytes; ranks 0, 1, 3: gather of blocks.1, {} bytes"),
    ],
)
def test_the_first_difference_names_ranks_unit_op_and_bytes(
    odd: type[Stack], difference: str, partition_size: int
) -> None:
    report = report_of(odd, CHECKED, partition_size)
    assert "DesyncError: the ranks differ at collective" in report
    said = report.partition("of the training: ")[2]
    for part in difference.split("{}"):
        _, found, said = said.partition(part)
        assert found, report


def test_a_rank_with_fewer_micro_steps_is_told_by_what_it_does_instead() -> None:
    report = report_of(Stack, CHECKED, 4, 1)
    assert "rank 2: all-reduce of the gradient norm" in report and "ranks 0, 1, 3: gather of" in report


def test_a_rank_that_does_not_come_is_named_with_what_the_others_wait_for() -> None:
    class Stops(Program):
        def train(self, *arguments: object) -> None:  # type: ignore[override]
            if self._odd:
                stop_after(8)
            super().train(*arguments)  # type: ignore[arg-type]

    with pytest.raises(RankError, match="rank 2 did not come to collective") as caught:
        with LocalTestbed(4, 2).launch(Stops, 60) as ranks:
            ranks.call("train", Stack, CHECKED, 4, timeout_s=30)
    assert "within 3 s; the last one made there was" in str(caught.value)


def stop_after(calls: int) -> None:
    """From then on this rank does something else than its next collective."""
    enter, count = SharedLedger.enter, [0]

    def late(self: SharedLedger, lane: str, op: str, unit: str, nbytes: int) -> None:
        count[0] += 1
        if count[0] > calls:
            time.sleep(60)
        enter(self, lane, op, unit, nbytes)

    SharedLedger.enter = late  # type: ignore[method-assign]


@pytest.mark.parametrize("sharding", ["partition", "world"])
def test_ranks_that_agree_train_as_without_it(sharding: str) -> None:
    options = EngineOptions(fingerprint=True, optimizer_sharding=sharding)
    with LocalTestbed(4, 2).launch(Scenarios, 60) as ranks:
        for difference in ranks.call("difference", "tied", "adamw", options, 2, None, 2, 2, timeout_s=60):
            assert difference < 2e-5
