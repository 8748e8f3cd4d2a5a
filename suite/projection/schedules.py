"""The programs that the methods run: what is computed, started and waited for, in which order.

Methods that gather on demand (ZeRO-3 and everything like it) get their decisions from the engine's own
`plan`; their differences are the fields of `Sharded`. Methods that hold whole weights are `Replicated`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from suite.impls.sharded.schedule import Event, Limits, Op, Phase, plan
from suite.projection.compute import Costs
from suite.projection.layout import Layout
from suite.projection.network import Collective, Groups, Kind
from suite.projection.simulate import Compute, Host, Instruction, Key, Programs, Start, Wait

NEXT_UNIT = Limits(in_flight_bytes=1, coalesce_bytes=0)
ON_DEMAND = Limits(in_flight_bytes=0, coalesce_bytes=0)
ROOT = 0
ROOT_NAME = "root"


@dataclass(frozen=True)
class Sharded:
    """How a method with sharded weights fetches and reduces.

    `keeps_turn`: the last block stays between its forward and backward; `keeps_root`: so does the
    root. `gathers_again`: with
    activation checkpointing, the recomputation and the backward each fetch. `coalesced`: a unit in
    one call, otherwise one per parameter. `blocking`: every collective is waited for by the host
    where it is issued. Parameters below `persistent_below` elements are never gathered.
    `reduce_bucket` (elements) collects gradients of several units; 0 sends each unit's alone.
    `in_flight` reductions may be on their way. `align`: shards are multiples of so many elements.
    `decides` and `stalls`: pays the
    assumed host time per fetched unit, and the assumed allocator stalls.
    `flattens`: collectives work on lists, with copies before or after.
    """

    limits: Limits = NEXT_UNIT
    keeps_turn: bool = False
    keeps_root: bool = True
    gathers_again: bool = False
    coalesced: bool = True
    blocking: bool = False
    persistent_below: int = 0
    reduce_bucket: int = 0
    in_flight: int = 2
    align: int = 1
    decides: bool = False
    stalls: bool = False
    flattens: bool = False


@dataclass(frozen=True)
class Replicated:
    """How a method with whole weights synchronises: gradients in buckets of `bucket` elements, by
    `reduce`, during the backward of every micro-step or of the last; then `spread` brings the
    updated weights to everybody (None: all ranks have updated all of them)."""

    reduce: Kind
    spread: Kind | None
    gradient_bytes: int = 2
    weight_bytes: int = 2
    bucket: int = 500_000_000
    every_micro_step: bool = False
    overlaps: bool = True


@dataclass(frozen=True)
class Job:
    """What a builder needs to know. `element_bytes` of weights and gradients on the wire;
    `decision_s` per fetched unit; `stall_s_per_byte` of gathered weights, `copy_s_per_byte` of what is
    flattened; `optimizer_s` of a step."""

    layout: Layout
    costs: Costs
    groups: Groups
    checkpointing: bool
    element_bytes: int
    optimizer_s: float
    hierarchical: bool = False
    two_hop: bool = True
    world_optimizer: bool = False
    decision_s: float = 0.0
    stall_s_per_byte: float = 0.0
    copy_s_per_byte: float = 0.0


def build_programs(method: Sharded | Replicated, job: Job) -> Programs:
    """The programs of a method. Raises ValueError for groups that it cannot have."""
    if isinstance(method, Replicated):
        early = tuple(_replicated(method, job, last=False))
        return Programs(early, (*_replicated(method, job, last=True), *_spread(method, job)))
    last = tuple(_ShardedMicroStep(method, job, synchronizes=True).program())
    early = last if not job.two_hop else tuple(_ShardedMicroStep(method, job, False).program())
    return Programs(early, (*last, *_sharded_update(job)))


# --- methods with sharded weights


@dataclass(frozen=True)
class Use:
    """A unit in one of its uses: a use that never shares its weights with another is a unit of its own
    to `plan`. `elements`: those of its parameters."""

    name: str
    elements: tuple[int, ...]


@dataclass
class _ShardedMicroStep:
    method: Sharded
    job: Job
    synchronizes: bool
    """Whether the replicas' gradients are added up (hop 2)."""
    pending: list[int] = field(default_factory=list)
    """Elements of gradients in the bucket that is not full yet."""
    flying: deque[tuple[Key, float]] = field(default_factory=deque)
    """First hops on their way, with their bytes."""
    second: list[Key] = field(default_factory=list)
    reductions: int = 0

    def program(self) -> Iterator[Instruction]:
        uses, events = self._events()
        sizes = [int(sum(self._gathered(use))) for use in uses]
        resident = range(len(uses)) if self.job.groups.partition.size == 1 else ()
        schedule = _plan(tuple(events), tuple(sizes), self.method.limits, tuple(resident))
        calls: dict[int, list[Key]] = {}
        for event, actions in zip(schedule.events, schedule.actions, strict=True):
            yield from self._before(event, uses[event.unit])
            for action in actions:
                if action.op is Op.GATHER:
                    yield from self._gather(action.units, uses, calls)
                elif action.op is Op.WAIT:
                    yield from (Wait(key) for key in calls.get(action.units[0], ()))
                elif action.op is Op.REDUCE:
                    yield from self._reduce(uses[action.units[0]].elements)
            yield from self._after(event, uses[event.unit])
        yield from self._reduce_pending()
        yield from self._settle(0)
        yield from (Wait(key) for key in self.second)

    def _events(self) -> tuple[list[Use], list[Event]]:
        """The order in which a stack of blocks runs, as the engine's hooks report it."""
        layers, block = self.job.layout.layers, self.job.layout.block
        uses = [Use(ROOT_NAME, self.job.layout.root)]
        forward, backward = [Event(Phase.FORWARD, ROOT)], []
        for number in range(1, layers + 1):
            uses.append(Use(f"block {number}", block))
            forward += [Event(Phase.FORWARD, number), Event(Phase.FORWARD_END, number)]
        forward.append(Event(Phase.FORWARD_END, ROOT))
        for number in range(layers, 0, -1):
            if self.method.gathers_again and self.job.checkpointing:
                uses.append(Use(f"block {number} again", block))
                again = len(uses) - 1
                backward += [Event(Phase.FORWARD, again), Event(Phase.FORWARD_END, again)]
            index = number
            if not self.method.keeps_turn:
                uses.append(Use(f"block {number}", block))
                index = len(uses) - 1
            backward += [Event(Phase.BACKWARD, index), Event(Phase.BACKWARD_END, index)]
        root = ROOT
        if not self.method.keeps_root:
            uses.append(Use(ROOT_NAME, self.job.layout.root))
            root = len(uses) - 1
        around = Event(Phase.BACKWARD, root), Event(Phase.BACKWARD_END, root)
        return uses, [*forward, around[0], *backward, around[1]]

    def _before(self, event: Event, use: Use) -> Iterator[Instruction]:
        """What is computed before a unit's end is reported."""
        if use.name == ROOT_NAME and event.phase is Phase.FORWARD_END:
            yield Compute("head forward", self.job.costs.head.forward_s)
        elif use.name == ROOT_NAME and event.phase is Phase.BACKWARD_END:
            yield Compute("embedding backward", self.job.costs.embedding.backward_s)

    def _after(self, event: Event, use: Use) -> Iterator[Instruction]:
        """What is computed once an event's weights are there."""
        costs = self.job.costs
        if self.method.decides and event.phase.needs_weights:
            yield Host(self.job.decision_s)
        if use.name == ROOT_NAME:
            if event.phase is Phase.FORWARD:
                yield Compute("embedding forward", costs.embedding.forward_s)
            elif event.phase is Phase.BACKWARD:
                yield Compute("head backward", costs.head.backward_s)
        elif event.phase is Phase.FORWARD:
            yield Compute(f"{use.name} forward", costs.block.forward_s)
        elif event.phase is Phase.BACKWARD:
            if self.job.checkpointing and not self.method.gathers_again:
                yield Compute(f"{use.name} recompute", costs.block.forward_s)
            yield Compute(f"{use.name} backward", costs.block.backward_s)

    def _gathered(self, use: Use) -> list[float]:
        """Bytes of each parameter that is gathered."""
        size = self.job.element_bytes
        return [size * n for n in use.elements if n >= self.method.persistent_below]

    def _gather(
        self, units: Sequence[int], uses: Sequence[Use], calls: dict[int, list[Key]]
    ) -> Iterator[Instruction]:
        parts = [n for unit in units for n in self._gathered(uses[unit])]
        keys: list[Key] = []
        for number, nbytes in enumerate(self._messages(parts)):
            keys.append((uses[units[0]].name, units[0], number))
            group = self.job.groups.partition
            yield Start(keys[-1], Collective(Kind.ALL_GATHER, nbytes, group, self.job.hierarchical))
            yield from self._block(keys[-1])
        yield from self._flatten(parts)
        if self.method.stalls:
            yield Host(self.job.stall_s_per_byte * sum(parts))
        calls.update(dict.fromkeys(units, keys))

    def _reduce(self, elements: Sequence[int]) -> Iterator[Instruction]:
        if self.pending and sum(self.pending) + sum(elements) > self.method.reduce_bucket:
            yield from self._reduce_pending()
        self.pending += elements
        if sum(self.pending) >= self.method.reduce_bucket:
            yield from self._reduce_pending()

    def _reduce_pending(self) -> Iterator[Instruction]:
        messages = self._messages([self.job.element_bytes * n for n in self.pending])
        self.pending = []
        yield from self._flatten(messages)
        for nbytes in messages:
            self.reductions += 1
            key: Key = ("gradients", self.reductions)
            group = self.job.groups.partition
            yield Start(key, Collective(Kind.REDUCE_SCATTER, nbytes, group, self.job.hierarchical))
            yield from self._block(key)
            self.flying.append((key, nbytes))
        yield from self._settle(self.method.in_flight * max(1, len(messages)))

    def _flatten(self, parts: Sequence[float]) -> Iterator[Instruction]:
        if self.method.flattens and parts:
            yield Compute("copies", self.job.copy_s_per_byte * sum(parts))

    def _settle(self, in_flight: int) -> Iterator[Instruction]:
        """Waits for the oldest first hops; what they leave on this rank goes on to the replicas."""
        while len(self.flying) > in_flight:
            key, nbytes = self.flying.popleft()
            yield Wait(key)
            if self.synchronizes and self.job.groups.replication.size > 1:
                shard = nbytes / self.job.element_bytes / self.job.groups.partition.size
                kind = Kind.REDUCE_SCATTER if self.job.world_optimizer else Kind.ALL_REDUCE
                self.second.append(("hop 2", *key))
                whole = Collective(kind, self.job.element_bytes * shard, self.job.groups.replication)
                yield Start(self.second[-1], whole)
                yield from self._block(self.second[-1])

    def _messages(self, parts: Sequence[float]) -> list[float]:
        """Bytes of each call that moves these parameters, padded to equal shards."""
        whole = [sum(parts)] if self.method.coalesced and parts else list(parts)
        step = self.job.element_bytes * self.method.align * self.job.groups.partition.size
        return [-(-nbytes // step) * step for nbytes in whole]

    def _block(self, key: Key) -> Iterator[Instruction]:
        if self.method.blocking:
            yield Wait(key, blocking=True)


_plan = lru_cache(maxsize=64)(plan)
"""The engine's planner: the same for every micro-step, and for every cluster."""


def _sharded_update(job: Job) -> Iterator[Instruction]:
    yield from _norm(job)
    yield Compute("optimizer", job.optimizer_s)
    if job.world_optimizer and job.groups.replication.size > 1:
        shard = job.element_bytes * job.layout.total / job.groups.partition.size
        yield Start(("weights",), Collective(Kind.ALL_GATHER, shard, job.groups.replication))
        yield Wait(("weights",))


def _norm(job: Job) -> Iterator[Instruction]:
    yield Start(("norm",), Collective(Kind.ALL_REDUCE, 4, job.groups.world))
    yield Wait(("norm",))


# --- methods with whole weights


def _replicated(method: Replicated, job: Job, last: bool) -> Iterator[Instruction]:
    costs = job.costs
    yield Compute("embedding forward", costs.embedding.forward_s)
    for number in range(1, job.layout.layers + 1):
        yield Compute(f"block {number} forward", costs.block.forward_s)
    yield Compute("head forward", costs.head.forward_s)
    yield Compute("head backward", costs.head.backward_s)
    reduces = last or method.every_micro_step
    pending, started = 0, 0
    for number in range(job.layout.layers, -1, -1):
        if number == 0:
            yield Compute("embedding backward", costs.embedding.backward_s)
        else:
            if job.checkpointing:
                yield Compute(f"block {number} recompute", costs.block.forward_s)
            yield Compute(f"block {number} backward", costs.block.backward_s)
        pending += sum(job.layout.block if number else job.layout.root)
        while reduces and (pending >= method.bucket or (number == 0 and pending)):
            sent = min(pending, method.bucket)
            pending -= sent
            started += 1
            yield Start(
                ("gradients", started),
                Collective(method.reduce, method.gradient_bytes * sent, job.groups.world),
            )
            if not method.overlaps:
                yield Wait(("gradients", started), blocking=True)
    yield from (Wait(("gradients", number)) for number in range(1, started + 1))


def _spread(method: Replicated, job: Job) -> Iterator[Instruction]:
    yield from _norm(job)
    yield Compute("optimizer", job.optimizer_s)
    left, number = job.layout.total, 0
    while method.spread is not None and left:
        sent = min(left, method.bucket)
        left -= sent
        number += 1
        nbytes = method.weight_bytes * sent
        yield Start(("weights", number), Collective(method.spread, nbytes, job.groups.world))
        yield Wait(("weights", number))
