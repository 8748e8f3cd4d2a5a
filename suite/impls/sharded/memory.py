"""How small a partition group may be: model states, activations and buffers against the device's memory."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from suite.errors import UsageError
from suite.impls.sharded.two_hop import REDUCTIONS_IN_FLIGHT
from suite.impls.sharded.units import assign_parameters, find_unit_modules

ADAMW_BYTES = 8
"""Two fp32 moments per element."""
USABLE = 0.92
"""Of the device's memory: the rest is for the allocator's fragments and the libraries."""
GIB = 2**30


@dataclass(frozen=True)
class ModelSize:
    """Elements per unit, the root unit first."""

    units: tuple[int, ...]

    @property
    def numel(self) -> int:
        return sum(self.units)


@dataclass(frozen=True)
class MemoryPlan:
    """What one rank needs with this partition size, in bytes."""

    partition_size: int
    states: float
    buffers: float
    activations: float
    limit: float

    @property
    def total(self) -> float:
        return self.states + self.buffers + self.activations

    @property
    def fits(self) -> bool:
        return self.total <= self.limit

    def __str__(self) -> str:
        parts = f"{self.states / GIB:.2f} states + {self.buffers / GIB:.2f} buffers"
        parts += f" + {self.activations / GIB:.2f} activations = {self.total / GIB:.2f} GiB"
        verb = "fits" if self.fits else "does not fit"
        return f"partition_size={self.partition_size}: {parts} {verb} into {self.limit / GIB:.2f} GiB"


def model_size(model: nn.Module) -> ModelSize:
    """Of a model on any device, `meta` included."""
    parameters = dict(model.named_parameters())
    assigned = assign_parameters(model, find_unit_modules(model))
    return ModelSize(tuple(sum(parameters[name].numel() for name in names) for _, names in assigned))


def plan_memory(
    size: ModelSize,
    partition_size: int,
    optimizer_parts: int,
    dtype: torch.dtype,
    prefetch_bytes: float,
    activations: float,
    device_bytes: float,
) -> MemoryPlan:
    """The arithmetic. Per element: fp32 gradient and compute copy over the partition group; fp32
    master and AdamW's moments over it too, and divided among `optimizer_parts` replicas.

    Buffers: the root and one block gathered, what is prefetched, and the gradients of the block that
    is computed and of those on their way, which are received once more from the others.
    """
    shared_copy = dtype is torch.float32 and optimizer_parts == 1
    held = 4 + (0 if shared_copy else dtype.itemsize)
    owned = 4 + ADAMW_BYTES + (0 if optimizer_parts == 1 else 4)
    states = size.numel * (held + owned / optimizer_parts) / partition_size
    block = max(size.units[1:], default=0) * dtype.itemsize
    root, blocks = size.units[0] * dtype.itemsize, sum(size.units[1:]) * dtype.itemsize
    gathered = root + min(blocks, block + max(block, prefetch_bytes))
    gradients = block + 2 * REDUCTIONS_IN_FLIGHT * block
    buffers = 0.0 if partition_size == 1 else gathered + gradients
    return MemoryPlan(partition_size, states, buffers, activations, USABLE * device_bytes)


def smallest_partition(plans: Sequence[MemoryPlan]) -> MemoryPlan:
    """The first that fits, of plans by increasing size. Raises UsageError when none does."""
    for plan in plans:
        if plan.fits:
            return plan
    raise UsageError(f"impl.options.partition_size=auto: even the whole world is too small; {plans[-1]}")


def device_bytes(device: torch.device, ranks_on_host: int) -> float:
    """The memory that one rank may use: of its accelerator, or its part of the host's."""
    if device.type != "cpu":
        return float(torch.accelerator.get_memory_info(device)[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / ranks_on_host
