"""The projection held against what the emulated cluster measured, with nothing fitted in between.

Links and paces of a record are given, so what is compared is the schedule, the executor and the
network model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from suite.config_load import load
from suite.errors import UsageError
from suite.impls.sharded.options import EngineOptions
from suite.projection.compute import Costs, Pass
from suite.projection.emulated import EmulatedCluster, project_emulated
from suite.projection.methods import options_of
from suite.projection.simulate import Machine
from suite.records import AnyRecord, Record

LOCAL_BYTES_S = 1e9
"""What one rank reaches over the loopback of its node, in host time: measured at 64 MiB messages."""
MESSAGE_S = 1e-4
"""Host time from a call to its message's arrival."""
NOTHING = Pass(0.0, 0.0)
COMPARED = ("zero3", "mics")
"""Methods whose collectives are what the network model has: rings and two stages. The libraries' own
run on gloo's, whose reduce-scatter moves an all-reduce's bytes."""


@dataclass(frozen=True)
class Comparison:
    """One record of the emulated cluster and the step that is projected for it: seconds and bytes of a
    step, undilated."""

    record: Record
    machine: Machine
    impl: str
    options: str
    nodes: int
    micro_steps: int
    measured_s: float
    projected_s: float
    measured_node_bytes: float
    projected_node_bytes: float

    @property
    def time_error(self) -> float:
        return self.projected_s / self.measured_s - 1

    @property
    def bytes_error(self) -> float:
        """Zero where nothing but a few control messages crosses."""
        if self.projected_node_bytes == 0:
            return 0.0 if self.measured_node_bytes < 1e5 else -1.0
        return self.projected_node_bytes / self.measured_node_bytes - 1


def compare(records: Sequence[AnyRecord]) -> list[Comparison]:
    """The engine's records of the emulated cluster, in their order. Raises UsageError when there are none."""
    rows = [
        _compared(record)
        for record in records
        if isinstance(record, Record) and record.evidence == "emulated" and _is_modelled(record)
    ]
    if not rows:
        raise UsageError("there are no records of zero3 or mics on an emulated cluster; run the sweep first")
    return rows


def _is_modelled(record: Record) -> bool:
    """Whether its method, each of its switches, and groups of that size have a model."""
    if record.impl not in COMPARED:
        return False
    if not {*record.config["impl"]["options"]} <= {"partition_size", *options_of(record.impl)}:
        return False
    size, per_node = record.partition_size or record.world_size, record.ranks_per_node
    return size % per_node == 0 or per_node % size == 0


def _compared(record: Record) -> Comparison:
    config = load(record.config)
    config.impl.options.pop("partition_size", None)
    if record.impl != "zero3":  # what was left to the implementation was decided when it ran
        config.impl.options["partition_size"] = record.partition_size
    options = dict(config.impl.options)
    # Blocks are small there: the engine fetches several ahead.
    config.impl.options.setdefault("prefetch_mb", EngineOptions().prefetch_mb)
    machine = project_emulated(config, emulated_cluster(record))
    return Comparison(
        record=record,
        machine=machine,
        impl=record.impl,
        options=", ".join(f"{key}={value}" for key, value in sorted(options.items())),
        nodes=record.nodes,
        micro_steps=record.micro_steps,
        measured_s=record.step_time_s.median,
        projected_s=machine.compute_s,
        measured_node_bytes=float(record.inter_node_bytes_per_node or 0),
        projected_node_bytes=machine.node_bytes,
    )


def emulated_cluster(record: Record) -> EmulatedCluster:
    """What the scale model made of it, in undilated time. Blocks are paced, and all that the host
    really computes is part of their time."""
    given = record.details
    forward_s, dilation = given["block_forward_s"], given["dilation"]
    return EmulatedCluster(
        nodes=record.nodes,
        ranks_per_node=record.ranks_per_node,
        node_bytes_s=given["emulated_link_mbit_per_s"] * 1e6 / 8 * dilation,
        local_bytes_s=LOCAL_BYTES_S * dilation,
        node_latency_s=MESSAGE_S / dilation,
        local_latency_s=MESSAGE_S / dilation,
        costs=Costs(Pass(forward_s, 2 * forward_s), NOTHING, NOTHING),
        optimizer_s=0.0,
    )
