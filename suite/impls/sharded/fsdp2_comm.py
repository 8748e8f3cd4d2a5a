"""This engine's collectives for users of `fully_shard` (FSDP2), through its public interface.

model = fully_shard(model, mesh=mesh)                  # and its blocks, on a (replicate, shard) mesh
use_engine_collectives(model, partition_size=16, ranks_per_node=8)
for number, batch in enumerate(micro_batches):
    model.set_requires_all_reduce(number == len(micro_batches) - 1)   # two hops: once per step
    model(batch).backward()
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from suite.impls.sharded.collectives import Collectives, Handle, Reduction
from suite.impls.sharded.groups import make_partition
from suite.impls.sharded.native import NativeHierarchicalCollectives
from suite.impls.sharded.options import EngineOptions
from suite.impls.sharded.topology import PartitionTopology


def use_engine_collectives(
    model: nn.Module,
    partition_size: int,
    ranks_per_node: int,
    hierarchical: bool = True,
    options: EngineOptions | None = None,
) -> Collectives:
    """Hands every FSDP module of `model` the engine's all-gather and reduce-scatter.

    `partition_size` is the size of the mesh's shard dimension, made of consecutive ranks. Every rank
    calls it, after the last `fully_shard`. Returns the collectives, to be closed when training ends.
    Raises ValueError for sizes that do not divide the world.
    """
    topology = PartitionTopology(dist.get_world_size(), ranks_per_node, partition_size, hierarchical)
    device = next(model.parameters()).device
    collectives = make_partition(topology, options or EngineOptions(), device, in_rank_order=True)
    nodes = topology.nodes_per_group if isinstance(collectives, NativeHierarchicalCollectives) else 1
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # torch's abstract classes for these are private; only their methods are asked for.
            module.set_custom_all_gather(AllGather(collectives, nodes))  # type: ignore[arg-type]
            module.set_custom_reduce_scatter(ReduceScatter(collectives, nodes))  # type: ignore[arg-type]
    return collectives


class _Work(dist.Work):
    """A handle as FSDP2 knows it: it does not wait for what is no `Work`."""

    def __init__(self, handle: Handle) -> None:
        super().__init__()
        self._handle = handle

    def wait(self, timeout: timedelta | None = None) -> bool:
        self._handle.wait()
        return True


def _answer(handle: Handle, async_op: bool) -> _Work | None:
    """Of a collective of torch's: something to wait for, or nothing when that is over."""
    if async_op:
        return _Work(handle)
    handle.wait()
    return None


class _Comm:
    """FSDP2 numbers shards by rank. Native collectives in two stages number them by local rank first
    (`nodes` above 1), and their buffers are re-arranged."""

    def __init__(self, collectives: Collectives, nodes: int) -> None:
        self._collectives = collectives
        self._nodes = nodes

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def _rearranged(self, full: Tensor, groups: int) -> Tensor:
        """Shards in `groups` runs, transposed."""
        return full.view(groups, self._collectives.size // groups, -1).transpose(0, 1).reshape(-1)


class AllGather(_Comm):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> dist.Work | None:
        if self._nodes == 1:
            return _answer(self._collectives.all_gather([output_tensor], [input_tensor]), async_op)
        by_local_rank = torch.empty_like(output_tensor)
        handle = self._collectives.all_gather([by_local_rank], [input_tensor])
        local_size = self._collectives.size // self._nodes

        def rearrange() -> None:
            output_tensor.copy_(self._rearranged(by_local_rank, local_size))

        return _answer(Handle([handle], rearrange), async_op)


class ReduceScatter(_Comm):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> dist.Work | None:
        if op not in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
            raise ValueError(f"reduce-scatter with {op} is not there; use SUM or AVG")
        flat = input_tensor if self._nodes == 1 else self._rearranged(input_tensor, self._nodes)
        handle = self._collectives.reduce_scatter([Reduction(output_tensor, [(0, flat)])])

        def average() -> None:
            if op == dist.ReduceOp.AVG:
                output_tensor.div_(self._collectives.size)

        return _answer(Handle([handle], average), async_op)
