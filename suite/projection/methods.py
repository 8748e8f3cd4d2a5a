"""The methods that can be projected, by the names of their implementations.

Two have no implementation here, because the software that published numbers come from is gone:
`deepspeed-zero2-v0.5` and `deepspeed-zero3-v0.5`, DeepSpeed as it was before S1.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from suite.config import Config
from suite.errors import UsageError, unknown
from suite.impls.sharded.schedule import Limits
from suite.projection.compute import HALF
from suite.projection.network import Kind
from suite.projection.schedules import NEXT_UNIT, ON_DEMAND, Replicated, Sharded

AUTO = "auto"
DEEPSPEED_BUCKET = 500_000_000
"""Elements; DeepSpeed's default `reduce_bucket_size` and `allgather_bucket_size`."""
REUSE_DISTANCE = 1_000_000_000
"""Elements; DeepSpeed's default `stage3_max_reuse_distance`."""


@dataclass(frozen=True)
class Method:
    """`groups`: whether model states can be sharded in partition groups smaller than the world.

    `gradient_bytes` per element of the gradients that are kept (with what a step adds to them);
    `set_aside` elements of half precision are buffers of the method's own; `live_blocks` blocks are
    whole at a time, as weights or gradients; `hierarchical`: whether it has such collectives.
    """

    schedule: Sharded | Replicated
    groups: bool = False
    hierarchical: bool = False
    shards_gradients: bool = True
    shards_optimizer: bool = True
    gradient_bytes: int = 2
    set_aside: int = 0
    live_blocks: int = 3


ENGINE = Sharded(keeps_turn=True, overlapping_hooks=True, chained=True, align=64)
UNOPTIMIZED = Sharded(
    ON_DEMAND,
    keeps_turn=True,
    overlapping_hooks=True,
    coalesced=False,
    blocking=True,
    align=64,
    decides=True,
    stalls=True,
    flattens=True,
)
DEEPSPEED = Sharded(
    Limits(in_flight_bytes=100_000_000, coalesce_bytes=100_000_000),
    keeps_root=False,
    by_module=True,
    persistent_below=100_000,
    reduce_bucket=DEEPSPEED_BUCKET,
    in_flight=1,
)
DEEPSPEED_2021 = Sharded(
    ON_DEMAND,
    keeps_root=False,
    by_module=True,
    reuse_elements=REUSE_DISTANCE,
    coalesced=False,
    blocking=True,
    persistent_below=100_000,
    decides=True,
    stalls=True,
    flattens=True,
)
ZERO2 = Replicated(Kind.ALL_REDUCE, Kind.ALL_GATHER, every_micro_step=True, overlaps=False)

METHODS: dict[str, Method] = {
    "ddp": Method(
        Replicated(Kind.ALL_REDUCE, None, gradient_bytes=4, bucket=6_553_600),
        shards_gradients=False,
        shards_optimizer=False,
        gradient_bytes=4,
    ),
    "fairscale-sdp": Method(
        Replicated(Kind.REDUCE, Kind.BROADCAST, gradient_bytes=4, weight_bytes=4, bucket=8_388_608),
        gradient_bytes=4,
    ),
    "deepspeed-zero1": Method(
        replace(ZERO2, every_micro_step=False), shards_gradients=False, set_aside=DEEPSPEED_BUCKET
    ),
    "deepspeed-zero2": Method(ZERO2, set_aside=DEEPSPEED_BUCKET),
    "deepspeed-zero2-v0.5": Method(
        replace(ZERO2, reduce=Kind.REDUCE, overlaps=True), set_aside=2 * DEEPSPEED_BUCKET
    ),
    "deepspeed-zero3": Method(DEEPSPEED, set_aside=2 * DEEPSPEED_BUCKET),
    "deepspeed-zero3-v0.5": Method(
        DEEPSPEED_2021, gradient_bytes=6, set_aside=4 * DEEPSPEED_BUCKET, live_blocks=2
    ),
    "deepspeed-mics": Method(DEEPSPEED, groups=True, hierarchical=True, set_aside=2 * DEEPSPEED_BUCKET),
    "fairscale-fsdp": Method(Sharded(reduce_bucket=13_107_200, in_flight=1), gradient_bytes=4),
    "fsdp2": Method(Sharded(in_flight=1), gradient_bytes=4),
    "hsdp": Method(Sharded(in_flight=1), groups=True, gradient_bytes=4),
    "fsdp2-mics": Method(Sharded(in_flight=1), groups=True, hierarchical=True, gradient_bytes=4),
    "zero3": Method(ENGINE, gradient_bytes=4, live_blocks=5),
    "zero3-unoptimized": Method(UNOPTIMIZED, gradient_bytes=4),
    "mics": Method(ENGINE, groups=True, hierarchical=True, gradient_bytes=4, live_blocks=5),
}


@dataclass
class Options:
    """The implementations' options that the projection knows.

    `partition_size` None or `auto`: the smallest whose replica fits into memory. `hierarchical` None:
    wherever a partition group is made of several whole nodes. `reduce_bucket_size` and
    `prefetch_bucket_size` (elements) are DeepSpeed's. `fused_attention` is no implementation's but the
    model's; None: as it was in the software of the GPU's time (`score_passes` of the assumptions).
    """

    partition_size: str | None = None
    hierarchical: bool | None = None
    two_hop: bool = True
    optimizer_sharding: str = "partition"
    fine_grained_sync: bool | None = None
    coalesced: bool | None = None
    reduce_bucket_size: int | None = None
    prefetch_bucket_size: int | None = None
    fused_attention: bool | None = None


def find_method(name: str) -> Method:
    """Raises UsageError, naming the closest one, when there is none of that name."""
    if name not in METHODS:
        raise unknown("implementation to project", name, METHODS)
    return METHODS[name]


def parse_options(config: Config) -> Options:
    """The typed options of the configuration's method. Raises UsageError for what it cannot do."""
    name, given = config.impl.name, config.impl.options
    method = find_method(name)
    known = [item.name for item in fields(Options)]
    for key in given:
        if key not in known:
            raise unknown("impl option to project", str(key), known)
    try:
        options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Options), dict(given)))
    except OmegaConfBaseException as error:
        raise UsageError(
            f"bad value for impl.options.{error.full_key}: {str(error).splitlines()[0]}"
        ) from error
    assert isinstance(options, Options)
    if options.optimizer_sharding not in ("partition", "world"):
        raise unknown("impl.options.optimizer_sharding", options.optimizer_sharding, ("partition", "world"))
    if not method.groups and options.partition_size is not None:
        raise UsageError(
            f"{name} has no partition groups; leave impl.options.partition_size out or use impl=mics"
        )
    return options


def with_switches(schedule: Sharded | Replicated, options: Options) -> Sharded | Replicated:
    """The schedule with the engine's switches turned as the options say."""
    if isinstance(schedule, Replicated):
        return schedule
    if options.fine_grained_sync is not None:
        limits = NEXT_UNIT if options.fine_grained_sync else ON_DEMAND
        schedule = replace(schedule, limits=limits, blocking=not options.fine_grained_sync)
    if options.coalesced is not None:
        schedule = replace(schedule, coalesced=options.coalesced)
    if options.reduce_bucket_size is not None:
        schedule = replace(schedule, reduce_bucket=options.reduce_bucket_size)
    if options.prefetch_bucket_size is not None:
        nbytes = HALF * options.prefetch_bucket_size
        schedule = replace(schedule, limits=Limits(nbytes, nbytes))
    return schedule
