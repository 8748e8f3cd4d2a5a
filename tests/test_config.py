"""The configuration: presets, short names, and errors that name what is wrong and what is close."""

from __future__ import annotations

import pytest

from suite.config import presets
from suite.config_load import load
from suite.errors import UsageError


def test_short_names_and_keys_below_them_may_be_given_in_any_order() -> None:
    config = load(["workload.model.layers=7", "workload=bert-small", "impl=fsdp2", "train.lr=0.5"])
    assert (config.workload.name, config.workload.model.layers, config.workload.model.hidden) == (
        "bert-small",
        7,
        512,
    )
    assert (config.impl.name, config.train.lr) == ("fsdp2", 0.5)


def test_every_preset_loads() -> None:
    assert len(presets("workloads")) == 17
    for name in presets("workloads"):
        assert load([f"workload={name}"]).workload.name == name


def test_a_cluster_is_there_only_when_it_is_asked_for() -> None:
    assert load([]).cluster is None
    cluster = load(["cluster.nodes=16", "cluster=p4d"]).cluster
    assert cluster is not None
    assert (cluster.name, cluster.nodes, cluster.inter_node_gbit_s) == ("p4d", 16, 400)
    for name in presets("clusters"):
        assert load([f"cluster={name}"]).cluster.name == name  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cluster=p3"], "unknown cluster 'p3'; did you mean 'p3dn'?"),
        (["cluster=p3dn", "cluster.nodez=3"], "unknown key 'cluster.nodez'; did you mean 'cluster.nodes'?"),
        (["train.stepz=3"], "unknown key 'train.stepz'; did you mean 'train.steps'?"),
        (["trian.steps=3"], "unknown key 'trian'; did you mean 'train'?"),
        (["workload=bert-tny"], "unknown workload 'bert-tny'; did you mean 'bert-tiny'?"),
        (["train.steps=many"], "train.steps"),
        (["train.steps=0"], "train.steps=0 is not possible; it must be at least 1"),
        (["train.precision=fp8"], "unknown train.precision 'fp8'"),
        (["train.global_batch=10"], "train.global_batch=10 does not divide by 4 ranks x 1 micro-steps"),
        (["testbed.ranks=5", "testbed.ranks_per_node=2"], "testbed.ranks=5 is not testbed.nodes=2 x"),
        (["workload.model.heads=3"], "workload.model.hidden=128 is not a multiple of"),
        (
            ["testbed=slurm", "testbed.ranks=32", "testbed.ranks_per_node=8", "testbed.max_nodes=2"],
            "testbed.max_nodes=2 is not possible; it must be at least 4",
        ),
        (["cluster=p4d", "cluster.nodes=0"], "cluster.nodes=0 is not possible; it must be at least 1"),
        (["cluster=p4d", "cluster.inter_node_latency_us=-1"], "it must be at least 0"),
        (["steps"], "'steps' is not an option; options are written key=value"),
    ],
)
def test_bad_input_is_one_line_that_says_what_to_do(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], (4, 1, 4)),
        (["testbed.nodes=2", "testbed.ranks_per_node=3"], (6, 2, 3)),
        (["testbed.ranks=8", "testbed.ranks_per_node=4"], (8, 2, 4)),
        (["testbed.ranks=8", "testbed.nodes=4"], (8, 4, 2)),
    ],
)
def test_two_of_ranks_nodes_and_ranks_per_node_say_the_third(
    words: list[str], expected: tuple[int, int, int]
) -> None:
    testbed = load(words).testbed
    assert (testbed.ranks, testbed.nodes, testbed.ranks_per_node) == expected


def test_a_global_batch_is_dealt_out_to_ranks_and_micro_steps() -> None:
    config = load(["train.global_batch=24", "testbed.ranks=3", "train.micro_steps=4"])
    assert (config.train.micro_batch, config.global_batch) == (2, 24)


def test_the_hash_names_the_result_and_nothing_else() -> None:
    base = load([])
    assert base.hash() == load(["wandb.mode=disabled", "out=x", "testbed.timeout_s=7"]).hash()
    assert base.hash() != load(["train.seed=1"]).hash()
