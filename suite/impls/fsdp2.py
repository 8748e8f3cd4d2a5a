"""torch's fully_shard (FSDP2), over the world or over partition groups (HSDP)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from suite.impls.blocks import block_stack
from suite.impls.gradients import clip_gradients, gradient_of
from suite.impls.options import Options, PartitionOptions
from suite.impls.sharded.fsdp2_comm import use_engine_collectives
from suite.impls.trainer import BuildModel, MicroBatch, Recipe, Topology, Trainer


@dataclass
class FSDP2MiCSOptions(PartitionOptions):
    """As for HSDP; `hierarchical` off gives flat collectives of true volume."""

    hierarchical: bool = True


class FSDP2(Trainer):
    """`fully_shard` on every transformer block and on the root, with its defaults: a block is
    released after its forward and gathered again for its backward; gradients are reduce-scattered
    at every micro-step.

    bf16 is `MixedPrecisionPolicy(param_dtype=bfloat16)`: shards and AdamW states stay fp32, weights
    are gathered in bf16, and gradients are reduced in bf16 too, which is what the policy's default
    `reduce_dtype=None` means.
    """

    def __init__(self, build_model: BuildModel, recipe: Recipe, topology: Topology, options: Options) -> None:
        super().__init__(recipe, topology)
        self.partition_size = topology.world_size
        self._start(build_model, init_device_mesh(topology.device.type, (topology.world_size,)))

    def _start(self, build_model: BuildModel, mesh: DeviceMesh) -> None:
        policy = MixedPrecisionPolicy(
            param_dtype=self.recipe.dtype if self.recipe.precision == "bf16" else None
        )
        model = build_model()
        for block in block_stack(model):
            fully_shard(block, mesh=mesh, mp_policy=policy)
        self._model: FSDPModule = fully_shard(model, mesh=mesh, mp_policy=policy)
        self._parameters = dict(model.named_parameters())
        self._optimizer = self.recipe.adamw(self._parameters.values())

    def full_parameters(self) -> dict[str, Tensor]:
        return {name: _whole(value) for name, value in self._parameters.items()}

    def _forward_backward(self, micro_batch: MicroBatch, last: bool) -> Tensor:
        assert isinstance(self._model, torch.nn.Module)
        loss = micro_batch.loss(self._model)
        # fully_shard averages over the world, and the parts of the loss are to be added up.
        (loss * self.topology.world_size).backward()
        return loss.detach()

    def _read_gradients(self) -> dict[str, Tensor]:
        return {name: _whole(gradient_of(value)) for name, value in self._parameters.items()}

    def _optimizer_step(self) -> tuple[Tensor | float, bool]:
        norm = clip_gradients(self._parameters.values(), self.recipe.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm, False


class HSDP(FSDP2):
    """FSDP2 on a two-dimensional mesh: sharded inside a partition group of neighbouring ranks,
    replicated across the replication group.

    Gradients are reduce-scattered in the partition group at every micro-step and all-reduced in the
    replication group at the last one only; dtypes as in FSDP2.
    """

    def __init__(
        self,
        build_model: BuildModel,
        recipe: Recipe,
        topology: Topology,
        options: PartitionOptions,
    ) -> None:
        Trainer.__init__(self, recipe, topology)
        assert options.partition_size is not None, "resolve() fills in the partition size"
        self.partition_size = options.partition_size
        shape = (topology.world_size // options.partition_size, options.partition_size)
        names = ("replicate", "shard")
        self._start(build_model, init_device_mesh(topology.device.type, shape, mesh_dim_names=names))

    def _forward_backward(self, micro_batch: MicroBatch, last: bool) -> Tensor:
        self._model.set_requires_all_reduce(last)
        return super()._forward_backward(micro_batch, last)


class FSDP2MiCS(HSDP):
    """HSDP with this project's collectives: hierarchical where a partition group is made of several
    whole nodes, of true volume everywhere. A user's own script gets the same with one call
    (`suite.impls.sharded.fsdp2_comm`)."""

    def __init__(
        self,
        build_model: BuildModel,
        recipe: Recipe,
        topology: Topology,
        options: FSDP2MiCSOptions,
    ) -> None:
        super().__init__(build_model, recipe, topology, options)
        assert options.partition_size is not None and isinstance(self._model, torch.nn.Module)
        self._collectives = use_engine_collectives(
            self._model, options.partition_size, topology.ranks_per_node, options.hierarchical
        )

    def memory_reads(self) -> dict[int, int]:
        return self._collectives.read_from

    def close(self) -> None:
        self._collectives.close()


def _whole(shard: Tensor) -> Tensor:
    """The complete fp32 tensor on the CPU, gathered in this rank's own partition group: a
    replicated dimension is not communicated over."""
    assert isinstance(shard, DTensor)
    return shard.full_tensor().detach().float().cpu().clone()
