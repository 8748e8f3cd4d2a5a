"""What others have published: their sources, numbers with conditions, and the claims we hold them to.

Data only. Nothing in here is ever shown as a result of ours.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Source:
    """Where a number or a claim was published; `key` is what tables cite."""

    key: str
    title: str
    kind: str
    description: str


@dataclass(frozen=True)
class Instance:
    """A rented machine; `peak_tflops` is the dense half-precision peak of one GPU."""

    name: str
    gpus: int
    gpu: str
    gpu_memory_gb: int
    peak_tflops: float
    network_gbit_s: int


@dataclass(frozen=True)
class Number:
    """A published number; `flops` says what its TFLOPS count: `model`, `hardware`, `not stated`, or
    None where the number is no FLOPS.

    `model` is 6 operations per parameter and token, plus attention; `hardware` adds the forward
    that activation checkpointing runs again (4/3 of the model's).
    """

    what: str
    conditions: str
    value: str
    flops: str | None
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Claim:
    """A sentence that could be true or false; `needs` is the evidence that would test it."""

    id: str
    sentence: str
    sources: tuple[str, ...]
    published: str
    needs: str


SOURCES = (
    Source(
        "S1",
        "Making DeepSpeed ZeRO run efficiently on more-affordable hardware",
        "Amazon Science blog, 2022",
        "Finds that ZeRO-3 suffers more than ZeRO-2 on EFA and describes the optimisations of stage 3 "
        "that were merged into DeepSpeed in January 2022.",
    ),
    Source(
        "S2",
        "Near-linear scaling of gigantic-model training on AWS",
        "Amazon Science blog on the MiCS paper (VLDB 2023), 2022",
        "Introduces MiCS: partition groups, hierarchical communication and two-hop gradient "
        "synchronisation, measured against DeepSpeed v0.5.6.",
    ),
    Source(
        "D1",
        "Various ZeRO stage 3 optimizations and improvements",
        "DeepSpeed pull request 1453, merged January 2022",
        "The code behind S1, with the conditions of its measurements; its TFLOPS leave the "
        "recomputation out.",
    ),
    Source(
        "D2",
        "Performance degradation with ZeRO stage 3",
        "DeepSpeed issue 1069, May 2021",
        "The problem report that led to S1: stage 2 against stage 3 on one to sixteen p3dn nodes.",
    ),
    Source(
        "B1",
        "MPT Training Benchmarks",
        "MosaicML, llm-foundry, scripts/train/benchmarking",
        "Decoder-only models of up to 70 B under FSDP on A100 and H100: no claim tested here, but a test "
        "of the projection on hardware and software that it was not fitted to.",
    ),
)

INSTANCES = (
    Instance("p3dn.24xlarge", 8, "V100", 32, 125, 100),
    Instance("p4d.24xlarge", 8, "A100", 40, 312, 400),
    Instance("p4de.24xlarge", 8, "A100", 80, 312, 400),
)

_P4D = (
    "64 GPUs (8 p4d), micro-batch 16 per GPU, sequence 512, bf16, every layer's activations "
    "checkpointed, no offload"
)
_P3DN = "batch 8 per GPU, sequence 512"

NUMBERS = (
    Number("RoBERTa-10B, ZeRO-3 before → after", _P4D, "73 → 123 TFLOPS/GPU", "hardware", ("S1",)),
    Number("RoBERTa-10B, ZeRO-3 before → after", _P4D, "54.86 → 92.07 TFLOPS/GPU", "model", ("D1",)),
    Number("RoBERTa-50B, ZeRO-3 before → after", _P4D, "89 → 154 TFLOPS/GPU", "hardware", ("S1",)),
    Number(
        "RoBERTa-50B, ZeRO-3 before → after",
        _P4D + "; 52 B parameters, vocabulary about 53,000",
        "67.61 → 116.06 TFLOPS/GPU",
        "model",
        ("D1",),
    ),
    Number(
        "RoBERTa-50B, ZeRO-3 after",
        "256 GPUs (32 p4d), otherwise the same; the number before is not given",
        "108 TFLOPS/GPU",
        "model",
        ("D1",),
    ),
    Number("optimised ZeRO-3 against ZeRO-2", _P4D, "roughly at parity", None, ("D1",)),
    Number(
        "loss of ZeRO-3 against that of ZeRO-2, going from InfiniBand to EFA", "p4d", "twice", None, ("S1",)
    ),
    Number("RoBERTa-10B, ZeRO-2", f"16 p3dn, {_P3DN}", "178 samples/s, 44.7 TFLOPS/GPU", "model", ("D2",)),
    Number("RoBERTa-10B, ZeRO-3", f"16 p3dn, {_P3DN}", "77 samples/s, 19.5 TFLOPS/GPU", "model", ("D2",)),
    Number("RoBERTa-10B, ZeRO-3", f"8 p3dn, {_P3DN}", "41 samples/s, 21.9 TFLOPS/GPU", "model", ("D2",)),
    Number("RoBERTa-10B, ZeRO-3", f"4 p3dn, {_P3DN}", "23 samples/s, 23.5 TFLOPS/GPU", "model", ("D2",)),
    Number("RoBERTa-10B, ZeRO-3", f"2 p3dn, {_P3DN}", "11.6 samples/s, 23.5 TFLOPS/GPU", "model", ("D2",)),
    Number("RoBERTa-10B, ZeRO-3", f"1 p3dn, {_P3DN}", "out of memory", None, ("D2",)),
    Number(
        "MiCS against ZeRO-2 and ZeRO-3 of DeepSpeed v0.5.6",
        "BERT of several sizes on p3dn",
        "up to 2.82 × the throughput, near-linear scaling",
        None,
        ("S2",),
    ),
    Number(
        "MiCS, 175 B parameters",
        "16 p4de (128 GPUs), sequence 2048; micro-batch not stated",
        "169 TFLOPS/GPU, 54.2% of peak",
        "not stated",
        ("S2",),
    ),
    Number(
        "MiCS, 100 B parameters",
        "64 p4d (512 GPUs); micro-batch and sequence not stated",
        "over 170 TFLOPS/GPU, 54.5% of peak",
        "not stated",
        ("S2",),
    ),
    Number("weak scaling of MiCS, 100 B", "p4d, 128 → 512 GPUs", "99.4%", None, ("S2",)),
    Number(
        "weak scaling of DeepSpeed ZeRO-3, 100 B",
        "p4d, 128 → 512 GPUs",
        "72%; at most 62 TFLOPS/GPU, 19.9% of peak",
        "not stated",
        ("S2",),
    ),
    Number(
        "MPT-7B to 70B, FSDP",
        "2 to 16 nodes of 8 A100 or H100; full sharding, fused attention, bf16, sequence 2048",
        "112 to 166 (A100) and 358 to 434 (H100) TFLOPS/GPU",
        "model",
        ("B1",),
    ),
    Number(
        "inter-node volume factor of one gather",
        "p participants, k per node, hierarchical instead of flat",
        "(p−1)/p → (p−k)/p; 2 nodes × 2 GPUs: 3/4 → 1/2",
        None,
        ("S2",),
    ),
    Number(
        "latency of one gather",
        "ring; p participants, k per node",
        "p / (p/k + k) times lower",
        None,
        ("S2",),
    ),
)

_CLUSTER = "throughput and traffic on the emulated cluster (slow network between nodes)"
_ABLATION = "the engine's ablation: the same training with and without this one option"
_PROJECTION = "the projection to paper scale"

CLAIMS = (
    Claim(
        "Z1",
        "On a slower network ZeRO-3 loses about twice as much as ZeRO-2.",
        ("S1",),
        "twice the relative drop, from InfiniBand to EFA on p4d",
        f"{_CLUSTER} at two bandwidths",
    ),
    Claim(
        "Z2",
        "Finer-grained synchronisation overlaps communication and computation much better.",
        ("S1",),
        "no number",
        _ABLATION,
    ),
    Claim(
        "Z3",
        "With fetch decisions computed once and cached, the time for deciding no longer matters.",
        ("S1",),
        "no number",
        _ABLATION,
    ),
    Claim("Z4", "Batched collectives use the bandwidth better.", ("S1",), "no number", _ABLATION),
    Claim(
        "Z5",
        "Collectives on tensors that are flat already save a buffer and its copies.",
        ("S1",),
        "no number",
        _ABLATION,
    ),
    Claim(
        "Z6",
        "One contiguous buffer for what persists, made at initialisation, prevents fragmentation and "
        "allocator flushes.",
        ("S1",),
        "no number",
        f"{_ABLATION}, on an accelerator with a caching allocator",
    ),
    Claim(
        "Z7",
        "A gradient norm in one kernel, without host synchronisation, is faster.",
        ("S1",),
        "no number",
        _ABLATION,
    ),
    Claim(
        "Z8",
        "All optimisations together make ZeRO-3 1.68 × (10 B) and 1.73 × (50 B) as fast.",
        ("S1", "D1"),
        "73 → 123 and 89 → 154 TFLOPS/GPU (hardware) on 64 A100",
        f"the engine with all options on and off, on the emulated cluster and in {_PROJECTION}",
    ),
    Claim(
        "Z9",
        "Group-batched collectives could do without any flattening (announced as future work).",
        ("S1",),
        "no number",
        f"{_ABLATION}, on a backend with grouped collectives",
    ),
    Claim(
        "M1",
        "With partition groups the cost of the frequent communication stays fixed while the cluster grows.",
        ("S2",),
        "no number",
        f"{_CLUSTER} at several sizes with one partition size",
    ),
    Claim(
        "M2",
        "Hierarchical communication cuts the volume between nodes from (p−1)/p to (p−k)/p.",
        ("S2",),
        "3/4 → 1/2 for 2 nodes × 2 GPUs",
        f"{_CLUSTER}, hierarchical against flat, with the network's own byte counters",
    ),
    Claim(
        "M3",
        "Two-hop gradient synchronisation amortises the global synchronisation over the micro-steps.",
        ("S2",),
        "no number",
        f"{_CLUSTER} at several numbers of micro-steps",
    ),
    Claim(
        "M4",
        "MiCS reaches up to 2.82 × the throughput of ZeRO-2/3 on nodes with 100 Gbit/s.",
        ("S2",),
        "up to 2.82 × DeepSpeed v0.5.6, BERT on p3dn",
        f"{_CLUSTER}, and {_PROJECTION}",
    ),
    Claim(
        "M5",
        "MiCS scales weakly at 99.4% from 128 to 512 GPUs, ZeRO-3 at 72%.",
        ("S2",),
        "99.4% against 72%, 100 B on p4d",
        f"{_PROJECTION}, and weak scaling on the emulated cluster",
    ),
    Claim(
        "M6",
        "MiCS keeps over 54% of peak per GPU with 100 B on 512 GPUs and with 175 B on 128.",
        ("S2",),
        "over 170 TFLOPS/GPU (54.5%) and 169 TFLOPS/GPU (54.2%)",
        _PROJECTION,
    ),
    Claim(
        "M7",
        "MiCS beats the optimised ZeRO-3 already at the smaller GPU counts.",
        ("S2",),
        "no number (a figure)",
        f"{_CLUSTER} with MiCS and the optimised ZeRO-3 side by side",
    ),
    Claim(
        "M8",
        "Same convergence: loss curves coincide with those of ZeRO-3 and of plain data parallelism, "
        "because no arithmetic is changed.",
        ("S2", "S1"),
        "no number",
        "fp32 runs of ddp, a ZeRO-3-like and a MiCS-like implementation on the same training",
    ),
)
