"""The engine's switches: every optimisation that the sources describe can be turned off alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from suite.errors import UsageError, unknown
from suite.impls.options import Options, check_partition_size, default_partition_size
from suite.impls.sharded.schedule import Limits

AUTO = "auto"
SHARDINGS = ("partition", "world")


@dataclass
class EngineOptions(Options):
    """In the order of the claims (see docs/methods.md):

    - `fine_grained_sync` (Z2): gathers run ahead of their use and reductions behind the rest of
      backward, each waited for when its unit is needed. Off: the compute waits for each at once.
    - `cached_schedule` (Z3): decisions are taken once and then indexed. Off: at every event anew.
    - `coalesced` (Z4): a unit's parameters (and several small units) in one call. Off: one
      collective per parameter.
    - `preflattened` (Z5): collectives read and write flat buffers in place. Off: list-based calls
      with a flattening copy before and one into place after.
    - `contiguous_arenas` (Z6): all shards of a kind in one buffer. Off: one allocation each.
    - `one_kernel_norm` (Z7): gradient norm and clipping without a host synchronisation per tensor.
    - `group_batched` (Z9): gradients are sent from where autograd left them, never flattened.
      Needs `preflattened` and a backend with point-to-point messages; elsewhere they are flattened.
    - `cross_memory`: on the CPU, ranks of one host read each other's memory instead of sending messages
      over loopback.
    - `stock_collectives`: the backend's own collectives instead of this engine's, so that a
      comparison can give every system the same primitives.

    And in the order of the other source's:

    - `partition_size` (M1): ranks that together hold one replica of the model states. None: the
      world; `auto` (mics only): the smallest that fits the device's memory.
    - `hierarchical` (M2): where a partition group is made of several whole nodes, collectives in an
      inter-node and an intra-node stage. Off: flat ones.
    - `two_hop` (M3): gradients are summed over the replicas once a step. Off: at every micro-step.
    - `optimizer_sharding`: `world` divides optimizer states among the replicas as well.

    Beside these, `compile` has `torch.compile` make a graph of each unit's forward and backward.

    `prefetch_mb` bounds what is gathered ahead of its use, `coalesce_mb` what goes into one call
    (both in MiB); `poison` fills released and not yet arrived buffers with NaN (tests).

    `fingerprint` holds the ranks' collectives against each other before each of them and reports the
    first difference, or the rank that does not come within `fingerprint_timeout_s` (see `ledger`); slow.
    """

    fine_grained_sync: bool = True
    cached_schedule: bool = True
    coalesced: bool = True
    preflattened: bool = True
    contiguous_arenas: bool = True
    one_kernel_norm: bool = True
    group_batched: bool = True
    cross_memory: bool = True
    stock_collectives: bool = False
    partition_size: int | str | None = None
    hierarchical: bool = False
    two_hop: bool = True
    optimizer_sharding: str = "partition"
    compile: bool = False
    prefetch_mb: float = 16.0
    coalesce_mb: float = 4.0
    poison: bool = False
    fingerprint: bool = False
    fingerprint_timeout_s: float = 20.0

    def resolve(self, world_size: int, ranks_per_node: int) -> EngineOptions:
        if self.optimizer_sharding not in SHARDINGS:
            raise unknown("impl.options.optimizer_sharding", self.optimizer_sharding, SHARDINGS)
        size = world_size if self.partition_size is None else self.partition_size
        if isinstance(size, int):
            check_partition_size(size, world_size)
        elif size != AUTO:
            raise UsageError(f"impl.options.partition_size={size} is not possible; give a number or {AUTO}")
        return replace(self, partition_size=size)

    @property
    def limits(self) -> Limits:
        """What the scheduler may do under these switches."""
        return Limits(
            in_flight_bytes=int(self.prefetch_mb * 2**20) if self.fine_grained_sync else 0,
            coalesce_bytes=int(self.coalesce_mb * 2**20) if self.coalesced else 0,
        )


@dataclass
class Zero3Options(EngineOptions):
    """One partition group: another size is another method."""

    def resolve(self, world_size: int, ranks_per_node: int) -> EngineOptions:
        if self.partition_size not in (None, world_size):
            raise UsageError(
                f"impl.options.partition_size={self.partition_size} is not zero3, which partitions over "
                f"all {world_size} ranks; use impl=mics"
            )
        return super().resolve(world_size, ranks_per_node)


@dataclass
class UnoptimizedOptions(Zero3Options):
    """All of it off: what stage 3 did before S1."""

    fine_grained_sync: bool = False
    cached_schedule: bool = False
    coalesced: bool = False
    preflattened: bool = False
    contiguous_arenas: bool = False
    one_kernel_norm: bool = False
    group_batched: bool = False
    cross_memory: bool = False
    stock_collectives: bool = True


@dataclass
class MicsOptions(EngineOptions):
    """`partition_size` None: a node where there are several, otherwise half of the world.

    `device_memory_gb` (GiB) is what `partition_size=auto` may fill; None: what the device has.
    """

    hierarchical: bool = True
    device_memory_gb: float | None = None

    def resolve(self, world_size: int, ranks_per_node: int) -> EngineOptions:
        size = self.partition_size
        if size is None:
            size = default_partition_size(world_size, ranks_per_node)
        return EngineOptions.resolve(replace(self, partition_size=size), world_size, ranks_per_node)
