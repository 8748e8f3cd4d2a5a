"""A cluster as the projection computes with it: SI units, and what its parts really reach."""

from __future__ import annotations

from dataclasses import dataclass

from suite.config import ClusterConfig
from suite.projection.assumptions import Assumptions

GIB = 2**30


@dataclass(frozen=True)
class Link:
    """`bytes_s`: what large messages reach, bytes/s per direction. `latency_s`: of one hop."""

    bytes_s: float
    latency_s: float


@dataclass(frozen=True)
class Hardware:
    """`intra` is one rank's connection inside its node, `inter` a whole node's to the others.

    `flops_s` is what large matrix products reach in the precision that is trained in, `peak_flops_s`
    what the data sheet promises for it; `tile` is the edge below which a matrix dimension no longer
    fills the GPU. `launch_s`: from the call of a collective on the host to its first byte. `gpu` names
    the kind of GPU, for assumptions that differ with it.
    """

    name: str
    nodes: int
    ranks_per_node: int
    peak_flops_s: float
    flops_s: float
    tile: float
    memory_bytes: float
    memory_bytes_s: float
    intra: Link
    inter: Link
    launch_s: float
    gpu: str = ""

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node


def hardware_of(cluster: ClusterConfig, assumptions: Assumptions, precision: str = "bf16") -> Hardware:
    """The cluster with the assumed efficiencies applied; `A100-40GB` and `A100-80GB` share theirs."""
    gpu = cluster.gpu.partition("-")[0]
    peak = cluster.peak_tflops * 1e12
    if precision == "fp32":
        peak *= assumptions.value("fp32_share", gpu)
    network_efficiency = assumptions.value("network_efficiency", cluster.network)
    hop_scale = assumptions.value("hop_latency_scale")
    return Hardware(
        name=cluster.name,
        nodes=cluster.nodes,
        ranks_per_node=cluster.gpus_per_node,
        peak_flops_s=peak,
        flops_s=peak * assumptions.value("gemm_efficiency", gpu),
        tile=assumptions.value("gemm_tile"),
        # Data sheets give binary gigabytes: a "32 GB" V100 has 32 GiB.
        memory_bytes=cluster.memory_gb * GIB,
        memory_bytes_s=cluster.memory_gb_s * 1e9 * assumptions.value("memory_efficiency"),
        intra=Link(
            cluster.intra_node_gb_s * 1e9 * assumptions.value("intra_node_efficiency"),
            cluster.intra_node_latency_us * 1e-6 * hop_scale,
        ),
        inter=Link(
            cluster.inter_node_gbit_s * 1e9 / 8 * network_efficiency,
            cluster.inter_node_latency_us * 1e-6 * hop_scale,
        ),
        launch_s=assumptions.value("launch_us") * 1e-6,
        gpu=gpu,
    )
