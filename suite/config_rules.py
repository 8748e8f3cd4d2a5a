"""What follows from a configuration and is filled in, and what cannot be run and is refused."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Any

from suite.config import PRECISIONS, REAL_CLUSTERS, Config, TestbedConfig, presets
from suite.errors import UsageError, unknown
from suite.secrets import names_a_secret

_RATES = ("peak_tflops", "memory_gb", "memory_gb_s", "intra_node_gb_s", "inter_node_gbit_s")
_LEAST = (("nodes", 1), ("gpus_per_node", 1), ("intra_node_latency_us", 0), ("inter_node_latency_us", 0))
"""Of a cluster."""


def resolve(config: Config) -> Config:
    """Fills in what follows from the rest and refuses what cannot be run."""
    _require_finite(config.to_dict())
    _require_cluster_settings(config)
    _resolve_ranks(config.testbed)
    most, nodes = config.testbed.max_nodes, config.testbed.nodes or 1
    if config.testbed.name == "slurm" and most is not None:
        _require(most >= nodes, "testbed.max_nodes", most, f"at least {nodes}")
    train, model = config.train, config.workload.model
    for key in ("micro_batch", "micro_steps", "steps"):
        _require(getattr(train, key) >= 1, f"train.{key}", getattr(train, key), "at least 1")
    _require(train.warmup >= 0, "train.warmup", train.warmup, "at least 0")
    for key in ("timeout_s", "startup_timeout_s"):
        value = getattr(config.testbed, key)
        _require(value > 0, f"testbed.{key}", value, "above 0")
    every, least = train.checkpoint_every, config.testbed.min_ranks
    _require(every is None or every >= 1, "train.checkpoint_every", every, "at least 1")
    _require(least is None or least >= 1, "testbed.min_ranks", least, "at least 1")
    if every is not None and config.testbed.name in REAL_CLUSTERS:
        raise UsageError(
            f"train.checkpoint_every has no meaning for testbed={config.testbed.name}; leave it out"
        )
    if least is not None and every is None:
        raise UsageError(
            f"testbed.min_ranks={least} needs checkpoints to go on from; give train.checkpoint_every"
        )
    _require(train.lr > 0, "train.lr", train.lr, "above 0")
    _require(train.clip is None or train.clip > 0, "train.clip", train.clip, "above 0, or null")
    if train.precision not in PRECISIONS:
        raise unknown("train.precision", train.precision, PRECISIONS)
    if config.wandb.mode not in ("offline", "online", "disabled"):
        raise unknown("wandb.mode", config.wandb.mode, ("offline", "online", "disabled"))
    _require_scale_model(config)
    for key in ("layers", "hidden", "heads", "intermediate", "vocab", "seq_len"):
        _require(getattr(model, key) >= 1, f"workload.model.{key}", getattr(model, key), "at least 1")
    if model.hidden % model.heads:
        raise UsageError(
            f"workload.model.hidden={model.hidden} is not a multiple of "
            f"workload.model.heads={model.heads}; choose one that is"
        )
    if train.global_batch is not None:
        parts = config.world_size * train.micro_steps
        if train.global_batch < 1 or train.global_batch % parts:
            raise UsageError(
                f"train.global_batch={train.global_batch} does not divide by {config.world_size} ranks "
                f"x {train.micro_steps} micro-steps; use a multiple of {parts}"
            )
        train.micro_batch = train.global_batch // parts
    return config


def _require_scale_model(config: Config) -> None:
    """The emulated testbed needs to know what it stands for; no other one may be slowed down."""
    testbed, workload, cluster = config.testbed, config.workload, config.cluster
    _require(
        testbed.dilation is None or testbed.dilation > 0, "testbed.dilation", testbed.dilation, "above 0"
    )
    if workload.scale_of is not None and workload.scale_of not in presets("workloads"):
        raise unknown("workload.scale_of", workload.scale_of, presets("workloads"))
    if testbed.name != "emulated":
        if testbed.dilation is not None:
            raise UsageError(f"testbed.dilation has no meaning for testbed={testbed.name}; leave it out")
        return
    if cluster is None:
        raise UsageError(
            f"testbed=emulated needs a cluster to emulate; give cluster={'|'.join(presets('clusters'))}"
        )
    efficiency = cluster.kernel_efficiency
    _require(0 < efficiency <= 1, "cluster.kernel_efficiency", efficiency, "above 0 and at most 1")
    if workload.scale_of is None:
        raise UsageError(
            f"workload={workload.name} is no scale model of a real one, which testbed=emulated needs; "
            "use workload=bert-scale, or name one with workload.scale_of=bert-10b"
        )


def _require_cluster_settings(config: Config) -> None:
    """What goes into Slurm's job script, and what a cluster's file says of it."""
    testbed, cluster = config.testbed, config.cluster
    for key, pattern, example in (
        ("partition", r"[\w.,-]+", "a name"),
        # Not Slurm's own 1:30:00, which YAML reads as 5400.
        ("time_limit", r"[1-9]\d*[mhd]", "minutes, hours or days, like 90m, 2h or 1d"),
    ):
        value = getattr(testbed, key)
        _require(value is None or re.fullmatch(pattern, value) is not None, f"testbed.{key}", value, example)
    for option in testbed.sbatch:
        ok = re.fullmatch(r"--[a-z][\w-]*(=[\w.,:/@%+=\[\]-]+)?", option) is not None
        _require(ok, "an option in testbed.sbatch", option, "like --name or --name=value")
    for key in _RATES if cluster is not None else ():
        _require(getattr(cluster, key) > 0, f"cluster.{key}", getattr(cluster, key), "above 0")
    for key, least in _LEAST if cluster is not None else ():
        _require(getattr(cluster, key) >= least, f"cluster.{key}", getattr(cluster, key), f"at least {least}")
    for name in cluster.env if cluster is not None else ():
        _require(re.fullmatch(r"[A-Za-z_]\w*", name) is not None, "cluster.env", name, "a variable's name")
        if names_a_secret(name):
            raise UsageError(
                f"cluster.env.{name} looks like a secret, and configurations are recorded; "
                "leave it out and export it where the job runs"
            )
    if testbed.name in REAL_CLUSTERS and testbed.ranks is None and testbed.ranks_per_node is None:
        if testbed.name == "torchrun" and "WORLD_SIZE" in os.environ:
            testbed.ranks = int(os.environ["WORLD_SIZE"])
            testbed.ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", testbed.ranks))
        elif cluster is not None:
            testbed.ranks_per_node = cluster.gpus_per_node


def _resolve_ranks(testbed: TestbedConfig) -> None:
    for key in ("ranks", "nodes", "ranks_per_node"):
        value = getattr(testbed, key)
        _require(value is None or value >= 1, f"testbed.{key}", value, "at least 1")
    if testbed.ranks is None:
        if testbed.nodes is None and testbed.ranks_per_node is None:
            testbed.ranks = 4
        else:
            testbed.ranks = (testbed.nodes or 1) * (testbed.ranks_per_node or 1)
    if testbed.nodes is None:
        testbed.nodes = testbed.ranks // (testbed.ranks_per_node or testbed.ranks) or 1
    if testbed.ranks_per_node is None:
        testbed.ranks_per_node = testbed.ranks // testbed.nodes
    if testbed.nodes * testbed.ranks_per_node != testbed.ranks:
        raise UsageError(
            f"testbed.ranks={testbed.ranks} is not testbed.nodes={testbed.nodes} x "
            f"testbed.ranks_per_node={testbed.ranks_per_node}; give two of the three"
        )


def _require_finite(values: Mapping[str, Any], prefix: str = "") -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _require_finite(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            _require(math.isfinite(value), f"{prefix}{key}", value, "finite")
        elif isinstance(value, int):
            _require(abs(value) < 2**63, f"{prefix}{key}", value, "a number of 64 bits")


def _require(ok: bool, key: str, value: Any, wanted: str) -> None:
    if not ok:
        raise UsageError(f"{key}={value} is not possible; it must be {wanted}")
