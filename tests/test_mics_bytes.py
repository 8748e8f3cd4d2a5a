"""Bytes between nodes, counted on the connections, against what the topology says."""

from __future__ import annotations

import pytest

from suite.config_load import load
from suite.harness.measure import measure
from suite.records import Record

SHAPES = {
    "one node per group, two micro-steps": "ranks=8 ranks_per_node=2 partition_size=2 micro_steps=2",
    "two nodes per group": "ranks=8 ranks_per_node=2 partition_size=4",
    "two nodes per group, flat": "ranks=8 ranks_per_node=2 partition_size=4 hierarchical=false",
    "the world": "ranks=8 ranks_per_node=4 partition_size=8",
    "the world, flat": "ranks=8 ranks_per_node=4 partition_size=8 hierarchical=false",
    "several groups on a node": "ranks=8 ranks_per_node=4 partition_size=2",
    "groups across parts of nodes": "ranks=6 ranks_per_node=2 partition_size=3",
    "optimizer sharded over the world": "ranks=8 ranks_per_node=2 partition_size=2 optimizer_sharding=world",
    "one hop at every micro-step": "ranks=4 ranks_per_node=2 partition_size=2 two_hop=false micro_steps=2",
}
KEYS = {"ranks": "testbed", "ranks_per_node": "testbed", "micro_steps": "train"}


def run(words: str) -> Record:
    options = [f"{KEYS.get(word.split('=')[0], 'impl.options')}.{word}" for word in words.split()]
    config = load(["impl=mics", "train.steps=2", "train.warmup=1", "train.micro_batch=1", *options])
    (record,) = measure([config])
    assert isinstance(record, Record), record
    return record


@pytest.mark.parametrize("shape", SHAPES)
def test_counted_bytes_are_the_predicted_ones(shape: str) -> None:
    record = run(SHAPES[shape])
    assert record.inter_node_bytes_per_node == pytest.approx(
        record.details["expected_inter_node_bytes"], rel=0.01
    )


def test_hop_2_crosses_once_however_many_micro_steps_there_are() -> None:
    """And with a group inside one node nothing else crosses at all."""
    one, four = (run(f"ranks=4 ranks_per_node=2 partition_size=2 micro_steps={n}") for n in (1, 4))
    assert one.inter_node_bytes_per_node is not None
    assert four.inter_node_bytes_per_node == pytest.approx(one.inter_node_bytes_per_node, rel=0.01)
    # 2 (r - 1) / r of each rank's shard, fp32, and two ranks a node: the size of the model.
    assert one.inter_node_bytes_per_node == pytest.approx(4 * one.n_params, rel=0.02)
