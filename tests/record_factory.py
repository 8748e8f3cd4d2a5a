"""Invented records for the tests of the reports. The numbers are plausible and mean nothing."""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import asdict, replace
from typing import Any

from suite.config import TestbedConfig
from suite.records import AnyRecord, CheckRecord, ProjectionRecord, Record, Spread

IMPLS = {
    "floor": 1.0,
    "ddp": 1.22,
    "fsdp2": 1.70,
    "hsdp": 1.66,
    "deepspeed-zero1": 1.31,
    "deepspeed-zero2": 1.36,
    "deepspeed-zero3": 1.95,
    "deepspeed-mics": 2.02,
    "fairscale-sdp": 1.20,
    "fairscale-fsdp": 1.52,
    "zero3": 1.24,
    "zero3-unoptimized": 1.88,
    "mics": 1.19,
}
"""Implementation -> step time over the floor's."""

ENV: dict[str, Any] = {
    "python": "3.11.9",
    "packages": {"torch": "2.13.0", "deepspeed": "0.19.6", "fairscale": "0.4.13"},
    "system": "Linux 6.1 x86_64",
    "cpu": "Example CPU at 2.50GHz",
    "cores": 2,
    "memory_bytes": 8 * 2**30,
    "accelerators": [],
    "commit": "0123abc",
    "modified": False,
}

TOLERANCE = {
    "max_abs_grad_diff": 1e-6,
    "max_rel_grad_diff": 1e-5,
    "max_abs_param_diff": 2e-5,
    "max_replica_diff": 0.0,
    "max_loss_diff": 1e-5,
    "max_rel_grad_norm_diff": 1e-5,
}


