"""The engine: hooks that report events to the scheduler and carry out its actions.

One engine per rank; ZeRO-3 is it with one partition group, MiCS with several. All ranks must run
the same modules in the same order.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.utils.hooks import RemovableHandle

from suite.impls.sharded import optimizer as arena_optimizer
from suite.impls.sharded.collectives import Collectives, Handle, Piece, Reduction, flatten, join_small
from suite.impls.sharded.options import EngineOptions
from suite.impls.sharded.schedule import Action, Event, Op, Phase, Scheduler
from suite.impls.sharded.units import Bucket, Slot, Unit, build_arenas, build_units, take_over

REDUCTIONS_IN_FLIGHT = 2
"""How many units' gradients may be on their way: one being sent while the next is computed."""


@dataclass
class Statistics:
    """What the engine did since it was made."""

    micro_steps: int = 0
    gathered_bytes: int = 0
    """Full sizes of all gathered buffers."""
    deciding_s: float = 0.0
    """Host time spent deciding what to fetch, release and reduce."""


class Engine:
    """Shards `model` and its `optimizer` over the collectives' group.

    Afterwards train with `loss = model(...)`, `engine.backward(loss)` (as often as there are
    micro-steps) and `engine.step()`. Gradients of micro-steps and ranks are added up: scale the loss
    so that the sum is what you want.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        unit_modules: Sequence[nn.Module],
        collectives: Collectives,
        dtype: torch.dtype,
        device: torch.device,
        options: EngineOptions,
        clip: float | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.statistics = Statistics()
        self._collectives = collectives
        self._options = options
        self._clip = clip
        group_of = {
            parameter: number
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }
        self.units = build_units(
            model, unit_modules, collectives.size, dtype, device, options.coalesced, group_of
        )
        self._arenas = build_arenas(self.units, options.contiguous_arenas)
        for unit in self.units:
            take_over(unit, collectives.index)
        for buffer in model.buffers():
            buffer.data = buffer.data.to(device)
        arena_optimizer.rebind(optimizer, self.units, collectives.index)
        unit_bytes = [unit.nbytes for unit in self.units]
        resident = [unit.index for unit in self.units if all(b.resident for b in unit.buckets)]
        self.scheduler = Scheduler(unit_bytes, options.limits, options.cached_schedule, resident)
        self._gathers: dict[int, list[Handle]] = {}
        self._reductions: deque[Handle] = deque()
        self._in_backward = False
        self._open: dict[int, set[str]] = {}
        """Units whose backward has begun or is expected: names of gradients still to come."""
        self._hooks = list(self._install_hooks())

    # --- what the user calls

    def backward(self, loss: Tensor) -> None:
        """Backward of one micro-step; its gradients are on their way to their shards afterwards."""
        loss.backward()

    def step(self) -> Tensor:
        """Clips, updates the shards, forgets the gradients; returns the global gradient norm before
        clipping (scalar tensor: reading it is what waits for the device)."""
        self.finish_reductions()
        gradients = self._arenas.gradient.tensors
        self._clear_untouched()
        measure = (
            arena_optimizer.gradient_norm
            if self._options.one_kernel_norm
            else arena_optimizer.gradient_norm_per_tensor
        )
        norm = measure(gradients, self._collectives.group, self._collectives.size)
        if self._clip is not None:
            arena_optimizer.scale_to_norm(gradients, norm, self._clip)
        self.optimizer.step()
        if self._arenas.compute is not self._arenas.master:
            self._arenas.compute.copy_from(self._arenas.master)
        for bucket in self._buckets():
            bucket.has_gradient = False
        return norm

    def full_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, fp32 master on the CPU) of every parameter, gathered bucket by bucket; collective."""
        for bucket in self._buckets():
            yield from self._whole(bucket, bucket.master)

    def full_gradients(self) -> Iterator[tuple[str, Tensor]]:
        """(name, fp32 gradient on the CPU) of every trainable parameter, the sum over ranks and
        micro-steps since the last step, before clipping; collective."""
        self.finish_reductions()
        self._clear_untouched()
        for bucket in self._buckets():
            if bucket.gradient is not None:
                yield from self._whole(bucket, bucket.gradient)

    def close(self) -> None:
        """Removes the hooks. The model's parameters stay without memory."""
        for hook in self._hooks:
            hook.remove()

    # --- hooks: from the model to events

    def _install_hooks(self) -> Iterator[RemovableHandle]:
        for unit in self.units:
            yield unit.module.register_forward_pre_hook(self._before_forward(unit))
            yield unit.module.register_forward_hook(self._after_forward(unit), always_call=True)
            for slot in unit.trainable_slots:
                yield slot.parameter.register_post_accumulate_grad_hook(self._gradient_ready(unit, slot))

    def _before_forward(self, unit: Unit) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: object) -> None:
            if self._in_backward or not torch.is_grad_enabled():
                # Recomputation or evaluation: not a part of the schedule, fetched on demand.
                self._wait([unit])
            else:
                self._happens(Phase.FORWARD, unit)

        return hook

    def _after_forward(self, unit: Unit) -> Callable[..., None]:
        def hook(module: nn.Module, arguments: object, output: object) -> None:
            if self._in_backward:
                return
            if not torch.is_grad_enabled():
                self._release(unit)
                return
            for tensor in _tensors(output):
                if tensor.requires_grad:
                    tensor.register_hook(self._before_backward(unit))
            self._happens(Phase.FORWARD_END, unit)

        return hook

    def _before_backward(self, unit: Unit) -> Callable[[Tensor], None]:
        def hook(gradient: Tensor) -> None:
            if not self._in_backward:
                self._in_backward = True
                Variable._execution_engine.queue_callback(self._after_backward)
            if unit.index not in self._open:
                self._open[unit.index] = {slot.name for slot in unit.trainable_slots}
                self._happens(Phase.BACKWARD, unit)

        return hook

    def _gradient_ready(self, unit: Unit, slot: Slot) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            missing = self._open.setdefault(unit.index, {item.name for item in unit.trainable_slots})
            missing.discard(slot.name)
            if not missing:
                self._end_backward(unit)

        return hook

    def _end_backward(self, unit: Unit) -> None:
        self._open[unit.index] = set()
        self._happens(Phase.BACKWARD_END, unit)

    def _after_backward(self) -> None:
        """Autograd is done: units with parameters that got no gradient are still to be ended."""
        for index in sorted(index for index, missing in self._open.items() if missing):
            self._end_backward(self.units[index])
        for unit in self.units:
            if unit.index in self._open and not unit.trainable_slots:
                self._release(unit)
        self._in_backward = False
        self._open.clear()
        self.scheduler.end()
        self.statistics.micro_steps += 1

    def _happens(self, phase: Phase, unit: Unit) -> None:
        start = time.perf_counter()
        actions = self.scheduler.at(Event(phase, unit.index))
        self.statistics.deciding_s += time.perf_counter() - start
        for action in actions:
            self._do(action)

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
        missing = [unit for unit in units if not self._present(unit)]
        buckets = [bucket for unit in missing for bucket in unit.buckets if not bucket.resident]
        for bucket in buckets:
            bucket.allocate()
            if self._options.poison:
                bucket.full.fill_(torch.nan)
            self.statistics.gathered_bytes += bucket.nbytes
        calls = [buckets] if self._options.coalesced else [[bucket] for bucket in buckets]
        handles = []
        for call in calls:
            handle = self._collectives.all_gather([b.full for b in call], [b.compute for b in call])
            if not self._options.fine_grained_sync:
                handle.wait()
            handles.append(handle)
        for unit in missing:
            self._gathers[unit.index] = handles

    def _wait(self, units: Sequence[Unit]) -> None:
        self._gather([unit for unit in units if not self._present(unit)])
        for unit in units:
            for handle in self._gathers.get(unit.index, ()):
                handle.wait()
            self._gathers[unit.index] = []

    def _release(self, unit: Unit) -> None:
        if self._present(unit):
            self._wait([unit])
            del self._gathers[unit.index]
            for bucket in unit.buckets:
                if self._options.poison and not bucket.resident:
                    bucket.full.fill_(torch.nan)
                bucket.free()

    def _present(self, unit: Unit) -> bool:
        """Gathered or on its way."""
        return unit.index in self._gathers

    def _reduce(self, unit: Unit) -> None:
        reductions = [self._reduction(bucket) for bucket in unit.buckets if bucket.trainable]
        calls = [reductions] if self._options.coalesced else [[item] for item in reductions]
        for call in calls:
            handle = self._collectives.reduce_scatter(call)
            if not self._options.fine_grained_sync:
                handle.wait()
            self._reductions.append(handle)
        while len(self._reductions) > REDUCTIONS_IN_FLIGHT * max(1, len(calls)):
            self._reductions.popleft().wait()

    def _reduction(self, bucket: Bucket) -> Reduction:
        """Takes the gradients out of the parameters. One that got none this time counts as zero."""
        assert bucket.gradient is not None
        pieces: list[Piece] = []
        for slot in bucket.slots:
            gradient = slot.parameter.grad
            slot.parameter.grad = None
            if gradient is None:
                gradient = torch.zeros(slot.numel, dtype=bucket.full.dtype, device=bucket.full.device)
            pieces.append((slot.offset, gradient.contiguous()))
        if self._options.group_batched:
            pieces = join_small(pieces)
        else:
            pieces = [(0, flatten(pieces, bucket.numel, bucket.full))]
        reduction = Reduction(bucket.gradient, pieces, accumulate=bucket.has_gradient)
        bucket.has_gradient = True
        return reduction

    def finish_reductions(self) -> None:
        """Waits until all gradients so far have arrived in their shards."""
        while self._reductions:
            self._reductions.popleft().wait()

    # --- helpers

    def _buckets(self) -> Iterator[Bucket]:
        return (bucket for unit in self.units for bucket in unit.buckets)

    def _clear_untouched(self) -> None:
        """Gradients that no micro-step of this step has written are zero, not the last step's."""
        for bucket in self._buckets():
            if bucket.gradient is not None and not bucket.has_gradient:
                bucket.gradient.zero_()

    def _whole(self, bucket: Bucket, shard: Tensor) -> Iterator[tuple[str, Tensor]]:
        full = torch.empty(self._collectives.size * len(shard), dtype=shard.dtype, device=shard.device)
        self._collectives.all_gather([full], [shard]).wait()
        for slot in bucket.slots:
            yield slot.name, full.narrow(0, slot.offset, slot.numel).view(slot.shape).cpu().clone()


def _tensors(output: object) -> Iterator[Tensor]:
    """All tensors in a module's output: tuples, lists, mappings (Hugging Face outputs) and plain."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from _tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)


def make_collectives(
    group: dist.ProcessGroup | None, index: int, size: int, options: EngineOptions
) -> Collectives:
    """The best primitives for the group's backend, unless the options ask for others."""
    from suite.impls.sharded import collectives as kinds

    if size == 1:
        return kinds.AloneCollectives(group, index, size)
    if not options.preflattened:
        return kinds.FlatteningCollectives(group, index, size)
    if options.stock_collectives or dist.get_backend(group) != "gloo":
        return kinds.NativeCollectives(group, index, size)
    return kinds.DirectCollectives(group, index, size)
