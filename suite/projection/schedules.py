"""The programs that the methods run: what is computed, started and waited for, in which order.

Methods that gather on demand (ZeRO-3 and everything like it) get their decisions from the engine's own
`plan`; their differences are the fields of `Sharded`. Methods that hold whole weights are `Replicated`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
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

    `keeps_turn`: the last block stays between its forward and backward; `keeps_root`: so does the root.
    `by_module`: a block's modules are fetched one by one, not together; a module stays from its
    recomputation to its backward when fewer than `reuse_elements` are used in between (None: always).
    `overlapping_hooks`: a block's backward is reported (and fetched for) before the gradients of the
    block above it are sent. `coalesced`: a unit in one call, otherwise one per parameter. `blocking`:
    every collective is waited for by the host where it is issued. Parameters below `persistent_below`
    elements are never gathered. `reduce_bucket` (elements) collects gradients of several units; 0 sends
    each unit's alone. `in_flight` reductions may be on their way. `hierarchical_reduce`: where gathers are
    hierarchical, reductions are. `chained`: hop 2 follows hop 1 by
    itself, not when the compute comes to settle it. `align`: shards are multiples of so many elements.
    `decides` and `stalls`: pays the assumed host time per fetched unit, and the assumed allocator
    stalls. `flattens`: collectives work on lists, with copies before or after.
    """

    limits: Limits = NEXT_UNIT
    keeps_turn: bool = False
    keeps_root: bool = True
    by_module: bool = False
    reuse_elements: int | None = None
    overlapping_hooks: bool = False
    coalesced: bool = True
    blocking: bool = False
    persistent_below: int = 0
    reduce_bucket: int = 0
    in_flight: int = 2
    hierarchical_reduce: bool = True
    chained: bool = False
    align: int = 1
    decides: bool = False
    stalls: bool = False
    flattens: bool = False


@dataclass(frozen=True)
class Replicated:
    """How a method with whole weights synchronises: gradients in buckets of `bucket` elements, by
    `reduce`, during the backward of every micro-step or of the last; then `spread` brings the
    updated weights to everybody, `spread_bucket` elements at a time (None: all ranks have updated all of
    them)."""

    reduce: Kind
    spread: Kind | None
    gradient_bytes: int = 2
    weight_bytes: int = 2
    bucket: int = 500_000_000
    spread_bucket: int = 500_000_000
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
    """The programs of a method."""
    if isinstance(method, Replicated):
        early = tuple(_replicated(method, job, last=False))
        return Programs(early, (*_replicated(method, job, last=True), *_spread(method, job)))
    last = early = tuple(_ShardedMicroStep(method, job, synchronizes=True).program())
    replicated = job.groups.replication.size > 1
    carries_over = replicated and not job.two_hop and method.chained
    if replicated and (job.two_hop or carries_over):
        early = tuple(_ShardedMicroStep(method, job, not job.two_hop, settles=False).program())
    return Programs(early, (*last, *_sharded_update(job)), carries_over)


# --- methods with sharded weights


@dataclass(frozen=True)
class Use:
    """A unit in one of its uses: a use that never shares its weights with another is a unit of its own
    to `plan`. `elements`: those of its parameters; `share`: its part of a block's compute; `here`: its
    weights have stayed from the use before."""

    name: str
    elements: tuple[int, ...]
    share: float = 1.0
    here: bool = False


