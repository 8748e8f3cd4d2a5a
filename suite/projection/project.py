"""From a configuration to its projected step: hardware, program, execution, memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from suite.config import ClusterConfig, Config
from suite.errors import UsageError
from suite.projection.assumptions import Assumptions, default_assumptions
from suite.projection.compute import HALF, Kernels, compute_costs, kernels_of, optimizer_s
from suite.projection.hardware import Hardware, hardware_of
from suite.projection.layout import layout_of
from suite.projection.memory import Memory, States, memory_of
from suite.projection.methods import (
    AUTO,
    DEEPSPEED_BUCKET,
    Method,
    Options,
    find_method,
    parse_options,
    with_switches,
)
from suite.projection.network import Wire, cost_on, make_groups
from suite.projection.schedules import Job, Replicated, Sharded, build_programs
from suite.projection.simulate import Machine, Span, run_step
from suite.workloads.flops import hardware_flops, model_flops


@dataclass(frozen=True)
class Projection:
    """One projected step. Seconds and bytes are per step and rank, unless named otherwise."""

    config: Config
    world_size: int
    partition_size: int | None
    hierarchical: bool
    n_params: int
    step_s: float
    compute_s: float
    communication_s: dict[str, float]
    """How long each wire was busy."""
    exposed_s: float
    """How long the compute waited, for communication or for the host."""
    sent_bytes: float
    node_bytes: float
    """Bytes that leave each node."""
    calls: int
    memory: Memory
    model_tflops_per_gpu: float
    hardware_tflops_per_gpu: float
    samples_per_s: float
    share_of_peak: float
    """Hardware FLOPs against the data sheet."""
    spans: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Case:
    """A configuration and what follows from it before a partition size is chosen."""

    config: Config
    method: Method
    options: Options
    hardware: Hardware
    kernels: Kernels
    given: Assumptions


def project(config: Config, assumptions: Assumptions | None = None, timeline: bool = False) -> Projection:
    """What the configuration would do on its cluster. Raises UsageError for what cannot be."""
    case = case_of(config, assumptions)
    partition = partition_of(case)
    hierarchical = _hierarchical(case, partition)
    machine = _execute(
        with_switches(case.method.schedule, case.options),
        _job(case, partition, hierarchical),
        config.train.micro_steps,
        case.hardware,
        case.given.value("overlap_slowdown"),
        timeline,
    )
    return _result(case, partition, hierarchical, machine)


@lru_cache(maxsize=64)
def _execute(
    schedule: Sharded | Replicated,
    job: Job,
    micro_steps: int,
    hardware: Hardware,
    slowdown: float,
    timeline: bool,
) -> Machine:
    """Kept, because most assumptions do not touch most runs: what moves one need not repeat the others."""
    return run_step(build_programs(schedule, job), micro_steps, cost_on(hardware), slowdown, timeline)


def memory_for(config: Config, assumptions: Assumptions | None = None) -> Memory:
    """What the configuration needs on each rank, without executing anything. Raises UsageError."""
    case = case_of(config, assumptions)
    return _memory(case, partition_of(case))


def case_of(config: Config, assumptions: Assumptions | None = None) -> Case:
    """Raises UsageError for a configuration without a cluster, or one that its method cannot have."""
    given = assumptions or default_assumptions()
    method, options = find_method(config.impl.name), parse_options(config)
    hardware = hardware_of(_require_cluster(config), given, config.train.precision)
    kernels = kernels_of(config.train.precision, hardware, given, options.fused_attention)
    return Case(config, method, options, hardware, kernels, given)


def _require_cluster(config: Config) -> ClusterConfig:
    if config.cluster is None:
        raise UsageError("a projection needs a cluster, such as cluster=p4d cluster.nodes=16")
    return config.cluster


def _job(case: Case, partition: int, hierarchical: bool) -> Job:
    """What the method has to do with partition groups of that size."""
    config, hardware, given = case.config, case.hardware, case.given
    model, layout = config.workload.model, layout_of(config.workload.model)
    return Job(
        layout=layout,
        costs=compute_costs(model, config.train.micro_batch, hardware, case.kernels, given),
        groups=make_groups(hardware.world_size, hardware.ranks_per_node, partition),
        checkpointing=config.train.activation_checkpointing,
        element_bytes=case.kernels.element_bytes,
        optimizer_s=optimizer_s(layout.total / _optimizer_ranks(case, partition), hardware, given),
        hierarchical=hierarchical,
        two_hop=case.options.two_hop,
        world_optimizer=case.options.optimizer_sharding == "world",
        decision_s=given.value("decision_us") * 1e-6,
        copy_s_per_byte=given.value("flatten_passes") / hardware.memory_bytes_s,
        stall_s_per_byte=given.value("stall_ms_per_gb") * 1e-12 * hardware.world_size,
    )


def partition_of(case: Case) -> int:
    """The partition size that is asked for or, when it is left open, the smallest that fits memory."""
    asked = case.options.partition_size
    if not case.method.groups:
        return case.hardware.world_size
    if asked not in (None, AUTO):
        return _checked_partition(str(asked), case.hardware)
    sizes = partition_sizes(case.hardware)
    return next((size for size in sizes if _memory(case, size).fits), sizes[-1])


def partition_sizes(hardware: Hardware) -> list[int]:
    """Sizes whose groups divide a node or fill several, in ascending order."""
    k = hardware.ranks_per_node
    inside = [size for size in range(1, k + 1) if k % size == 0]
    across = [k * nodes for nodes in range(2, hardware.nodes + 1) if hardware.nodes % nodes == 0]
    return inside + across


def takes_partition(config: Config) -> bool:
    """Whether the partition size that is asked for, if one is, fits the cluster's nodes."""
    case = case_of(config)
    asked = case.options.partition_size
    if not case.method.groups or asked in (None, AUTO):
        return True
    return asked in map(str, partition_sizes(case.hardware))


