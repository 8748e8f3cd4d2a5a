"""Runs of others on other hardware, which took no part in calibration: a test of the model's generality.

B1: "MPT Training Benchmarks", the table that MosaicML publishes with its training code (llm-foundry,
`scripts/train/benchmarking`): decoder-only models under FSDP (full sharding), fused attention, bf16,
sequence 2048. From it are taken all runs with more than one node and 7 B parameters or more.
"""

from __future__ import annotations

from suite.projection.published_runs import ELSEWHERE, Number, Run

SHAPES = {"7B": (32, 4096, 32), "13B": (40, 5120, 40), "30B": (48, 7168, 56), "70B": (80, 8192, 64)}
"""Layers, hidden size and heads."""
ROCE = ("cluster.network=roce", "cluster.inter_node_gbit_s=1600", "cluster.inter_node_latency_us=5")
CLUSTERS = {
    "H100": (989.0, ("cluster=h100-ib",), "network: 3200 Gbit/s InfiniBand is ours"),
    "A100-40GB": (312.0, ("cluster=p4d", *ROCE), "latencies are ours"),
    "A100-80GB": (312.0, ("cluster=p4de", *ROCE), "latencies are ours"),
}
"""Peak TFLOPS, options, and what the source does not say."""
MEASURED = (
    ("H100", "70B", 64, 8, 4, True, 42.57),
    ("H100", "70B", 32, 2, 16, True, 36.15),
    ("H100", "30B", 32, 14, 3, True, 43.92),
    ("H100", "30B", 16, 10, 3, True, 43.07),
    ("H100", "13B", 64, 2, 1, False, 39.86),
    ("H100", "13B", 32, 2, 1, False, 39.95),
    ("H100", "13B", 16, 2, 1, False, 39.58),
    ("A100-80GB", "70B", 64, 8, 4, True, 53.33),
    ("A100-80GB", "70B", 32, 2, 16, True, 48.56),
    ("A100-40GB", "70B", 128, 4, 1, True, 48.91),
    ("A100-40GB", "70B", 64, 2, 1, True, 35.87),
    ("A100-40GB", "30B", 128, 6, 1, True, 52.25),
    ("A100-40GB", "30B", 32, 4, 1, True, 51.74),
    ("A100-40GB", "13B", 128, 16, 1, True, 51.93),
    ("A100-40GB", "13B", 64, 16, 1, True, 52.04),
    ("A100-40GB", "13B", 32, 14, 1, True, 52.62),
    ("A100-40GB", "13B", 16, 10, 1, True, 52.50),
    ("A100-40GB", "7B", 128, 18, 1, True, 50.14),
    ("A100-40GB", "7B", 64, 18, 1, True, 50.73),
    ("A100-40GB", "7B", 32, 18, 1, True, 51.55),
    ("A100-40GB", "7B", 16, 16, 1, True, 50.44),
)
"""GPU, model, GPUs, micro-batch, micro-steps, activation checkpointing, model FLOPs in % of peak."""


def _number(
    gpu: str, model: str, gpus: int, batch: int, steps: int, checkpointing: bool, share: float
) -> Number:
    layers, hidden, heads = SHAPES[model]
    peak, cluster, unstated = CLUSTERS[gpu]
    shape = {"layers": layers, "hidden": hidden, "heads": heads, "intermediate": 4 * hidden}
    shape |= {"vocab": 50368, "seq_len": 2048}
    words = (
        "impl=fsdp2",
        "impl.options.fused_attention=true",
        *(f"workload.model.{key}={value}" for key, value in shape.items()),
        *cluster,
        f"cluster.nodes={gpus // 8}",
        f"train.micro_batch={batch}",
        f"train.micro_steps={steps}",
        f"train.activation_checkpointing={str(checkpointing).lower()}",
    )
    name = f"MPT-{model}, FSDP, {gpus} {gpu}"
    return Number(name, "model", (Run(name, words, unstated),), share * peak / 100, "B1", ELSEWHERE)


NUMBERS_ELSEWHERE = tuple(_number(*row) for row in MEASURED)