def config(
    impl: str,
    workload: str = "bert-tiny",
    precision: str = "fp32",
    micro_steps: int = 1,
    options: dict[str, Any] | None = None,
    ranks_per_node: int = 4,
) -> dict[str, Any]:
    return {
        "impl": {"name": impl, "options": options or {}},
        "workload": {
            "name": workload,
            "model": {
                "family": "bert",
                "layers": 4,
                "hidden": 128,
                "heads": 4,
                "intermediate": 512,
                "vocab": 2048,
                "seq_len": 64,
            },
            "data": "python-docs",
            "scale_of": None,
        },
        "train": {
            "micro_batch": 2,
            "micro_steps": micro_steps,
            "global_batch": None,
            "steps": 10,
            "warmup": 2,
            "precision": precision,
            "lr": 1e-3,
            "weight_decay": 0.01,
            "clip": None,
            "activation_checkpointing": False,
            "seed": 0,
        },
        "testbed": asdict(TestbedConfig(ranks=4, nodes=4 // ranks_per_node, ranks_per_node=ranks_per_node)),
        "cluster": None,
        "wandb": {"mode": "offline", "entity": None, "project": "sharded-data-parallel"},
        "out": None,
    }


def run(
    impl: str = "ddp",
    workload: str = "bert-tiny",
    precision: str = "fp32",
    micro_steps: int = 1,
    options: dict[str, Any] | None = None,
    base_s: float = 0.05,
    **changes: Any,
) -> Record:
    """One run; equal arguments give equal records."""
    noise = random.Random(f"{impl} {workload} {precision} {micro_steps} {options}")
    scale = IMPLS.get(impl, 1.5) * base_s * (0.3 + 0.7 * micro_steps)
    times = [scale * (1 + 0.05 * noise.random() + 0.1 * (noise.random() > 0.9)) for _ in range(10)]
    spread = Spread.of(times)
    losses = [
        (7.7 - 1.9 * (1 - math.exp(-step / 6)) + 0.02 * math.sin(3 * step))
        * (1 + noise.uniform(-1, 1) * 1e-7)
        for step in range(12)
    ]
    samples = 8 * micro_steps
    sharded = impl not in ("ddp", "floor")
    record = Record(
        evidence="measured",
        impl=impl,
        workload=workload,
        testbed="local",
        world_size=4,
        nodes=1,
        ranks_per_node=4,
        partition_size=4 if sharded else None,
        micro_batch=2,
        micro_steps=micro_steps,
        seq_len=64,
        precision=precision,
        n_params=1_100_000 if "tiny" in workload else 30_000_000,
        step_time_s=spread,
        step_times_s=times,
        samples_per_s=samples / spread.median,
        model_tflops_per_gpu=6 * 1.1e6 * 64 * samples / spread.median / 4 / 1e12,
        hardware_tflops_per_gpu=6 * 1.1e6 * 64 * samples / spread.median / 4 / 1e12,
        peak_memory_bytes=int((60 if sharded else 90) * 2**20 * IMPLS.get(impl, 1.0)),
        inter_node_bytes_per_node=0,
        bytes_sent_per_rank=0 if impl == "floor" else int(1.5 * 4 * 1.1e6 * (1.5 if sharded else 1)),
        exposed_comm_s=None,
        losses=losses,
        grad_norms=[1.5 + 0.1 * math.cos(step) for step in range(12)],
        noise={"others": 0.02, "steal": 0.001, "ours": 0.95, "limit": 0.1, "attempts": 1, "noisy": False},
        env=ENV,
        config=config(impl, workload, precision, micro_steps, options),
        config_hash=f"{noise.getrandbits(64):016x}",
        started_at="2026-03-01T10:00:00+00:00",
        cohort=f"2026-03-01T10:00:00+00:00/{workload}",
    )
    return replace(record, **changes)


def cohort(impls: list[str] | None = None, **arguments: Any) -> list[Record]:
    """The same training by several implementations."""
    return [run(impl, **arguments) for impl in impls or IMPLS]


def check(impl: str = "ddp", ok: bool = True, **changes: Any) -> CheckRecord:
    error = 1.0 if ok else 1e4
    record = CheckRecord(
        impl=impl,
        workload="bert-tiny",
        world_size=4,
        micro_steps=1,
        precision="fp32",
        steps=5,
        max_abs_grad_diff=7.5e-8 * error,
        max_rel_grad_diff=4e-7 * error,
        max_abs_param_diff=5e-6 * error,
        max_replica_diff=0.0,
        max_loss_diff=9e-7 * error,
        max_rel_grad_norm_diff=2e-7 * error,
        tolerance=TOLERANCE,
        ok=ok,
        worst={"gradient": "bert.encoder.layer.0.output.dense.weight"},
        env=ENV,
        config=config(impl),
        config_hash=f"check-{impl}",
        started_at="2026-03-01T10:30:00+00:00",
    )
    return replace(record, **changes)


def everything() -> list[AnyRecord]:
    """What a whole sweep leaves behind."""
    return [
        *cohort(),
        *cohort(micro_steps=4),
        *cohort(precision="bf16"),
        *cohort(["floor", "ddp", "fsdp2", "zero3", "mics"], workload="bert-small", base_s=1.1),
        *(check(impl) for impl in IMPLS if impl != "floor"),
    ]


def emulated(
    impl: str = "mics",
    nodes: int = 4,
    step_s: float = 0.2,
    sent: float = 0.0,
    partition_size: int | None = None,
    options: dict[str, Any] | None = None,
    micro_steps: int = 1,
    gbit_s: float = 100.0,
    **changes: Any,
) -> Record:
    """A run on an emulated cluster of two ranks per node; `sent` bytes leave a node per step."""
    settings = config(impl, "bert-scale", "fp32", micro_steps, options, ranks_per_node=2)
    settings["testbed"] |= {"name": "emulated", "ranks": 2 * nodes, "nodes": nodes, "dilation": 10.0}
    settings["workload"]["scale_of"] = "bert-10b"
    settings["cluster"] = {"name": "p3dn", "nodes": 8, "inter_node_gbit_s": gbit_s}
    times = [step_s * factor for factor in (0.999, 1.0, 1.002)]
    record = run(
        impl,
        "bert-scale",
        micro_steps=micro_steps,
        options=options,
        evidence="emulated",
        testbed="emulated",
        world_size=2 * nodes,
        nodes=nodes,
        ranks_per_node=2,
        partition_size=partition_size or (2 if impl == "mics" else 2 * nodes),
        n_params=1_000_000,
        step_times_s=times,
        step_time_s=Spread.of(times),
        model_tflops_per_gpu=10.0 / step_s,
        inter_node_bytes_per_node=int(sent),
        exposed_comm_s=0.1 * step_s,
        config=settings,
        config_hash=hashlib.sha256(f"{nodes} {gbit_s} {settings}".encode()).hexdigest()[:16],
        cohort=f"emulated on {nodes} nodes",
        stage="weak scaling",
    )
    details = {**scale_details(gbit_s, micro_steps), **changes.pop("details", {})}
    return replace(record, details=details, **changes)


def scale_details(gbit_s: float = 100.0, micro_steps: int = 1) -> dict[str, float]:
    """Of a scale model with a dilation of 10: blocks of 0.18 s per micro-step, 25 MB/s at 100 Gbit/s."""
    return {
        "dilation": 10.0,
        "paced_host_s": 1.8 * micro_steps,
        "emulated_link_mbit_per_s": 0.2 * gbit_s,
        "block_forward_s": 0.01,
    }


def network_sweep() -> list[Record]:
    """MiCS that needs little of the network, ZeRO-3 that needs more, on three bandwidths."""
    return [
        emulated(
            impl, 4, 0.19 + seconds * 100 / speed, sent, gbit_s=speed, stage="sweep", cohort=f"at {speed}"
        )
        for speed in (25.0, 100.0, 400.0)
        for impl, seconds, sent in (
            ("floor", 0.0, 0.0),
            ("mics", 0.01, 1e6),
            ("deepspeed-zero2", 0.03, 2e6),
            ("deepspeed-zero3", 0.2, 4e6),
        )
    ]


def two_hops() -> list[Record]:
    """1, 2 and 4 micro-steps; without two hops each pays for its own hop 2."""
    gathers, hop2 = 3e6, 2 * 0.75 * 4e6
    return [
        emulated(
            "mics",
            4,
            0.19 * steps + 0.02 * sums,
            gathers * steps + hop2 * sums,
            options=options,
            micro_steps=steps,
            stage="two hops",
            cohort=f"{steps} micro-steps",
        )
        for steps in (1, 2, 4)
        for options, sums in (({}, 1), ({"two_hop": False}, steps))
    ]


def weak_scaling() -> list[Record]:
    """MiCS that stays as it is and ZeRO-3 that slows down, on 1, 2 and 4 nodes."""
    slow = {1: 0.2, 2: 0.3, 4: 0.4}
    records = []
    for nodes in (1, 2, 4):
        hop2 = 2 * (nodes - 1) / nodes * 4e6
        gathers = 3 * 4e6 * (2 * nodes - 1) / (2 * nodes) if nodes > 1 else 0.0
        records += [
            emulated("floor", nodes, 0.19, exposed_comm_s=0.0),
            emulated("mics", nodes, 0.2 + 0.001 * nodes, hop2, details={"expected_inter_node_bytes": hop2}),
            emulated("zero3", nodes, slow[nodes], gathers, exposed_comm_s=slow[nodes] - 0.19),
            emulated("deepspeed-zero3", nodes, 2 * slow[nodes], 2 * gathers),
        ]
    return records


def mics_ablation(micro_steps: int = 4) -> list[Record]:
    """Partition groups of two nodes: flat collectives send 3/2 of the bytes, without two hops every
    micro-step pays for its own hop 2."""
    hop2, gathers = 2 * 0.5 * 4e6 / 2, 3 * 4e6 * micro_steps * 0.5
    common: dict[str, Any] = {"partition_size": 4, "micro_steps": micro_steps}
    options = {"partition_size": 4}
    variants: list[tuple[float, float, dict[str, Any]]] = [
        (0.30, gathers + hop2, {}),
        (0.40, 1.5 * gathers + hop2, {"hierarchical": False}),
        (0.35, gathers + micro_steps * hop2, {"two_hop": False}),
    ]
    return [
        emulated("mics", 4, step_s, sent, options={**options, **switched}, stage="ablation of MiCS", **common)
        for step_s, sent, switched in variants
    ]


def projection(
    impl: str = "mics", gpus: int = 64, published: dict[str, Any] | None = None, **changes: Any
) -> ProjectionRecord:
    """One projected step, of a published run or of a weak scaling."""
    settings = config(impl, "bert-10b", "bf16")
    speed = 60.0 if impl == "mics" else 60.0 / (1 + gpus / 512)
    record = ProjectionRecord(
        impl=impl,
        workload="bert-10b",
        cluster="p4d",
        world_size=gpus,
        nodes=gpus // 8,
        ranks_per_node=8,
        partition_size=8 if impl == "mics" else gpus,
        hierarchical=False,
        micro_batch=8,
        micro_steps=1,
        seq_len=512,
        precision="bf16",
        activation_checkpointing=True,
        n_params=10_000_000_000,
        step_time_s=300 / speed,
        compute_s=4.0,
        exposed_comm_s=300 / speed - 4.0,
        samples_per_s=8 * gpus / (300 / speed),
        model_tflops_per_gpu=speed,
        hardware_tflops_per_gpu=speed * 4 / 3,
        share_of_peak=speed * 4 / 3 / 312,
        inter_node_bytes_per_node=1e9,
        bytes_sent_per_rank=1e9,
        memory={"total": 30e9, "limit": 40e9},
        fits_memory=gpus > 8,
        assumptions={"network_efficiency": 0.8},
        config=settings,
        config_hash=f"projected-{impl}-{gpus}",
        started_at="2026-03-01T11:00:00+00:00",
        published=published,
    )
    return replace(record, **changes)


def published(what: str, value: float, projected: float, unit: str = "×", **changes: Any) -> ProjectionRecord:
    """A projection that stands for a published number."""
    error = projected - value if unit == "%" else projected / value - 1
    content = {
        "what": what,
        "quantity": "ratio",
        "unit": unit,
        "role": "predicted",
        "source": "S1",
        "published": value,
        "projected": projected,
        "error": error,
        "within": abs(error) <= (3 if unit == "%" else 0.1),
        "unstated": "the micro-batch is ours",
    }
    return projection(published=content, **changes)


def projections() -> list[ProjectionRecord]:
    return [
        *(projection(impl, gpus) for impl in ("mics", "zero3") for gpus in (8, 64, 512, 4096)),
        published("RoBERTa-10B, after against before", 1.68, 1.60),
        published("RoBERTa-50B, after against before", 1.73, 1.50),
    ]


def long_training() -> list[Record]:
    """Loss curves over many steps."""
    steps = [7.7 - 3 * (1 - math.exp(-step / 60)) for step in range(150)]
    return [
        run(
            impl,
            base_s=0.04,
            losses=[loss * (1 + 1e-8 * index) for loss in steps],
            cohort="long",
            stage="long",
        )
        for index, impl in enumerate(("ddp", "zero3", "mics"))
    ]


def stand_in(run: Record, step_s: float, **changes: Any) -> ProjectionRecord:
    """A projection of that run of the emulated cluster."""
    return projection(
        run.impl,
        run.world_size,
        config=run.config,
        config_hash=run.config_hash,
        step_time_s=step_s,
        stands_for={"config_hash": run.config_hash, "cohort": run.cohort, "stage": run.stage},
        **changes,
    )


def full_report() -> list[AnyRecord]:
    """Something for every section of the report."""
    ablation = mics_ablation()
    base = [run("zero3"), *(run("zero3", options={key: False}) for key in ("coalesced", "one_kernel_norm"))]
    return [
        *cohort(["floor", "ddp", "zero3", "mics"]),
        *(replace(item, cohort="ablation") for item in base),
        *long_training(),
        *weak_scaling(),
        *ablation,
        *network_sweep(),
        *two_hops(),
        *(stand_in(item, 0.3) for item in ablation),
        *projections(),
        check("zero3"),
        check("mics", ok=False),
    ]
