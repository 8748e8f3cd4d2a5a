"""A scale model of a real training: how slow to make the links, and how long a block shall compute.

Pure arithmetic. What is kept is the ratio of communication to computation of one transformer block:
with s = bytes of an emulated block / bytes of a real one, and the time dilation d,

    emulated link = real link * s / d          emulated block time = real block time * d

so that moving a block takes d times what it takes on the real cluster, and so does computing it.
Dividing a measured time by d gives the time on the real cluster, for as many blocks as were run.

Assumptions, all of them:

1. A block takes (its matrix FLOPs) / (the GPU's peak half-precision rate * `cluster.kernel_efficiency`):
   forward once, backward twice, recomputation once more. Nothing else of the GPU is modelled: what
   this host really computes meanwhile (the small blocks, the framework's own work, copies) is part of
   the blocks' time, and what comes after the last of them (the optimizer) counts divided by d.
2. The real training moves 2 bytes per parameter (half precision). The emulated one moves those of
   `train.precision`, for fewer parameters: what counts is bytes over bandwidth.
3. A node's link is what all its GPUs share, and a block is moved to a node once: that is what
   collectives that know the topology do. With fewer ranks per node than the real cluster has GPUs,
   methods that send each rank its own copy look better here than there.
4. Inside a node messages go over this host's loopback interface, much faster than the emulated link.
5. Latency is not emulated: a message takes this host's own, divided by d.
6. Memory is not modelled: what does not fit into a real GPU may fit here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from suite.config import ClusterConfig, ModelConfig, TrainConfig
from suite.workloads import flops
from suite.workloads.models import block_params

REAL_BYTES_PER_PARAMETER = 2
BYTES_PER_PARAMETER = {"fp32": 4, "bf16": 2, "fp16": 2}

# The automatic dilation keeps the cores of this host busy for a share of the time only. A block is
# moved three times per micro-step (two gathers, one reduction) to each rank, by one core at about this
# many bytes per second, through both ends' TCP and the compute of the small model included.
BYTES_PER_CORE_S = 250e6
BLOCK_MOVES = 3
BUSY_SHARE = 0.4


@dataclass(frozen=True)
class Host:
    """What carries the emulation: `cores` cores, and on them `ranks` processes in `nodes` nodes."""

    nodes: int
    ranks: int
    cores: int


@dataclass(frozen=True)
class BlockTimes:
    """Host seconds per block and micro-step; a recomputation takes `forward_s` again."""

    forward_s: float
    backward_s: float


@dataclass(frozen=True)
class ScaleModel:
    """`size`: emulated over real bytes of a block. `dilation`: host seconds per second of the real
    cluster. `link_bits_per_s`: of an emulated node, per direction. `model_flops` and `hardware_flops`
    (with recomputation): of one real GPU per step, for the blocks that are run."""

    size: float
    dilation: float
    link_bits_per_s: float
    block: BlockTimes
    model_flops: float
    hardware_flops: float

    def details(self) -> dict[str, float]:
        """Of the record, units in the names."""
        return {
            "dilation": self.dilation,
            "emulated_link_mbit_per_s": self.link_bits_per_s / 1e6,
            "emulated_bytes_per_real_byte": self.size,
            "block_forward_s": self.block.forward_s / self.dilation,
        }


def scale_model(
    model: ModelConfig,
    real: ModelConfig,
    cluster: ClusterConfig,
    train: TrainConfig,
    host: Host,
    dilation: float | None = None,
) -> ScaleModel:
    """Blocks of `model` standing for those of `real`, of which a GPU sees `train.micro_batch` sequences
    per micro-step. Without a dilation one is chosen for this host."""
    block_bytes = block_params(model) * BYTES_PER_PARAMETER[train.precision]
    size = block_bytes / (block_params(real) * REAL_BYTES_PER_PARAMETER)
    forward_flops = flops.block_forward_flops(real) * train.micro_batch
    forward_s = forward_flops / (cluster.peak_tflops * 1e12 * cluster.kernel_efficiency)
    link = cluster.inter_node_gbit_s * 1e9 * size
    if dilation is None:
        moving_s = BLOCK_MOVES * block_bytes * 8 / link if host.nodes > 1 else 0.0
        dilation = _dilation(block_bytes, max(3 * forward_s, moving_s), host)
    blocks = model.layers * train.micro_steps
    recomputed = 1 if train.activation_checkpointing else 0
    return ScaleModel(
        size=size,
        dilation=dilation,
        link_bits_per_s=link / dilation,
        block=BlockTimes(forward_s * dilation, 2 * forward_s * dilation),
        model_flops=3 * forward_flops * blocks,
        hardware_flops=(3 + recomputed) * forward_flops * blocks,
    )


def _dilation(block_bytes: float, block_s: float, host: Host) -> float:
    """The smallest whole one at which this host has time for what the emulation really does per block
    and micro-step, which lasts `block_s` undilated."""
    work_s = host.ranks * block_bytes * BLOCK_MOVES / BYTES_PER_CORE_S
    return float(max(1, math.ceil(work_s / (host.cores * BUSY_SHARE * block_s))))
