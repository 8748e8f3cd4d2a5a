"""The engine: takes events to the scheduler and carries out its actions.

One engine per rank; ZeRO-3 is it with one partition group, MiCS with several. All ranks must run
the same modules in the same order.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from suite.impls.sharded import optimizer as arena_optimizer
from suite.impls.sharded.collectives import Collectives, Handle
from suite.impls.sharded.compiling import compile_units
from suite.impls.sharded.groups import Groups
from suite.impls.sharded.hooks import ModelHooks, cast_inputs
from suite.impls.sharded.ledger import make_ledger
from suite.impls.sharded.materialize import Initialize, Materializer
from suite.impls.sharded.options import EngineOptions
from suite.impls.sharded.schedule import Action, Event, Op, Phase, Scheduler
from suite.impls.sharded.two_hop import TRAINING, TwoHop
from suite.impls.sharded.units import Bucket, Unit, build_arenas, build_units, take_over
from suite.impls.trace import Kind, Trace


@dataclass
class Statistics:
    """What the engine did since it was made."""

    micro_steps: int = 0
    skipped_steps: int = 0
    """Steps that fp16 overflowed in."""
    gathered_bytes: int = 0
    """Full sizes of all gathered buffers."""
    expected_inter_node_bytes: float = 0.0
    """What the topology says that gathers have had a node send to others."""
    peak_gathered_bytes: int = 0
    """Most that gathered buffers have taken at a time."""
    deciding_s: float = 0.0
    """Host time spent deciding what to fetch, release and reduce."""


class Engine:
    """Shards `model` and its `optimizer` over the groups.

    Afterwards train with `loss = model(...)`, `engine.backward(loss)` (as often as there are
    micro-steps) and `engine.step()`. Gradients of micro-steps and ranks are added up: scale the loss
    so that the sum is what you want.

    Gradients leave the parameters during backward: `optimizer.zero_grad()` and `model.zero_grad()` find none
    and do nothing. To forget micro-steps call `engine.zero_grad()`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        unit_modules: Sequence[nn.Module],
        groups: Groups,
        dtype: torch.dtype,
        device: torch.device,
        options: EngineOptions,
        clip: float | None = None,
        initialize: Initialize | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.device = device
        self.statistics = Statistics()
        self._trace = Trace()
        self.loss_scale = arena_optimizer.LossScale() if dtype is torch.float16 else None
        self.skipped = False
        """Whether the last step left the parameters alone, because fp16 had overflowed."""
        self._groups = groups
        self._options = options
        self._clip = clip
        self._parts = groups.replication.size if options.optimizer_sharding == "world" else 1
        self.units = self._partition(unit_modules, dtype, device, initialize)
        self._ledger = make_ledger(options.fingerprint, options.fingerprint_timeout_s)
        self._two_hop = TwoHop(groups, options, dtype, device, self._trace, self._ledger)
        unit_bytes = [unit.nbytes for unit in self.units]
        resident = [unit.index for unit in self.units if all(b.resident for b in unit.buckets)]
        self.scheduler = Scheduler(unit_bytes, options.limits, options.cached_schedule, resident)
        self._gathers: dict[int, list[Handle]] = {}
        self._gathered_since: dict[int, float] = {}
        self._gathered_bytes = 0
        self._refresh: Handle | None = None
        """The owners' new weights on their way to the replicas."""
        self._last = True
        self._backward_failed = False
        self._scaled = False
        """Whether the backward that runs began with a scaled loss."""
        if options.compile:
            compile_units(self.units)
        self._hooks = ModelHooks(model, self.units, self)
        self._handles = [
            model.register_state_dict_pre_hook(_refuse_state_dict),
            model.register_load_state_dict_pre_hook(_refuse_state_dict),
        ]
        if dtype is not torch.float32:
            self._handles += cast_inputs(model, self.units, dtype)

    def _partition(
        self,
        unit_modules: Sequence[nn.Module],
        dtype: torch.dtype,
        device: torch.device,
        initialize: Initialize | None,
    ) -> list[Unit]:
        """Moves model and optimizer into shards, unit by unit: no rank ever holds more than one whole."""
        partition, replication = self._groups.partition, self._groups.replication
        group_of = {
            parameter: number
            for number, group in enumerate(self.optimizer.param_groups)
            for parameter in group["params"]
        }
        units = build_units(
            self.model,
            unit_modules,
            partition.size,
            self._parts,
            dtype,
            device,
            self._options.coalesced,
            group_of,
        )
        part = replication.index if self._parts > 1 else 0
        self._arenas = build_arenas(
            units, self._options.contiguous_arenas, partition.index, part, self._parts
        )
        materializer = Materializer(self.model, device, initialize)
        for unit in units:
            materializer.materialize(unit)
            take_over(unit, partition.index)
        materializer.finish()
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(device)
        self._optimized = arena_optimizer.rebind(self.optimizer, units)
        return units

    # --- what the user calls

    def backward(self, loss: Tensor, last: bool = True, retain_graph: bool = False) -> None:
        """Backward of one micro-step; its gradients are on their way to their shards afterwards.

        `last=False` says that more micro-steps follow before `step`: the replicas' gradients are
        then not added up yet (hop 2). It only saves communication; the result is the same.

        What autograd raises goes through; the gradients of this step are incomplete then, and
        nothing goes on before `zero_grad`.
        """
        self._last = last
        self._scaled = True
        if self.loss_scale is not None:
            loss = loss * self.loss_scale.value
        try:
            self._hooks.run_backward(lambda: loss.backward(retain_graph=retain_graph))
        finally:
            self._scaled = False

    def zero_grad(self) -> None:
        """Forgets the gradients of all micro-steps since the last `step`; collective. Needed only to
        begin a step over: `step` does it by itself."""
        self._hooks.find_failure()
        self._two_hop.finish(self._trainable_buckets())
        self._two_hop.reset(self._trainable_buckets())
        for parameter in self.model.parameters():
            parameter.grad = None
        self._backward_failed = False

    def step(self) -> Tensor:
        """Clips, updates the shards, forgets the gradients; returns the global gradient norm before
        clipping (scalar tensor: reading it is what waits for the device).

        With fp16 it does wait: after an overflow on any rank no rank updates, and `skipped` is set.
        Raises RuntimeError when a backward of this step has raised.
        """
        self._hooks.find_failure()
        self._require_complete()
        self._two_hop.finish(self._trainable_buckets())
        gradients = self._arenas.owned_gradient.tensors
        scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        norm = self._norm(gradients) / scale
        if self.loss_scale is not None:
            self.skipped = not bool(norm.isfinite())
            self.loss_scale.update(self.skipped)
            self.statistics.skipped_steps += self.skipped
        if not self.skipped:
            if self._clip is not None or scale != 1.0:
                arena_optimizer.rescale(gradients, norm, self._clip, scale)
            for values, gradient in self._optimized:
                values.grad = gradient
            self.quiesce()
            self.optimizer.step()
            for values, _ in self._optimized:
                values.grad = None  # not within reach of an `optimizer.zero_grad()`
            self.refresh_weights()
        self._two_hop.reset(self._trainable_buckets())
        return norm

    def _norm(self, gradients: Sequence[Tensor]) -> Tensor:
        """Over the world: all replicas then clip, or skip, by bitwise the same number."""
        one_kernel = self._options.one_kernel_norm
        measure = arena_optimizer.sum_of_squares if one_kernel else arena_optimizer.sum_of_squares_per_tensor
        square = measure(gradients)
        self._ledger.enter(TRAINING, "all-reduce", "the gradient norm", square.nbytes)
        with self._trace.span(Kind.WAIT, "all-reduce of the gradient norm"):
            dist.all_reduce(square)
        copies = self._groups.replication.size // self._parts
        return (square / copies).sqrt()

    def quiesce(self) -> None:
        """Until nothing is on its way and no other rank reads this one's weights or gradients; collective.
        Needed before masters are changed other than by `step`."""
        self._two_hop.settle()
        self.finish_refresh()  # of the step before, when no forward came between
        with self._trace.span(Kind.WAIT, "all ranks' reading"):
            self._groups.quiesce()

    def refresh_weights(self) -> None:
        """Brings the owners' masters, which were changed after `quiesce`, to where weights are gathered from;
        collective. Weights that are still gathered, for a forward that had no backward, are of the past."""
        for unit in self.units:
            self._release(unit)
        self._arenas.refresh_compute()
        if self._parts > 1:
            buckets = list(self._buckets())
            self._two_hop.expect_refresh(buckets)
            self._ledger.enter(
                TRAINING, "gather", "the owners' weights", sum(b.compute.nbytes for b in buckets)
            )
            self._refresh = self._groups.replication.all_gather(
                [bucket.compute for bucket in buckets], [bucket.owned_compute for bucket in buckets]
            )

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, fp32 master on the CPU) of every parameter, gathered bucket by bucket; collective."""
        for unit in self.units:
            yield from self.full_unit(unit)

    def full_unit(self, unit: Unit) -> Iterator[tuple[str, Tensor]]:
        """The same of one unit; collective."""
        self._two_hop.settle()
        for bucket in unit.buckets:
            yield from self._whole(bucket, bucket.master)

    def full_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name, fp32 gradient on the CPU) of every trainable parameter, the sum over ranks and
        micro-steps since the last step, before clipping; collective."""
        self._two_hop.finish(self._trainable_buckets())
        scale = 1.0 if self.loss_scale is None else self.loss_scale.value
        for bucket in self._trainable_buckets():
            assert bucket.owned_gradient is not None
            for name, gradient in self._whole(bucket, bucket.owned_gradient):
                yield name, gradient / scale

    def record_into(self, trace: Trace) -> None:
        """From now on what is gathered, reduced and waited for is added to `trace`."""
        self._trace = self._two_hop.trace = trace

    @property
    def expected_inter_node_bytes(self) -> float:
        """What the topology says that a node has had to send to others: to be held against what was
        counted on its connections."""
        return self.statistics.expected_inter_node_bytes + self._two_hop.expected_inter_node_bytes

    @property
    def memory_reads(self) -> dict[int, int]:
        """Bytes read from other ranks' memory on this host, by global rank."""
        return self._groups.read_from

    def close(self) -> None:
        """Waits for what is on its way, then removes the hooks and ends the process groups; collective. The
        model's parameters stay without memory, and nothing can be gathered any more."""
        for unit in self.units:
            self._release(unit)
        self._two_hop.settle()
        self.finish_refresh()
        self._hooks.close()
        for handle in self._handles:
            handle.remove()
        self._two_hop.close()
        self._groups.close()

    # --- what the hooks report

    def happens(self, phase: Phase, unit: Unit) -> None:
        """An event of the schedule."""
        if phase.needs_weights:
            self._trace.at(f"{phase.value} of {unit.name}")
        start = time.perf_counter()
        actions = self.scheduler.at(Event(phase, unit.index))
        self.statistics.deciding_s += time.perf_counter() - start
        for action in actions:
            self._do(action)

    def fetch(self, unit: Unit) -> None:
        """On demand, outside of the schedule."""
        self._wait([unit])

    def drop(self, unit: Unit) -> None:
        """What was fetched on demand is not needed any more."""
        self._release(unit)

    def before_backward(self) -> None:
        """Raises RuntimeError where it would lead to wrong gradients, UsageError where that is because a
        parameter was frozen or thawed meanwhile."""
        self._require_complete()
        for unit in self.units:
            unit.require_as_sharded()
        if self.loss_scale is not None and not self._scaled:
            raise RuntimeError("with fp16 the loss has to be scaled: call engine.backward(loss)")

    def after_backward(self) -> None:
        """The micro-step is over."""
        self.scheduler.end()
        self.statistics.micro_steps += 1

    def backward_failed(self) -> None:
        """What it has begun cannot be told from what it has not."""
        self._backward_failed = True
        self.scheduler.abandon()
        for unit in self.units:
            self._release(unit)

    def _require_complete(self) -> None:
        if self._backward_failed:
            raise RuntimeError(
                "a backward of this step has raised and its gradients are incomplete; "
                "call engine.zero_grad() and repeat the micro-steps of this step"
            )

    # --- actions: from the schedule to collectives. Each is harmless when it has already been done.

    def _do(self, action: Action) -> None:
        units = [self.units[index] for index in action.units]
        if action.op is Op.GATHER:
            self._gather(units)
        elif action.op is Op.WAIT:
            self._wait(units)
        elif action.op is Op.RELEASE:
            for unit in units:
                self._release(unit)
        else:
            for unit in units:
                self._reduce(unit)

    def _gather(self, units: Sequence[Unit]) -> None:
        self.finish_refresh()
        missing = [unit for unit in units if not self._present(unit)]
        if not missing:
            return
        buckets = [bucket for unit in missing for bucket in unit.buckets if not bucket.resident]
        for bucket in buckets:
            bucket.allocate()
            if self._options.poison:
                bucket.full.fill_(torch.nan)
            self._gathered_bytes += bucket.nbytes
            self.statistics.gathered_bytes += bucket.nbytes
            self.statistics.expected_inter_node_bytes += self._groups.topology.gather_inter_node_bytes(
                bucket.nbytes
            )
        self.statistics.peak_gathered_bytes = max(self.statistics.peak_gathered_bytes, self._gathered_bytes)
        calls = [buckets] if self._options.coalesced else [[bucket] for bucket in buckets]
        handles = []
        names = " and ".join(unit.name for unit in missing)
        for call in calls:
            if call:
                self._ledger.enter(TRAINING, "gather", names, sum(bucket.nbytes for bucket in call))
            with self._trace.waiting(f"start of gather {names}"):
                handle = self._groups.partition.all_gather([b.full for b in call], [b.compute for b in call])
            if not self._options.fine_grained_sync:
                handle.wait()
            handles.append(handle)
        for unit in missing:
            self._gathers[unit.index] = handles
            self._gathered_since[unit.index] = self._trace.now()

    def _wait(self, units: Sequence[Unit]) -> None:
        self._gather([unit for unit in units if not self._present(unit)])
        for unit in units:
            if self._gathers[unit.index]:
                with self._trace.span(Kind.WAIT, f"gather {unit.name}"):
                    for handle in self._gathers[unit.index]:
                        handle.wait()
                self._trace.add(Kind.GATHER, unit.name, self._gathered_since[unit.index])
            self._gathers[unit.index] = []

    def _release(self, unit: Unit) -> None:
        if self._present(unit):
            self._wait([unit])
            del self._gathers[unit.index]
            for bucket in unit.buckets:
                if self._options.poison and not bucket.resident:
                    bucket.full.fill_(torch.nan)
                if not bucket.resident:
                    bucket.free()
                    self._gathered_bytes -= bucket.nbytes

    def finish_refresh(self) -> None:
        """Until the owners' new weights are here, where they were on their way."""
        if self._refresh is not None:
            with self._trace.span(Kind.WAIT, "gather of the owners' weights"):
                self._refresh.wait()
            self._refresh = None

    def _present(self, unit: Unit) -> bool:
        """Gathered or on its way."""
        return unit.index in self._gathers

    def _reduce(self, unit: Unit) -> None:
        trainable = [bucket for bucket in unit.buckets if bucket.trainable]
        if trainable:
            self._two_hop.reduce(trainable, self._last, unit.name)

    # --- helpers

    def _buckets(self) -> Iterator[Bucket]:
        return (bucket for unit in self.units for bucket in unit.buckets)

    def _trainable_buckets(self) -> list[Bucket]:
        return [bucket for bucket in self._buckets() if bucket.trainable]

    def _whole(self, bucket: Bucket, owned: Tensor) -> Iterator[tuple[str, Tensor]]:
        """What the ranks own of a bucket, put together: (name, CPU tensor)."""
        shard = owned
        if len(owned) < bucket.shard_numel:
            shard = _gathered(self._groups.replication, owned)
        full = _gathered(self._groups.partition, shard)
        for slot in bucket.slots:
            yield slot.name, full.narrow(0, slot.offset, slot.numel).view(slot.shape).cpu().clone()


def _gathered(group: Collectives, shard: Tensor) -> Tensor:
    full = torch.empty(group.size * len(shard), dtype=shard.dtype, device=shard.device)
    group.all_gather([full], [shard]).wait()
    group.quiesce()
    return full


def _refuse_state_dict(module: nn.Module, *_: object) -> None:
    raise RuntimeError(
        "the model's weights are sharded, its state_dict holds none of them; use engine.full_parameters(), "
        "export.save_pretrained() or the checkpoint module"
    )
