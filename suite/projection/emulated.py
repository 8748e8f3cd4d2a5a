"""Projections of an emulated cluster: links that are shaped and compute that is paced, so both are given.

Nothing is assumed here, which makes it the check of schedule, executor and network model: what is
projected must be what the emulated cluster measures.
"""

from __future__ import annotations

from dataclasses import dataclass

from suite.config import Config
from suite.projection.compute import ELEMENT_BYTES, Costs
from suite.projection.hardware import Hardware, Link
from suite.projection.layout import layout_of
from suite.projection.methods import AUTO, find_method, parse_options, with_switches
from suite.projection.network import cost_on, make_groups
from suite.projection.schedules import Job, build_programs
from suite.projection.simulate import Machine, run_step


@dataclass(frozen=True)
class EmulatedCluster:
    """`node_bytes_s`: what a node's shaped link carries per direction; `local_bytes_s`: what one rank
    reaches inside its node. `optimizer_s` and `costs` are the paced times."""

    nodes: int
    ranks_per_node: int
    node_bytes_s: float
    local_bytes_s: float
    node_latency_s: float
    local_latency_s: float
    costs: Costs
    optimizer_s: float


def project_emulated(config: Config, cluster: EmulatedCluster) -> Machine:
    """The step of the configuration's method there: `compute_s` is its duration, `node_bytes` and
    `sent_bytes` what its links carry. Raises UsageError for a method that cannot be projected."""
    method, options = find_method(config.impl.name), parse_options(config)
    world = cluster.nodes * cluster.ranks_per_node
    given = options.partition_size
    partition = world if given in (None, AUTO) or not method.groups else int(str(given))
    job = Job(
        layout=layout_of(config.workload.model),
        costs=cluster.costs,
        groups=make_groups(world, cluster.ranks_per_node, partition),
        checkpointing=config.train.activation_checkpointing,
        element_bytes=ELEMENT_BYTES[config.train.precision],
        optimizer_s=cluster.optimizer_s,
        hierarchical=method.hierarchical if options.hierarchical is None else options.hierarchical,
        two_hop=options.two_hop,
        world_optimizer=options.optimizer_sharding == "world",
    )
    programs = build_programs(with_switches(method.schedule, options), job)
    return run_step(programs, config.train.micro_steps, cost_on(_hardware(cluster)))


def _hardware(cluster: EmulatedCluster) -> Hardware:
    unused = float("inf")
    return Hardware(
        name="emulated",
        nodes=cluster.nodes,
        ranks_per_node=cluster.ranks_per_node,
        peak_flops_s=unused,
        flops_s=unused,
        tile=0.0,
        memory_bytes=unused,
        memory_bytes_s=unused,
        intra=Link(cluster.local_bytes_s, cluster.local_latency_s),
        inter=Link(cluster.node_bytes_s, cluster.node_latency_s),
        launch_s=0.0,
    )
