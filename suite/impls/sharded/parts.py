"""What a checkpoint holds of a parameter and its optimizer states: the ranges that each rank owns.

A parameter is seen under the model's own name and flattened, so that what a rank holds of it is one
range, whatever the partition size; where two ranks hold the same range (MiCS), they hold the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

from suite.impls.sharded.engine import Engine
from suite.impls.sharded.units import Bucket

Kinds = Callable[[str], Mapping[str, bool]]
"""The optimizer states of the parameter of that name: each one's name, and whether it is a scalar."""


@dataclass(frozen=True)
class Part:
    """Elements [begin, begin + len(values)) of a flattened tensor of `numel`; `values` is a 1-D view."""

    numel: int
    begin: int
    values: Tensor

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.begin]), torch.Size([len(self.values)]))


@dataclass(frozen=True)
class Owned:
    """What this rank owns of a parameter, and which of the optimizer's tensors that lies in."""

    name: str
    part: Part
    optimized: Tensor | None
    """The tensor in the optimizer's groups that holds these elements; None when frozen."""
    at: int
    """Where in it, flattened, they begin."""

    def is_scalar(self, values: Tensor) -> bool:
        """Of one of the optimizer's states; beside a parameter without dimensions that cannot be seen."""
        return self.optimized is not None and values.dim() < self.optimized.dim()

    def state(self, values: Tensor) -> Part:
        """The same elements of one of the optimizer's states; a scalar state as one element."""
        if values.dim() == 0:
            return Part(1, 0, values.view(1))
        return replace(self.part, values=values.view(-1).narrow(0, self.at, len(self.part.values)))


def owned_by(engine: Engine) -> Iterator[Owned]:
    """What this rank is the owner of: in MiCS the same as its replicas."""
    optimized = [tensor for group in engine.optimizer.param_groups for tensor in group["params"]]
    for unit in engine.units:
        for bucket in unit.buckets:
            yield from _owned_in(bucket, optimized)


def _owned_in(bucket: Bucket, optimized: Sequence[Tensor]) -> Iterator[Owned]:
    last = bucket.first + len(bucket.master)
    for slot in bucket.slots:
        begin, end = max(slot.offset, bucket.first), min(slot.offset + slot.numel, last)
        if begin < end:
            values = bucket.master.narrow(0, begin - bucket.first, end - begin)
            holder = next((tensor for tensor in optimized if _holds(tensor, values)), None)
            at = 0 if holder is None else int(values.storage_offset() - holder.storage_offset())
            yield Owned(slot.name, Part(slot.numel, begin - slot.offset, values), holder, at)


def _holds(outer: Tensor, inner: Tensor) -> bool:
    same = outer.untyped_storage().data_ptr() == inner.untyped_storage().data_ptr()
    return same and 0 <= inner.storage_offset() - outer.storage_offset() < outer.numel()


def owned_by_plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Owned]:
    """Everything. Raises ValueError for a parameter that is not contiguous."""
    optimized = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.numel():
            values = parameter.data.view(-1)
            holder = parameter if id(parameter) in optimized else None
            yield Owned(name, Part(len(values), 0, values), holder, 0)


def states_of(item: Owned, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What the optimizer keeps beside these elements, by name."""
    kept = {} if item.optimized is None else optimizer.state.get(item.optimized, {})
    return {key: values for key, values in kept.items() if values is not None}


def tensors_of(owned: Sequence[Owned], optimizer: torch.optim.Optimizer, kinds_of: Kinds) -> dict[str, Part]:
    """The parameters, and of their optimizer states those that `kinds_of` names."""
    tensors = {}
    for item in owned:
        tensors[f"parameters/{item.name}"] = item.part
        states = states_of(item, optimizer)
        for key in kinds_of(item.name) if states else ():
            tensors[f"optimizer/{key}/{item.name}"] = item.state(states[key])
    return tensors


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What belongs to a model's weights without being trained (BatchNorm's statistics, say), by name."""
    return {name: buffer for name, buffer in model.named_buffers() if not _passing(model, name)}


def _passing(model: nn.Module, name: str) -> bool:
    """Whether a buffer was registered as not persistent."""
    owner, _, own_name = name.rpartition(".")
    return own_name in model.get_submodule(owner)._non_persistent_buffers_set


def buffers_of(model: nn.Module) -> dict[str, Part]:
    """Its persistent buffers, flattened: views where they are contiguous."""
    flat = {name: buffer.detach().flatten() for name, buffer in persistent_buffers(model).items()}
    return {f"buffers/{name}": Part(len(values), 0, values) for name, values in flat.items() if len(values)}


def set_buffers(model: nn.Module, parts: Mapping[str, Part]) -> None:
    """From what `buffers_of` gave, filled; others stay as they are."""
    for name, buffer in persistent_buffers(model).items():
        if f"buffers/{name}" in parts:
            buffer.detach().copy_(parts[f"buffers/{name}"].values.view(buffer.shape))


def random_states(rank: int, device: torch.device) -> dict[str, Part]:
    states = {f"random/cpu/{rank}": torch.get_rng_state()}
    if device.type != "cpu":
        states[f"random/{device.type}/{rank}"] = torch.get_device_module(device).get_rng_state(device)
    return {name: Part(len(state), 0, state) for name, state in states.items()}


def make_states(owned: Sequence[Owned], optimizer: torch.optim.Optimizer, kinds_of: Kinds) -> None:
    """Empty optimizer states, to be filled, where one of the parameters that share a tensor has any. Scalars
    (the step count) lie on the device where the optimizer's kernel reads them, else on the CPU."""
    optimizer.state.clear()
    on_device = {
        id(tensor)
        for group in optimizer.param_groups
        for tensor in group["params"]
        if group.get("fused") or group.get("capturable")
    }
    for item in owned:
        holder, kinds = item.optimized, kinds_of(item.name)
        if holder is not None and kinds:
            state = optimizer.state[holder]
            scalar = torch.zeros((), device=holder.device if id(holder) in on_device else "cpu")
            for key, is_scalar in kinds.items():
                if key not in state:
                    state[key] = (
                        scalar.clone() if is_scalar else torch.zeros_like(holder, requires_grad=False)
                    )
