"""MiCS: the engine with several partition groups (S2)."""

from __future__ import annotations

from dataclasses import replace

import torch

from suite.errors import UsageError
from suite.impls.sharded import memory
from suite.impls.sharded.options import AUTO, MicsOptions
from suite.impls.trainer import BuildModel, Recipe, Topology
from suite.impls.zero3 import Zero3


class MiCS(Zero3):
    """Model states sharded inside partition groups, gradients summed across them in two hops.

    With `partition_size=auto` the smallest group is taken that fits the memory; the arithmetic is in
    `notes`.
    """

    def __init__(
        self, build_model: BuildModel, recipe: Recipe, topology: Topology, options: MicsOptions
    ) -> None:
        chosen = None
        if options.partition_size == AUTO:
            chosen = _smallest(build_model, recipe, topology, options)
            options = replace(options, partition_size=chosen.partition_size)
        super().__init__(build_model, recipe, topology, options)
        if chosen is not None:
            self.notes.append(str(chosen))


def _smallest(
    build_model: BuildModel, recipe: Recipe, topology: Topology, options: MicsOptions
) -> memory.MemoryPlan:
    if recipe.activation_bytes is None:
        raise UsageError(
            "impl.options.partition_size=auto needs to know what activations take; give a number"
        )
    with torch.device("meta"):
        size = memory.model_size(build_model())
    available = (
        memory.device_bytes(topology.device, topology.world_size)
        if options.device_memory_gb is None
        else options.device_memory_gb * memory.GIB
    )
    world = topology.world_size
    return memory.smallest_partition(
        [
            memory.plan_memory(
                size,
                partition_size,
                world // partition_size if options.optimizer_sharding == "world" else 1,
                recipe.dtype,
                options.limits.in_flight_bytes,
                recipe.activation_bytes,
                available,
            )
            for partition_size in range(1, world + 1)
            if world % partition_size == 0
        ]
    )
