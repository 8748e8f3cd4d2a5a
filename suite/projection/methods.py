"""The methods that can be projected, by the names of their implementations.

Three have no implementation here, because the software that published numbers come from is gone:
`deepspeed-zero2-v0.5` and `deepspeed-zero3-v0.5`, DeepSpeed as it was before S1, and `mics-s2`, the
authors' MiCS, whose reductions are taken to be hierarchical as its gathers are. DeepSpeed's release of it
(`deepspeed-mics`) reduces in flat collectives.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from suite.config import Config
from suite.errors import UsageError, unknown
from suite.impls.sharded.options import EngineOptions
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
    whole at a time, as weights or gradients; `keeps_half`: in half precision weights lie there in it, beside
    fp32 ones with the optimizer, and not in fp32 alone. `hierarchical`: whether its collectives are where
    nothing else is asked for. `options`: names of those in `Options` that it has.
    """

    schedule: Sharded | Replicated
    options: tuple[str, ...] = ()
    groups: bool = False
    hierarchical: bool = False
    shards_gradients: bool = True
    shards_optimizer: bool = True
    gradient_bytes: int = 2
    set_aside: int = 0
    live_blocks: int = 3
    keeps_half: bool = True


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
RELEASED_MICS = replace(DEEPSPEED, hierarchical_reduce=False)
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
SDP = Replicated(
    Kind.REDUCE,
    Kind.BROADCAST,
    gradient_bytes=4,
    weight_bytes=4,
    bucket=8_388_608,
    spread_bucket=8_388_608,
)

SWITCHES = (
    *("hierarchical", "two_hop", "optimizer_sharding", "fine_grained_sync", "coalesced"),
    *("prefetch_mb", "coalesce_mb"),
)
"""The engine's; the last two matter to one that prefetches."""
BUCKET, BUCKETS = ("reduce_bucket_size",), ("reduce_bucket_size", "prefetch_bucket_size")
"""DeepSpeed's."""

METHODS: dict[str, Method] = {
    "ddp": Method(
        Replicated(Kind.ALL_REDUCE, None, gradient_bytes=4, bucket=6_553_600),
        shards_gradients=False,
        shards_optimizer=False,
        gradient_bytes=4,
        keeps_half=False,
    ),
    "fairscale-sdp": Method(SDP, gradient_bytes=4, keeps_half=False),
    "deepspeed-zero1": Method(
        replace(ZERO2, every_micro_step=False), BUCKET, shards_gradients=False, set_aside=DEEPSPEED_BUCKET
    ),
    "deepspeed-zero2": Method(ZERO2, BUCKET, set_aside=DEEPSPEED_BUCKET),
    "deepspeed-zero2-v0.5": Method(
        replace(ZERO2, reduce=Kind.REDUCE, overlaps=True), BUCKET, set_aside=2 * DEEPSPEED_BUCKET
    ),
    "deepspeed-zero3": Method(DEEPSPEED, BUCKETS, set_aside=2 * DEEPSPEED_BUCKET),
    "deepspeed-zero3-v0.5": Method(
        DEEPSPEED_2021, BUCKETS, gradient_bytes=6, set_aside=4 * DEEPSPEED_BUCKET, live_blocks=2
    ),
    "deepspeed-mics": Method(
        RELEASED_MICS, ("hierarchical", *BUCKETS), groups=True, set_aside=2 * DEEPSPEED_BUCKET
    ),
    "mics-s2": Method(
        DEEPSPEED, ("hierarchical", *BUCKETS), groups=True, hierarchical=True, set_aside=2 * DEEPSPEED_BUCKET
    ),
    "fairscale-fsdp": Method(
        Sharded(reduce_bucket=13_107_200, in_flight=1), gradient_bytes=4, keeps_half=False
    ),
    "fsdp2": Method(Sharded(in_flight=1), gradient_bytes=4, keeps_half=False),
    "hsdp": Method(Sharded(in_flight=1), groups=True, gradient_bytes=4, keeps_half=False),
    "fsdp2-mics": Method(
        Sharded(in_flight=1),
        ("hierarchical",),
        groups=True,
        hierarchical=True,
        gradient_bytes=4,
        keeps_half=False,
    ),
    "zero3": Method(ENGINE, SWITCHES, gradient_bytes=4, live_blocks=5),
    "zero3-unoptimized": Method(UNOPTIMIZED, SWITCHES[:-2], gradient_bytes=4),
    "mics": Method(ENGINE, SWITCHES, groups=True, hierarchical=True, gradient_bytes=4, live_blocks=5),
}


@dataclass
class Options:
    """The implementations' options that the projection knows.

    `partition_size` None or `auto`: the smallest whose replica fits into memory. `hierarchical` None:
    wherever a partition group is made of several whole nodes. `reduce_bucket_size` and
    `prefetch_bucket_size` (elements) are DeepSpeed's. `fused_attention` is no implementation's but the
    model's; None: as it was in the software of the GPU's time (`score_passes` of the assumptions).
    `prefetch_mb` and `coalesce_mb` (MiB) None: the next unit ahead, alone, which is what the engine's
    defaults come to where a unit is larger than both.
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
    prefetch_mb: float | None = None
    coalesce_mb: float | None = None

    @property
    def engine_limits(self) -> Limits:
        """What the engine's scheduler may do, its own defaults where nothing is said."""
        said = ("fine_grained_sync", "coalesced", "prefetch_mb", "coalesce_mb")
        given = {key: value for key in said if (value := getattr(self, key)) is not None}
        return EngineOptions(**given).limits


def find_method(name: str) -> Method:
    """Raises UsageError, naming the closest one, when there is none of that name."""
    if name not in METHODS:
        raise unknown("implementation to project", name, METHODS)
    return METHODS[name]


def options_of(name: str) -> tuple[str, ...]:
    """What can be said of that method."""
    method = find_method(name)
    return (*(("partition_size",) if method.groups else ()), "fused_attention", *method.options)


def parse_options(config: Config) -> Options:
    """The typed options of the configuration's method. Raises UsageError for what it cannot do."""
    name, given = config.impl.name, config.impl.options
    method = find_method(name)
    if not method.groups and given.get("partition_size") is not None:
        raise UsageError(
            f"{name} has no partition groups; leave impl.options.partition_size out or use impl=mics"
        )
    known = options_of(name)
    for key in given:
        if key not in known:
            raise unknown(f"option of {name} to project", str(key), known)
    try:
        options = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Options), dict(given)))
    except OmegaConfBaseException as error:
        raise UsageError(
            f"bad value for impl.options.{error.full_key}: {str(error).splitlines()[0]}"
        ) from error
    assert isinstance(options, Options)
    for key in BUCKETS:
        value = getattr(options, key)
        if value is not None and value < 1:
            raise UsageError(f"impl.options.{key}={value} is not possible; it must be at least 1")
    if options.optimizer_sharding not in ("partition", "world"):
        raise unknown("impl.options.optimizer_sharding", options.optimizer_sharding, ("partition", "world"))
    return options


def with_switches(schedule: Sharded | Replicated, options: Options) -> Sharded | Replicated:
    """The schedule with the engine's switches turned as the options say."""
    if isinstance(schedule, Replicated):
        return replace(schedule, bucket=options.reduce_bucket_size or schedule.bucket)
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
    if options.prefetch_mb is not None or options.coalesce_mb is not None:
        schedule = replace(schedule, limits=options.engine_limits)
    return schedule
