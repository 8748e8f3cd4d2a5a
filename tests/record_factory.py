"""Invented records for the tests of the reports. The numbers are plausible and mean nothing."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

from suite.records import AnyRecord, CheckRecord, Record, Spread

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
        "testbed": {
            "name": "local",
            "ranks": 4,
            "nodes": 4 // ranks_per_node,
            "ranks_per_node": ranks_per_node,
            "dilation": None,
            "timeout_s": 120.0,
            "startup_timeout_s": 300.0,
        },
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
