"""`torch.compile` of units: the same training, one graph for all blocks of a shape."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from engine_scenarios import Program as EngineProgram
from engine_scenarios import Stack, batch_of, one_forward

from suite.config_load import load
from suite.harness.check import check
from suite.impls.sharded import shard
from suite.impls.sharded.options import EngineOptions
from suite.testbeds.local import LocalTestbed
from suite.testbeds.ranks import LocalRanks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++"),
]
COMPILED = EngineOptions(compile=True, poison=True)


class Program(EngineProgram):
    def graphs(self, blocks: int) -> tuple[int, list[bool]]:
        """How many graphs a step of so many equal blocks needs, and which units are compiled."""
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        model = Stack(blocks)
        engine = shard(model, torch.optim.AdamW(model.parameters()), options=COMPILED)
        engine.backward(one_forward(model, batch_of(self._rank, 0, 0)))
        engine.step()
        engine.close()
        count = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        return count, [unit.compiled for unit in engine.units]


@pytest.fixture(scope="module")
def ranks() -> Iterator[LocalRanks]:
    with LocalTestbed(2, 2).launch(Program, 60) as running:
        yield running


@pytest.mark.parametrize("scenario", ["plain", "tied", "checkpointed", "frozen", "called twice", "no blocks"])
@pytest.mark.parametrize("partition_size", [2, 1])
def test_compiled_units_train_as_plain_torch_does(
    ranks: LocalRanks, scenario: str, partition_size: int
) -> None:
    answers = ranks.call("difference", scenario, "adamw", COMPILED, 2, 0.5, partition_size, timeout_s=500)
    assert max(answers) < 2e-5


def test_blocks_of_one_shape_share_a_graph_and_the_model_around_them_stays_eager(ranks: LocalRanks) -> None:
    for count, compiled in ranks.call("graphs", 12, timeout_s=500):
        assert count == 1
        assert compiled == [False, *[True] * 12]


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_a_compiled_bert_is_the_reference_s(checkpointing: str) -> None:
    words = ["impl=zero3", "impl.options.compile=true", "testbed.ranks=2", "testbed.timeout_s=500"]
    result = check(load([*words, f"train.activation_checkpointing={checkpointing}", "train.micro_steps=2"]))
    assert result.ok, result
