"""The engine's switches: every optimisation that the sources describe can be turned off alone."""

from __future__ import annotations

from dataclasses import dataclass

from suite.impls.options import Options
from suite.impls.sharded.schedule import Limits


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
    - `stock_collectives`: the backend's own collectives instead of this engine's, so that a
      comparison can give every system the same primitives.

    `prefetch_mb` bounds what is gathered ahead of its use, `coalesce_mb` what goes into one call
    (both in MiB); `poison` fills released and not yet arrived buffers with NaN (tests).
    """

    fine_grained_sync: bool = True
    cached_schedule: bool = True
    coalesced: bool = True
    preflattened: bool = True
    contiguous_arenas: bool = True
    one_kernel_norm: bool = True
    group_batched: bool = True
    stock_collectives: bool = False
    prefetch_mb: float = 16.0
    coalesce_mb: float = 4.0
    poison: bool = False

    @property
    def limits(self) -> Limits:
        """What the scheduler may do under these switches."""
        return Limits(
            in_flight_bytes=int(self.prefetch_mb * 2**20) if self.fine_grained_sync else 0,
            coalesce_bytes=int(self.coalesce_mb * 2**20) if self.coalesced else 0,
        )


@dataclass
class UnoptimizedOptions(EngineOptions):
    """All of it off: what stage 3 did before S1."""

    fine_grained_sync: bool = False
    cached_schedule: bool = False
    coalesced: bool = False
    preflattened: bool = False
    contiguous_arenas: bool = False
    one_kernel_norm: bool = False
    group_batched: bool = False
    stock_collectives: bool = True
