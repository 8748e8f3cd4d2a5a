"""From a configuration to its projected step: hardware, program, execution, memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

from suite.config import ClusterConfig, Config
from suite.errors import UsageError
from suite.projection.assumptions import Assumptions, default_assumptions
from suite.projection.compute import HALF, Costs, compute_costs, optimizer_s
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
from suite.projection.schedules import Job, Sharded, build_programs
from suite.projection.simulate import Machine, Programs, Span, run_step
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


def project(config: Config, assumptions: Assumptions | None = None, timeline: bool = False) -> Projection:
    """What the configuration would do on its cluster. Raises UsageError for what cannot be."""
    given = assumptions or default_assumptions()
    cluster = _require_cluster(config)
    method, options = find_method(config.impl.name), parse_options(config)
    hardware = hardware_of(cluster, given)
    partition = partition_of(config, method, options, hardware, given)
    hierarchical = _hierarchical(method, options, partition, hardware)
    costs = compute_costs(config.workload.model, config.train.micro_batch, hardware, given)
    programs = programs_of(config, method, options, partition, hierarchical, hardware, costs, given)
    machine = run_step(
        programs, config.train.micro_steps, cost_on(hardware), given.value("overlap_slowdown"), timeline
    )
    memory = _memory(config, method, options, partition, hardware, given)
    return _result(config, method, partition, hierarchical, hardware, machine, memory)


def memory_for(config: Config, assumptions: Assumptions | None = None) -> Memory:
    """What the configuration needs on each rank, without executing anything. Raises UsageError."""
    given = assumptions or default_assumptions()
    method, options = find_method(config.impl.name), parse_options(config)
    hardware = hardware_of(_require_cluster(config), given)
    partition = partition_of(config, method, options, hardware, given)
    return _memory(config, method, options, partition, hardware, given)


def _require_cluster(config: Config) -> ClusterConfig:
    if config.cluster is None:
        raise UsageError("a projection needs a cluster, such as cluster=p4d cluster.nodes=16")
    if config.train.precision != "bf16":
        raise UsageError(
            f"train.precision={config.train.precision} cannot be projected; "
            "use bf16, the one whose kernels are modelled"
        )
    return config.cluster


def programs_of(
    config: Config,
    method: Method,
    options: Options,
    partition: int,
    hierarchical: bool,
    hardware: Hardware,
    costs: Costs,
    given: Assumptions,
) -> Programs:
    """The method's programs with these costs of computing, whatever they come from."""
    layout = layout_of(config.workload.model)
    job = Job(
        layout=layout,
        costs=costs,
        groups=make_groups(hardware.world_size, hardware.ranks_per_node, partition),
        checkpointing=config.train.activation_checkpointing,
        element_bytes=HALF if config.train.precision == "bf16" else 2 * HALF,
        optimizer_s=optimizer_s(
            layout.total / _optimizer_ranks(method, options, partition, hardware), hardware, given
        ),
        hierarchical=hierarchical,
        two_hop=options.two_hop,
        world_optimizer=options.optimizer_sharding == "world",
        decision_s=given.value("decision_us") * 1e-6,
        copy_s_per_byte=given.value("flatten_passes") / hardware.memory_bytes_s,
        stall_s_per_byte=given.value("stall_ms_per_gb") * 1e-12 * hardware.world_size,
    )
    return build_programs(with_switches(method.schedule, options), job)


def partition_of(
    config: Config, method: Method, options: Options, hardware: Hardware, given: Assumptions
) -> int:
    """The partition size that is asked for or, when it is left open, the smallest that fits memory."""
    if not method.groups:
        return hardware.world_size
    if options.partition_size not in (None, AUTO):
        return _checked_partition(str(options.partition_size), hardware)
    sizes = partition_sizes(hardware)
    for size in sizes:
        if _memory(config, method, options, size, hardware, given).fits:
            return size
    return sizes[-1]


def partition_sizes(hardware: Hardware) -> list[int]:
    """Sizes whose groups divide a node or fill several, in ascending order."""
    k = hardware.ranks_per_node
    inside = [size for size in range(1, k + 1) if k % size == 0]
    across = [k * nodes for nodes in range(2, hardware.nodes + 1) if hardware.nodes % nodes == 0]
    return inside + across


def _checked_partition(text: str, hardware: Hardware) -> int:
    sizes = partition_sizes(hardware)
    if not text.isdigit() or int(text) not in sizes:
        raise UsageError(
            f"impl.options.partition_size={text} does not fit {hardware.nodes} nodes of "
            f"{hardware.ranks_per_node}; use one of {', '.join(map(str, sizes))}"
        )
    return int(text)


def _hierarchical(method: Method, options: Options, partition: int, hardware: Hardware) -> bool:
    spans_nodes = partition > hardware.ranks_per_node
    if options.hierarchical and not (method.hierarchical and spans_nodes):
        raise UsageError(
            "impl.options.hierarchical=true needs a method that has it and a partition group of several nodes"
        )
    return spans_nodes and (method.hierarchical if options.hierarchical is None else options.hierarchical)


def _optimizer_ranks(method: Method, options: Options, partition: int, hardware: Hardware) -> int:
    if not method.shards_optimizer:
        return 1
    return hardware.world_size if options.optimizer_sharding == "world" else partition


def _memory(
    config: Config,
    method: Method,
    options: Options,
    partition: int,
    hardware: Hardware,
    given: Assumptions,
) -> Memory:
    model, layout = config.workload.model, layout_of(config.workload.model)
    sharded = isinstance(method.schedule, Sharded)
    bucket = options.reduce_bucket_size or DEEPSPEED_BUCKET
    whole = sum(layout.root) + method.live_blocks * sum(layout.block)
    states = States(
        weights=partition if sharded else 1,
        gradients=partition if method.shards_gradients else 1,
        optimizer=_optimizer_ranks(method, options, partition, hardware),
        gradient_bytes=method.gradient_bytes,
        buffers=HALF * (whole + method.set_aside * bucket / DEEPSPEED_BUCKET),
    )
    return memory_of(
        model,
        layout,
        states,
        config.train.micro_batch,
        config.train.activation_checkpointing,
        hardware,
        given,
    )


def _result(
    config: Config,
    method: Method,
    partition: int,
    hierarchical: bool,
    hardware: Hardware,
    machine: Machine,
    memory: Memory,
) -> Projection:
    train, model = config.train, config.workload.model
    samples = train.micro_batch * train.micro_steps
    step = machine.compute_s
    executed = hardware_flops(model, samples, train.activation_checkpointing) / step
    return Projection(
        config=config,
        world_size=hardware.world_size,
        partition_size=partition if isinstance(method.schedule, Sharded) else None,
        hierarchical=hierarchical,
        n_params=layout_of(model).total,
        step_s=step,
        compute_s=machine.busy_s,
        communication_s={wire.value: machine.communication_s[wire] for wire in Wire},
        exposed_s=step - machine.busy_s,
        sent_bytes=machine.sent_bytes,
        node_bytes=machine.node_bytes,
        calls=machine.calls,
        memory=memory,
        model_tflops_per_gpu=model_flops(model, samples) / step / 1e12,
        hardware_tflops_per_gpu=executed / 1e12,
        samples_per_s=samples * hardware.world_size / step,
        share_of_peak=executed / hardware.peak_flops_s,
        spans=tuple(machine.spans or ()),
    )


def with_nodes(config: Config, nodes: int) -> Config:
    """The same configuration on a cluster of so many nodes."""
    return replace(config, cluster=replace(_require_cluster(config), nodes=nodes))
