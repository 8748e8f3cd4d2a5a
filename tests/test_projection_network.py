"""What collectives cost: the volumes and latencies of the sources, whatever the number of ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from suite.projection.hardware import Hardware, Link
from suite.projection.network import Collective, Group, Kind, Wire, make_groups, stages

PLAIN = Hardware("plain", 2, 2, 1e12, 1e12, 0, 1e9, 1e9, Link(100.0, 0.0), Link(1.0, 0.0), 0.0)


def node_bytes(collective: Collective, hardware: Hardware = PLAIN) -> float:
    return sum(stage.node_bytes for stage in stages(collective, hardware))


@pytest.mark.parametrize(("nodes", "per_node"), [(2, 2), (16, 8), (1000, 8)])
def test_hierarchical_gathers_move_the_published_share_between_nodes(nodes: int, per_node: int) -> None:
    group, p, k = Group(nodes, per_node), nodes * per_node, per_node
    assert node_bytes(Collective(Kind.ALL_GATHER, 1.0, group)) == pytest.approx((p - 1) / p)
    assert node_bytes(Collective(Kind.ALL_GATHER, 1.0, group, True)) == pytest.approx((p - k) / p)
    assert node_bytes(Collective(Kind.REDUCE_SCATTER, 1.0, group, True)) == pytest.approx((p - k) / p)


def test_the_latency_of_a_flat_ring_grows_with_its_ranks_and_a_hierarchical_one_s_with_nodes() -> None:
    hardware = replace(PLAIN, intra=Link(1e30, 1.0), inter=Link(1e30, 1.0))
    flat = stages(Collective(Kind.ALL_GATHER, 1.0, Group(4, 8)), hardware)
    staged = stages(Collective(Kind.ALL_GATHER, 1.0, Group(4, 8), True), hardware)
    assert sum(stage.seconds for stage in flat) == pytest.approx(31)
    assert sum(stage.seconds for stage in staged) == pytest.approx(3 + 7)


def test_the_stages_mirror_each_other() -> None:
    gather = stages(Collective(Kind.ALL_GATHER, 1.0, Group(2, 2), True), PLAIN)
    reduce = stages(Collective(Kind.REDUCE_SCATTER, 1.0, Group(2, 2), True), PLAIN)
    assert [stage.wire for stage in gather] == [Wire.INTER, Wire.INTRA]
    assert [stage.wire for stage in reduce] == [Wire.INTRA, Wire.INTER]


def test_a_small_all_reduce_takes_the_tree_and_a_large_one_moves_twice_a_gather() -> None:
    hardware = replace(PLAIN, intra=Link(1e12, 1e-6), inter=Link(1e9, 1e-5))
    group = Group(1024, 8)
    (small,) = stages(Collective(Kind.ALL_REDUCE, 4.0, group), hardware)
    assert small.seconds < 1e-3 < 1024 * 1e-5
    (large,) = stages(Collective(Kind.ALL_REDUCE, 1e12, Group(2, 8)), hardware)
    assert large.node_bytes == pytest.approx(2e12 * 15 / 16)


def test_groups_that_share_a_node_share_its_link() -> None:
    groups = make_groups(64, 8, 8)
    assert groups.partition == Group(1, 8) and groups.replication == Group(8, 1, 8)
    alone = Collective(Kind.ALL_REDUCE, 1e6, Group(8, 1))
    shared = Collective(Kind.ALL_REDUCE, 1e6, groups.replication)
    assert node_bytes(shared) == pytest.approx(8 * node_bytes(alone))


def test_groups_that_fit_no_node_are_refused() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        make_groups(24, 8, 12)
