"""The scale model keeps the ratio of communication to computation, whatever is scaled and dilated."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from suite.config import ClusterConfig, ModelConfig, TrainConfig
from suite.config_load import load
from suite.errors import UsageError
from suite.workloads import flops
from suite.workloads.models import block_params
from suite.workloads.scale_model import Host, ScaleModel, scale_model

REAL = load(["workload=bert-10b"]).workload.model
SMALL = load(["workload=bert-scale"]).workload.model
P3DN = ClusterConfig()
HOST = Host(nodes=8, ranks=16, cores=2)
TRAIN = TrainConfig(micro_batch=8)


def ratio(model: ModelConfig, scale: ScaleModel, precision: str) -> float:
    """Time to move a block over a node's link, in units of the block's forward, when emulated."""
    block_bits = 8 * block_params(model) * {"fp32": 4, "bf16": 2}[precision]
    return block_bits / scale.link_bits_per_s / scale.block.forward_s


def real_ratio(cluster: ClusterConfig, train: TrainConfig) -> float:
    moving_s = block_params(REAL) * 2 * 8 / (cluster.inter_node_gbit_s * 1e9)
    operations = flops.block_forward_flops(REAL) * train.micro_batch
    return moving_s / (operations / (cluster.peak_tflops * 1e12 * cluster.kernel_efficiency))


@given(
    hidden=st.integers(1, 64).map(lambda n: 8 * n),
    layers=st.integers(1, 12),
    precision=st.sampled_from(["fp32", "bf16"]),
    micro_batch=st.integers(1, 64),
    gbit_s=st.floats(1, 3200),
    dilation=st.one_of(st.none(), st.floats(0.1, 1000)),
)
def test_moving_a_block_takes_the_same_share_of_computing_it_as_on_the_real_cluster(
    hidden: int, layers: int, precision: str, micro_batch: int, gbit_s: float, dilation: float | None
) -> None:
    model = replace(SMALL, hidden=hidden, intermediate=3 * hidden, layers=layers)
    cluster = replace(P3DN, inter_node_gbit_s=gbit_s)
    train = replace(TRAIN, micro_batch=micro_batch, precision=precision)
    scale = scale_model(model, REAL, cluster, train, HOST, dilation)
    assert ratio(model, scale, precision) == pytest.approx(real_ratio(cluster, train))
    assert scale.block.backward_s == pytest.approx(2 * scale.block.forward_s)


def test_dilation_slows_link_and_compute_alike_and_leaves_the_real_work_alone() -> None:
    once, slower = (scale_model(SMALL, REAL, P3DN, TRAIN, HOST, dilation) for dilation in (1.0, 7.0))
    assert slower.link_bits_per_s == pytest.approx(once.link_bits_per_s / 7)
    assert slower.block.forward_s == pytest.approx(once.block.forward_s * 7)
    assert slower.model_flops == once.model_flops
    assert slower.details()["block_forward_s"] == pytest.approx(once.block.forward_s)


def test_bert_10b_on_p3dn_by_hand() -> None:
    """78.7 M parameters and 0.666 TFLOPs per block and micro-batch of 8; V100 at half of 125 TFLOPS."""
    scale = scale_model(SMALL, REAL, P3DN, TRAIN, HOST, 1.0)
    assert scale.block.forward_s == pytest.approx(0.666e12 / 62.5e12, rel=1e-3)
    assert scale.size == pytest.approx(789_760 * 4 / (78_676_480 * 2))
    assert scale.link_bits_per_s == pytest.approx(100e9 * scale.size)
    # Without any communication a GPU would reach exactly the assumed efficiency.
    step_s = SMALL.layers * (scale.block.forward_s + scale.block.backward_s)
    assert scale.model_flops / step_s == pytest.approx(62.5e12)


def test_recomputation_is_hardware_work_but_not_model_work() -> None:
    train = replace(TRAIN, activation_checkpointing=True, micro_steps=4)
    scale = scale_model(SMALL, REAL, P3DN, train, HOST)
    assert scale.hardware_flops == pytest.approx(scale.model_flops * 4 / 3)
    assert scale.model_flops == pytest.approx(4 * scale_model(SMALL, REAL, P3DN, TRAIN, HOST).model_flops)


def test_the_automatic_dilation_grows_with_the_ranks_and_shrinks_with_the_cores() -> None:
    def dilation(nodes: int, ranks: int, cores: int) -> float:
        return scale_model(SMALL, REAL, P3DN, TRAIN, Host(nodes, ranks, cores)).dilation

    assert 1 <= dilation(1, 2, 2) < dilation(4, 8, 2) < dilation(8, 16, 2) < dilation(8, 32, 2)
    assert dilation(8, 16, 16) < dilation(8, 16, 2)
    assert dilation(1, 1, 1000) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["testbed=emulated", "workload=bert-scale"], "testbed=emulated needs a cluster to emulate"),
        (["testbed=emulated", "cluster=p3dn"], "workload=bert-tiny is no scale model of a real one"),
        (["workload=bert-scale", "workload.scale_of=bert-10"], "did you mean 'bert-10b'?"),
        (["testbed.dilation=2"], "testbed.dilation has no meaning for testbed=local"),
        (
            ["testbed=emulated", "cluster=p3dn", "workload=bert-scale", "testbed.dilation=0"],
            "testbed.dilation=0.0 is not possible; it must be above 0",
        ),
        (
            ["testbed=emulated", "cluster=p3dn", "workload=bert-scale", "cluster.kernel_efficiency=50"],
            "cluster.kernel_efficiency=50.0 is not possible",
        ),
    ],
)
def test_what_cannot_be_emulated_is_refused_in_one_line(words: list[str], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(words)
    assert message in str(caught.value) and "\n" not in str(caught.value)
