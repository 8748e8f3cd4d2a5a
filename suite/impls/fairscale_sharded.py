"""FairScale's two sharded methods: OSS + ShardedDataParallel, and FullyShardedDataParallel."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from suite.impls.blocks import block_stack
from suite.impls.fairscale_shims import run_fsdp_on_cpu
from suite.impls.options import Options
from suite.impls.trainer import BuildModel, MicroBatch, Recipe, Topology, Trainer


@dataclass
class SDPOptions(Options):
    """`zero_grad_set_to_none`: clear gradients as `zero_grad` does by default since torch 2.0.

    True runs FairScale as today's torch runs it, which trains silently wrong from the second step
    (see docs/findings.md); it is here so that the checks can be seen to catch that.
    """

    zero_grad_set_to_none: bool = False


class FairScaleSDP(Trainer):
    """OSS (each parameter's optimizer state on one rank) under ShardedDataParallel (its gradient is
    reduced to that rank alone), with their defaults: like ZeRO-2. OSS then broadcasts the weights.

    bf16 is `torch.autocast`, which FairScale documents for it: parameters, their broadcast,
    gradients and their reduction stay fp32. Gradients of all micro-steps are reduced at the last.
    """

    def __init__(
        self, build_model: BuildModel, recipe: Recipe, topology: Topology, options: SDPOptions
    ) -> None:
        from fairscale.nn.data_parallel import ShardedDataParallel
        from fairscale.optim import OSS

        super().__init__(recipe, topology)
        self.partition_size = topology.world_size
        self._set_to_none = options.zero_grad_set_to_none
        model = build_model().to(topology.device)
        self._parameters = dict(model.named_parameters())
        self._optimizer = OSS(self._parameters.values(), optim=torch.optim.AdamW, **recipe.adamw_arguments())
        self._model = ShardedDataParallel(model, self._optimizer)

    def full_parameters(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self._parameters.items()}

    def _forward_backward(self, micro_batch: MicroBatch, last: bool) -> Tensor:
        with nullcontext() if last else self._model.no_sync():
            with torch.autocast(
                self.topology.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"
            ):
                loss = micro_batch.loss(self._model)
            # ShardedDataParallel averages over the world, and the parts of the loss are to be added.
            (loss * self.topology.world_size).backward()
        return loss.detach()

    @torch.no_grad()
    def _read_gradients(self) -> dict[str, Tensor]:
        owners = {
            parameter: rank
            for rank, groups in enumerate(self._optimizer.partition_parameters())
            for group in groups
            for parameter in group["params"]
        }
        gradients = {}
        for name, parameter in self._parameters.items():
            gradient = torch.zeros_like(parameter)
            if owners[parameter] == self.topology.rank and parameter.grad is not None:
                gradient.copy_(parameter.grad)
            dist.broadcast(gradient, owners[parameter])
            gradients[name] = gradient.cpu()
        return gradients

    def _optimizer_step(self) -> tuple[Tensor | float, bool]:
        limit = math.inf if self.recipe.clip is None else self.recipe.clip
        norm = self._optimizer.clip_grad_norm(limit)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=self._set_to_none)
        return norm, False


class FairScaleFSDP(Trainer):
    """FullyShardedDataParallel around every transformer block and the root, with its defaults: like
    ZeRO-3. Gradients are reduce-scattered at every micro-step, without `no_sync`, as it advises.

    bf16 is `mixed_precision=True, compute_dtype=bfloat16`: shards and AdamW states are fp32,
    weights are gathered in bf16 and gradients reduce-scattered in bf16 (`fp32_reduce_scatter` is off
    by default); a shard's gradients are added up in fp32.
    """

    def __init__(self, build_model: BuildModel, recipe: Recipe, topology: Topology, options: Options) -> None:
        from fairscale.nn.data_parallel import FullyShardedDataParallel

        super().__init__(recipe, topology)
        self.partition_size = topology.world_size
        if topology.device.type == "cpu":
            run_fsdp_on_cpu()
        model = build_model()
        settings: dict[str, Any] = {"compute_device": topology.device}
        if recipe.precision == "bf16":
            settings |= {"mixed_precision": True, "compute_dtype": recipe.dtype}
        blocks = block_stack(model)
        for index, block in enumerate(blocks):
            # Sharded before the next one comes: the device never holds the whole model.
            blocks[index] = FullyShardedDataParallel(block.to(topology.device), **settings)
        self._model = FullyShardedDataParallel(model.to(topology.device), **settings)
        self._optimizer = recipe.adamw(self._model.parameters())

    def full_parameters(self) -> dict[str, Tensor]:
        with self._model.summon_full_params(volatile=True):
            return {
                name: value.detach().float().cpu().clone() for name, value in self._model.named_parameters()
            }

    def _forward_backward(self, micro_batch: MicroBatch, last: bool) -> Tensor:
        loss = micro_batch.loss(self._model)
        # FSDP averages over the world, and the parts of the loss are to be added up.
        (loss * self.topology.world_size).backward()
        return loss.detach()

    @torch.no_grad()
    def _read_gradients(self) -> dict[str, Tensor]:
        """Gathers the gradient shards by the way that FairScale gathers parameters: in their place."""
        shards = list(self._model.parameters())
        saved = [shard.detach().clone() for shard in shards]
        for shard in shards:
            shard.copy_(torch.zeros_like(shard) if shard.grad is None else shard.grad)
        gradients = self.full_parameters()
        for shard, values in zip(shards, saved, strict=True):
            shard.copy_(values)
        return gradients

    def _optimizer_step(self) -> tuple[Tensor | float, bool]:
        if self.topology.world_size == 1:
            # It widens gradients where it has reduced them, and one rank has nothing to reduce.
            for shard in self._model.parameters():
                if shard.grad is not None:
                    shard.grad.data = shard.grad.data.to(shard.dtype)
        limit = math.inf if self.recipe.clip is None else self.recipe.clip
        norm = self._model.clip_grad_norm_(limit)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm, False
