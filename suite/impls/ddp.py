"""Plain data parallelism: torch's DistributedDataParallel, every rank holds everything."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from suite.impls.gradients import clip_gradients, gradient_of
from suite.impls.options import Options
from suite.impls.trainer import BuildModel, MicroBatch, Recipe, Topology, Trainer


class DDP(Trainer):
    """DistributedDataParallel with its defaults: 25 MiB buckets, all-reduced during the last
    micro-step's backward (`no_sync` before it).

    Nothing is gathered. bf16 is `torch.autocast`, which the DDP documentation pairs with it:
    parameters, gradients and their all-reduce stay fp32, matrix products run in bf16.
    """

    def __init__(self, build_model: BuildModel, recipe: Recipe, topology: Topology, options: Options) -> None:
        super().__init__(recipe, topology)
        model = build_model().to(topology.device)
        self._parameters = dict(model.named_parameters())
        self._ddp = DistributedDataParallel(
            model, device_ids=[topology.device] if topology.device.type == "cuda" else None
        )
        self._optimizer = recipe.adamw(self._parameters.values())

    def full_parameters(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self._parameters.items()}

    def _forward_backward(self, micro_batch: MicroBatch, last: bool) -> Tensor:
        with nullcontext() if last else self._ddp.no_sync():
            with torch.autocast(
                self.topology.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"
            ):
                loss = micro_batch.loss(self._ddp)
            # DDP averages over the world, and the parts of the loss are to be added up.
            (loss * self.topology.world_size).backward()
        return loss.detach()

    def _read_gradients(self) -> dict[str, Tensor]:
        return {name: gradient_of(value).cpu().clone() for name, value in self._parameters.items()}

    def _optimizer_step(self) -> tuple[Tensor | float, bool]:
        norm = clip_gradients(self._parameters.values(), self.recipe.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm, False
