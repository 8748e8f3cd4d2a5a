"""No method at all: every rank steps alone, the lower bound that step times are held against."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from suite.impls.gradients import clip_gradients, gradient_of
from suite.impls.options import Options
from suite.impls.trainer import BuildModel, MicroBatch, Recipe, Topology, Trainer


class Floor(Trainer):
    """The same forward, backward and AdamW as everybody's, without any gradient communication.

    Its replicas drift apart and its gradients and norms are this rank's own, so it is never a
    competitor. bf16 is the cheapest form there is: bf16 weights and gradients beside fp32 masters,
    one cast each per step.
    """

    def __init__(self, build_model: BuildModel, recipe: Recipe, topology: Topology, options: Options) -> None:
        super().__init__(recipe, topology)
        self._model = build_model().to(topology.device)
        self._names = [name for name, _ in self._model.named_parameters()]
        self._masters = list(self._model.parameters())
        if recipe.dtype != torch.float32:
            self._masters = [
                nn.Parameter(value.detach().clone(), value.requires_grad) for value in self._masters
            ]
            self._model.to(recipe.dtype)
        self._weights = list(self._model.parameters())
        self._optimizer = recipe.adamw(self._masters)

    def full_parameters(self) -> dict[str, Tensor]:
        return {
            name: value.detach().cpu().clone() for name, value in zip(self._names, self._masters, strict=True)
        }

    def _forward_backward(self, micro_batch: MicroBatch, last: bool) -> Tensor:
        loss = micro_batch.loss(self._model)
        # The rank's own data stand for the global batch, so that clipping acts as it does elsewhere.
        (loss * self.topology.world_size).backward()
        return loss.detach()

    def _read_gradients(self) -> dict[str, Tensor]:
        return {
            name: gradient_of(value).float().cpu().clone()
            for name, value in zip(self._names, self._weights, strict=True)
        }

    def _optimizer_step(self) -> tuple[Tensor | float, bool]:
        for master, weight in self._copies():
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        norm = clip_gradients(self._masters, self.recipe.clip)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if copies := self._copies():
            with torch.no_grad():
                torch._foreach_copy_([weight for _, weight in copies], [master for master, _ in copies])
        return norm, False

    def _copies(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """(fp32 master, weight that computes) where these are two; none in fp32."""
        pairs = zip(self._masters, self._weights, strict=True)
        return [(master, weight) for master, weight in pairs if master is not weight]
