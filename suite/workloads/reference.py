"""Single-process training in plain torch: the truth that every implementation is held against."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from suite.impls.trainer import CPU, BuildModel, MicroBatch, Recipe

FP16_LOSS_SCALE = 2.0**16


@dataclass
class ReferenceRun:
    """What a correct implementation would have computed; tensors are fp32 on the CPU.

    `gradients` are those of step 1 before clipping, `parameters` those after the last step, both
    under the names of `named_parameters()` (a tied parameter once). `losses` and `grad_norms`
    (before clipping) have one entry per step.
    """

    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    losses: list[float]
    grad_norms: list[float]

    def save(self, path: Path) -> None:
        """Writes one safetensors file, complete or not at all."""
        tensors = {f"gradients/{name}": tensor.contiguous() for name, tensor in self.gradients.items()}
        tensors |= {f"parameters/{name}": tensor.contiguous() for name, tensor in self.parameters.items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        tensors["grad_norms"] = torch.tensor(self.grad_norms, dtype=torch.float64)
        unfinished = path.with_name(f"{path.name}.{os.getpid()}")
        save_file(tensors, unfinished)
        unfinished.replace(path)

    @staticmethod
    def load(path: Path) -> ReferenceRun:
        """What `save` wrote. Raises FileNotFoundError or safetensors.SafetensorError."""
        tensors = load_file(path)
        return ReferenceRun(
            gradients=_under("gradients/", tensors),
            parameters=_under("parameters/", tensors),
            losses=tensors["losses"].tolist(),
            grad_norms=tensors["grad_norms"].tolist(),
        )


def run_reference(
    build_model: BuildModel,
    recipe: Recipe,
    global_batches: Iterable[MicroBatch],
    device: torch.device = CPU,
) -> ReferenceRun:
    """One optimizer step per global batch (on `device` already), in this process.

    Each global batch goes through the model whole, so `recipe.micro_steps` has no part in it. With
    bf16 or fp16 the fp32 master weights are rounded into a model of that dtype that computes, and its
    gradients are widened again for an fp32 AdamW: held against the fp32 run, it shows that dtype's
    own error. fp16 lifts gradients above its smallest numbers by a fixed factor.
    """
    master = build_model().to(device)
    compute = master if recipe.dtype == torch.float32 else copy.deepcopy(master).to(recipe.dtype)
    # Not the fused kernel that the implementations get: the truth should not share its mistakes.
    optimizer = torch.optim.AdamW(master.parameters(), **{**recipe.adamw_arguments(), "fused": False})
    run = ReferenceRun({}, {}, [], [])
    for batch in global_batches:
        loss = _gradients(master, compute, batch)
        if not run.gradients:
            run.gradients = {name: _gradient(p).cpu().clone() for name, p in master.named_parameters()}
        run.losses.append(loss)
        run.grad_norms.append(_clip(master, recipe.clip))
        optimizer.step()
    if not run.losses:
        raise ValueError("a reference run needs at least one global batch")
    run.parameters = {name: p.detach().cpu().clone() for name, p in master.named_parameters()}
    return run


def _gradients(master: nn.Module, compute: nn.Module, batch: MicroBatch) -> float:
    """Leaves this batch's gradients in `master` (replacing older ones) and returns its loss."""
    if compute is not master:
        with torch.no_grad():
            for low, full in zip(compute.parameters(), master.parameters(), strict=True):
                low.copy_(full)
    compute.zero_grad()
    loss = batch.loss(compute)
    scale = FP16_LOSS_SCALE if next(compute.parameters()).dtype is torch.float16 else 1.0
    (loss * scale).backward()
    if compute is not master:
        for low, full in zip(compute.parameters(), master.parameters(), strict=True):
            full.grad = None if low.grad is None else low.grad.float() / scale
    return loss.item()


def _gradient(parameter: nn.Parameter) -> Tensor:
    """An unused parameter has no gradient; implementations that shard flat buffers report zeros."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _clip(model: nn.Module, limit: float | None) -> float:
    """Clips in place and returns the norm before it; no limit only measures."""
    return nn.utils.clip_grad_norm_(model.parameters(), limit or float("inf")).item()


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