def _checked_partition(text: str, hardware: Hardware) -> int:
    sizes = partition_sizes(hardware)
    if not text.isdigit() or int(text) not in sizes:
        raise UsageError(
            f"impl.options.partition_size={text} does not fit {hardware.nodes} nodes of "
            f"{hardware.ranks_per_node}; use one of {', '.join(map(str, sizes))}"
        )
    return int(text)


def _hierarchical(case: Case, partition: int) -> bool:
    asked = case.options.hierarchical
    wanted = case.method.hierarchical if asked is None else asked
    return wanted and partition > case.hardware.ranks_per_node > 1


def _optimizer_ranks(case: Case, partition: int) -> int:
    if not case.method.shards_optimizer:
        return 1
    return case.hardware.world_size if case.options.optimizer_sharding == "world" else partition


def _memory(case: Case, partition: int) -> Memory:
    config, method = case.config, case.method
    model, layout, size = config.workload.model, layout_of(config.workload.model), case.kernels.element_bytes
    bucket = case.options.reduce_bucket_size or DEEPSPEED_BUCKET
    whole = sum(layout.root) + method.live_blocks * sum(layout.block)
    states = States(
        weights=partition if isinstance(method.schedule, Sharded) else 1,
        gradients=partition if method.shards_gradients else 1,
        optimizer=_optimizer_ranks(case, partition),
        gradient_bytes=max(method.gradient_bytes, size),
        buffers=size * (whole + method.set_aside * bucket / DEEPSPEED_BUCKET),
        half=size == HALF and method.keeps_half,
    )
    return memory_of(
        model,
        layout,
        states,
        config.train.micro_batch,
        config.train.activation_checkpointing,
        case.kernels,
        case.hardware,
        case.given,
    )


def _result(case: Case, partition: int, hierarchical: bool, machine: Machine) -> Projection:
    config, hardware = case.config, case.hardware
    train, model = config.train, config.workload.model
    samples = train.micro_batch * train.micro_steps
    step = machine.compute_s
    executed = hardware_flops(model, samples, train.activation_checkpointing) / step
    return Projection(
        config=config,
        world_size=hardware.world_size,
        partition_size=partition if case.method.shards_optimizer else None,
        hierarchical=hierarchical,
        n_params=layout_of(model).total,
        step_s=step,
        compute_s=machine.busy_s,
        communication_s={wire.value: machine.communication_s[wire] for wire in Wire},
        exposed_s=step - machine.busy_s,
        sent_bytes=machine.sent_bytes,
        node_bytes=machine.node_bytes,
        calls=machine.calls,
        memory=_memory(case, partition),
        model_tflops_per_gpu=model_flops(model, samples) / step / 1e12,
        hardware_tflops_per_gpu=executed / 1e12,
        samples_per_s=samples * hardware.world_size / step,
        share_of_peak=executed / hardware.peak_flops_s,
        spans=tuple(machine.spans or ()),
    )


def with_nodes(config: Config, nodes: int) -> Config:
    """The same configuration on a cluster of so many nodes."""
    return replace(config, cluster=replace(_require_cluster(config), nodes=nodes))