@dataclass
class _ShardedMicroStep:
    method: Sharded
    job: Job
    synchronizes: bool
    """Whether the replicas' gradients are added up (hop 2)."""
    settles: bool = True
    """Whether it waits for that: the sums are wanted by the optimizer."""
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
            yield from self._after(event, uses)
        yield from self._reduce_pending()
        yield from self._settle(0)
        yield from (Wait(key) for key in self.second if self.settles)

    def _events(self) -> tuple[list[Use], list[Event]]:
        """The order in which a stack of blocks runs, as the hooks of the method report it."""
        uses = [Use(ROOT_NAME, self.job.layout.root)]
        root, first = Event(Phase.BACKWARD, ROOT), Event(Phase.FORWARD, ROOT)
        forward, backward = self._forward(uses), self._backward(uses)
        if not self.method.keeps_root:
            uses.append(Use(ROOT_NAME, self.job.layout.root))
            root = Event(Phase.BACKWARD, len(uses) - 1)
        end = Event(Phase.FORWARD_END, ROOT)
        return uses, [first, *forward, end, root, *backward, Event(Phase.BACKWARD_END, root.unit)]

    def _forward(self, uses: list[Use]) -> list[Event]:
        events = []
        for use in self._block_uses():
            uses.append(use)
            index = len(uses) - 1
            events += [Event(Phase.FORWARD, index), Event(Phase.FORWARD_END, index)]
        return events

    def _backward(self, uses: list[Use]) -> list[Event]:
        """Block by block from the last; `uses` holds those of forward, and gets those of backward."""
        parts = len(self._block_parts())
        events: list[Event] = []
        for number in range(self.job.layout.layers, 0, -1):
            indices = list(range(1 + (number - 1) * parts, 1 + number * parts))
            if not self.method.keeps_turn:
                uses += [uses[index] for index in indices]
                indices = list(range(len(uses) - parts, len(uses)))
            if self.job.checkpointing and self.method.by_module:
                indices = [self._recomputed(index, indices, uses, events) for index in indices]
            for index in reversed(indices):
                events += [Event(Phase.BACKWARD, index), Event(Phase.BACKWARD_END, index)]
        return _overlapping(events) if self.method.overlapping_hooks else events

    def _recomputed(self, index: int, block: list[int], uses: list[Use], events: list[Event]) -> int:
        """Adds a module's recomputation; returns the use that its backward is, in which its weights are
        here already or, when too much lies in between, are fetched again. In either case it is a use of
        its own: prefetching looks past what is here."""
        events.append(Event(Phase.FORWARD, index))
        between = 2 * sum(sum(uses[other].elements) for other in block if other > index)
        stays = self.method.reuse_elements is None or between < self.method.reuse_elements
        if not stays:
            events.append(Event(Phase.FORWARD_END, index))
        uses.append(replace(uses[index], here=stays))
        return len(uses) - 1

    def _block_uses(self) -> Iterator[Use]:
        for number in range(1, self.job.layout.layers + 1):
            for elements in self._block_parts():
                share = sum(elements) / sum(self.job.layout.block)
                yield Use(f"block {number}", elements, share)

    def _block_parts(self) -> list[tuple[int, ...]]:
        """Elements of what is fetched together: a block's modules (weight and bias), or all of it."""
        block = self.job.layout.block
        if not self.method.by_module:
            return [block]
        return [block[start : start + 2] for start in range(0, len(block), 2)]

    def _before(self, event: Event, use: Use) -> Iterator[Instruction]:
        """What is computed before a unit's end is reported."""
        if use.name == ROOT_NAME and event.phase is Phase.FORWARD_END:
            yield Compute("head forward", self.job.costs.head.forward_s)
        elif use.name == ROOT_NAME and event.phase is Phase.BACKWARD_END:
            yield Compute("embedding backward", self.job.costs.embedding.backward_s)

    def _after(self, event: Event, uses: Sequence[Use]) -> Iterator[Instruction]:
        """What is computed once an event's weights are there."""
        costs, use = self.job.costs, uses[event.unit]
        if self.method.decides and event.phase.needs_weights:
            yield Host(self.job.decision_s)
        if use.name == ROOT_NAME:
            if event.phase is Phase.FORWARD:
                yield Compute("embedding forward", costs.embedding.forward_s)
            elif event.phase is Phase.BACKWARD:
                yield Compute("head backward", costs.head.backward_s)
        elif event.phase is Phase.FORWARD:
            yield Compute(f"{use.name} forward", use.share * costs.block.forward_s)
        elif event.phase is Phase.BACKWARD and not self._delays(event, uses):
            yield from self._block_backward(use)
        elif event.phase is Phase.BACKWARD_END and self.method.overlapping_hooks and event.unit > 1:
            yield from self._block_backward(uses[event.unit - 1])

    def _delays(self, event: Event, uses: Sequence[Use]) -> bool:
        """Whether a block's backward is reported before the one above it has ended."""
        return self.method.overlapping_hooks and event.unit < self.job.layout.layers

    def _block_backward(self, use: Use) -> Iterator[Instruction]:
        costs = self.job.costs.block
        if self.job.checkpointing and not self.method.by_module:
            yield Compute(f"{use.name} recompute", use.share * costs.forward_s)
        yield Compute(f"{use.name} backward", use.share * costs.backward_s)

    def _gathered(self, use: Use) -> list[float]:
        """Bytes of each parameter that is gathered."""
        size = self.job.element_bytes
        return [size * n for n in use.elements if n >= self.method.persistent_below and not use.here]

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
            hierarchical = self.job.hierarchical and self.method.hierarchical_reduce
            yield Start(key, Collective(Kind.REDUCE_SCATTER, nbytes, group, hierarchical))
            yield from self._block(key)
            self.flying.append((key, nbytes))
            if self.method.chained:
                yield from self._hop2(key, nbytes, after=key)
        yield from self._settle(self.method.in_flight * max(1, len(messages)))

    def _flatten(self, parts: Sequence[float]) -> Iterator[Instruction]:
        if self.method.flattens and parts:
            yield Compute("copies", self.job.copy_s_per_byte * sum(parts))

    def _settle(self, in_flight: int) -> Iterator[Instruction]:
        """Waits for the oldest first hops; what they leave on this rank goes on to the replicas."""
        while len(self.flying) > in_flight:
            key, nbytes = self.flying.popleft()
            yield Wait(key)
            if not self.method.chained:
                yield from self._hop2(key, nbytes, after=None)

    def _hop2(self, key: Key, nbytes: float, after: Key | None) -> Iterator[Instruction]:
        if self.synchronizes and self.job.groups.replication.size > 1:
            shard = nbytes / self.job.element_bytes / self.job.groups.partition.size
            kind = Kind.REDUCE_SCATTER if self.job.world_optimizer else Kind.ALL_REDUCE
            self.second.append(("hop 2", *key))
            whole = Collective(kind, self.job.element_bytes * shard, self.job.groups.replication)
            yield Start(self.second[-1], whole, after)
            yield from self._block(self.second[-1])

    def _messages(self, parts: Sequence[float]) -> list[float]:
        """Bytes of each call that moves these parameters, padded to equal shards."""
        whole = [sum(parts)] if self.method.coalesced and parts else list(parts)
        step = self.job.element_bytes * self.method.align * self.job.groups.partition.size
        return [-(-nbytes // step) * step for nbytes in whole]

    def _block(self, key: Key) -> Iterator[Instruction]:
        if self.method.blocking:
            yield Wait(key, blocking=True)


def _overlapping(events: Sequence[Event]) -> list[Event]:
    """Each begin of a backward before the end of the one before it."""
    begins, ends = events[::2], events[1::2]
    mixed = [event for pair in zip(begins[1:], ends[:-1], strict=True) for event in pair]
    return [*begins[:1], *mixed, *ends[-1:]]


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
    gradient_bytes = max(method.gradient_bytes, job.element_bytes)
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
                Collective(method.reduce, gradient_bytes * sent, job.groups.world),
            )
            if not method.overlaps:
                yield Wait(("gradients", started), blocking=True)
    yield from (Wait(("gradients", number)) for number in range(1, started + 1))


def _spread(method: Replicated, job: Job) -> Iterator[Instruction]:
    yield from _norm(job)
    yield Compute("optimizer", job.optimizer_s)
    left, number = job.layout.total, 0
    while method.spread is not None and left:
        sent = min(left, method.spread_bucket)
        left -= sent
        number += 1
        nbytes = max(method.weight_bytes, job.element_bytes) * sent
        yield Start(("weights", number), Collective(method.spread, nbytes, job.groups.world))
        yield Wait(("weights", number))
