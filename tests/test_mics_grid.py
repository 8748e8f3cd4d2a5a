"""Every shape of MiCS and every switch together, against the single-process reference."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
from test_implementations import configuration, describe

from suite.config import Config
from suite.harness.check import References, check_all
from suite.impls.sharded.topology import PartitionTopology

PER_START = 48
"""Checks that one set of ranks makes: each leaves process groups behind."""


@pytest.fixture(scope="module")
def references() -> Iterator[References]:
    with References() as shared:
        yield shared


def combinations(world: int, partition: int, per_node: int) -> Iterator[list[str]]:
    """Option words; switches that change nothing in that shape are left as they are."""
    topology = PartitionTopology(world, per_node, partition)
    replicated = topology.replicas > 1
    for hierarchical, two_hop, sharding, micro_steps, precision in product(
        ["true", "false"] if topology.hierarchical else ["true"],
        ["true", "false"] if replicated else ["true"],
        ["partition", "world"] if replicated else ["partition"],
        [1, 4],
        ["fp32", "bf16"],
    ):
        yield [
            f"testbed.ranks={world}",
            f"testbed.ranks_per_node={per_node}",
            f"impl.options.partition_size={partition}",
            f"impl.options.hierarchical={hierarchical}",
            f"impl.options.two_hop={two_hop}",
            f"impl.options.optimizer_sharding={sharding}",
            f"train.micro_steps={micro_steps}",
            f"train.precision={precision}",
            "train.clip=0.5",
            "train.micro_batch=1",
        ]


def grid(world: int) -> list[Config]:
    return [
        configuration("mics", *words)
        for partition in sorted({1, 2, 3, 4, world})
        for per_node in (1, 2, 4)
        if world % partition == 0 and world % per_node == 0
        for words in combinations(world, partition, per_node)
    ]


GRIDS = {
    f"{world}-ranks-part-{first // PER_START + 1}": (world, first)
    for world in (4, 6, 8)
    for first in range(0, len(grid(world)), PER_START)
}


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", GRIDS)
def test_every_shape_and_switch_of_mics_is_the_reference_s(references: References, part: str) -> None:
    world, first = GRIDS[part]
    configs = grid(world)[first : first + PER_START]
    wrong = [describe(found) for found in check_all(configs, references) if not found.ok]
    assert not wrong, f"{len(wrong)} of {len(configs)}: {wrong}"
