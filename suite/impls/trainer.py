"""The interface behind which every implementation trains: one `Trainer` object per rank.

All methods are collective: every rank calls them, in the same order.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from suite.errors import UsageError
from suite.impls.trace import Trace

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class MicroBatch(Protocol):
    """What one rank sees in one micro-step."""

    def loss(self, model: nn.Module) -> Tensor:
        """This micro-batch's part of the global loss (fp32 scalar, differentiable).

        It is the sum over its own masked tokens divided by the number of masked tokens in the
        *global* batch: the parts of all ranks and micro-steps add up to the loss of the step,
        also when they hold unequal numbers of masked tokens.
        """
        ...


@dataclass(frozen=True)
class Recipe:
    """What all implementations of a comparison share: AdamW, precision, clipping, accumulation.

    `precision` is `fp32`, or `bf16` or `fp16` (compute in it, fp32 master weights and optimizer states);
    `clip` is the largest allowed global gradient norm, None for no clipping.
    """

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.01
    precision: str = "fp32"
    clip: float | None = None
    micro_steps: int = 1
    activation_bytes: int | None = None
    """What the activations of one micro-batch take on a rank, where somebody has worked it out."""

    def adamw(self, parameters: object) -> torch.optim.AdamW:
        """The optimizer that every implementation that takes one gets."""
        return torch.optim.AdamW(parameters, **self.adamw_arguments())  # type: ignore[arg-type]

    def adamw_arguments(self) -> dict:
        """`fused` is torch's single kernel for the whole update, on the CPU and on accelerators."""
        return {
            "lr": self.lr,
            "betas": self.betas,
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "fused": True,
        }

    @property
    def dtype(self) -> torch.dtype:
        """In which gathered weights and activations are computed."""
        return DTYPES[self.precision]


@dataclass(frozen=True)
class Topology:
    """Where this rank stands: ranks are numbered node by node."""

    rank: int
    world_size: int
    ranks_per_node: int
    device: torch.device = CPU

    @property
    def node(self) -> int:
        return self.rank // self.ranks_per_node

    @property
    def local_rank(self) -> int:
        return self.rank % self.ranks_per_node

    @property
    def nodes(self) -> int:
        return self.world_size // self.ranks_per_node


@dataclass(frozen=True)
class StepResult:
    """One optimizer step, the same on every rank.

    `loss` is the mean over the global batch's masked tokens; `grad_norm` the global L2 norm before
    clipping; `skipped` says that the optimizer left the parameters alone (an fp16 overflow).
    """

    loss: float
    grad_norm: float
    skipped: bool = False


class Trainer(ABC):
    """One implementation at work on this rank.

    A subclass provides the four `_`-methods; `train_step` is the same for all of them, so that no
    implementation is timed on a different loop.
    """

    partition_size: int | None = None
    """Ranks that together hold one replica of the model states; None where nothing is sharded."""

    def __init__(self, recipe: Recipe, topology: Topology) -> None:
        self.recipe = recipe
        self.topology = topology
        self.notes: list[str] = []
        """Decisions that a reader of the results should know of, one sentence each."""
        self.keep_gradients = False
        """Set before a step to make `full_gradients` possible after it (costs time and memory)."""
        self.trace = Trace()
        self._gradients: dict[str, Tensor] | None = None

    def train_step(self, micro_batches: Sequence[MicroBatch]) -> StepResult:
        """One optimizer step over this rank's micro-batches, `recipe.micro_steps` of them.

        Raises FloatingPointError on every rank whose own loss is not finite, and on all ranks when the
        losses are but the gradient norm is not; a step that fp16 skipped is none of these.
        """
        own = torch.zeros((), dtype=torch.float32, device=self.topology.device)
        for index, micro_batch in enumerate(micro_batches):
            self.trace.at(f"micro-step {index + 1}")
            own += self._forward_backward(micro_batch, last=index == len(micro_batches) - 1)
        if self.keep_gradients:
            self.trace.at("reading the gradients")
            self._gradients = self._read_gradients()
        self.trace.at("optimizer step")
        grad_norm, skipped = self._optimizer_step()
        self.trace.at("end of the step")
        loss = own.clone()
        with self.trace.waiting("all-reduce of the loss"):
            dist.all_reduce(loss)
        # Only here does the host wait for the device: everything before has been queued by now.
        result = StepResult(loss.item(), float(grad_norm), skipped)
        if not skipped:
            _require_finite(own, result)
        return result

    def full_gradients(self) -> dict[str, Tensor]:
        """Of the last step, before clipping: fp32 on the CPU, averaged over the global batch,
        complete on every rank, under the model's own parameter names.

        Raises RuntimeError when `keep_gradients` was not set before that step.
        """
        if self._gradients is None:
            raise RuntimeError("set keep_gradients before the step whose gradients are wanted")
        return self._gradients

    @abstractmethod
    def full_parameters(self) -> dict[str, Tensor]:
        """fp32 (master) parameters on the CPU, complete on every rank, under the model's own names.

        A rank answers from its own replica: comparing the answers across ranks shows replicas that
        have drifted apart.
        """

    @abstractmethod
    def _forward_backward(self, micro_batch: MicroBatch, last: bool) -> Tensor:
        """Forward and backward of one micro-step; `last` is the one after which gradients must be
        synchronised. Returns the detached, unscaled loss part (scalar)."""

    @abstractmethod
    def _read_gradients(self) -> dict[str, Tensor]:
        """`full_gradients`, taken between the last backward and the optimizer."""

    @abstractmethod
    def _optimizer_step(self) -> tuple[Tensor | float, bool]:
        """Clips, steps and clears the gradients; returns (gradient norm, skipped). A norm that is on
        the device stays there: reading it would hold up the host."""

    def save(self, folder: Path, position: int = 0) -> None:
        """A complete checkpoint, on the disk when it returns; `position` counts consumed steps.

        Raises UsageError where the implementation has none here, or the folder exists.
        """
        raise UsageError(f"{type(self).__name__} has no checkpoints here; use zero3 or mics")

    def load(self, folder: Path) -> int:
        """Continues from a checkpoint and returns its position.

        Raises UsageError where the implementation has none here, or for a damaged one.
        """
        raise UsageError(f"{type(self).__name__} has no checkpoints here; use zero3 or mics")

    def record_into(self, trace: Trace) -> None:
        """From now on this implementation adds what it gathers, reduces and waits for to `trace`, and tells
        it what it does."""
        self.trace = trace

    def settle(self) -> None:  # noqa: B027 (most leave nothing behind a step)
        """Until what the last step has left on its way has arrived: before bytes are counted."""

    def memory_reads(self) -> dict[int, int]:
        """Bytes that this rank has read from the memory of others on its host, by their rank: traffic
        that no connection shows."""
        return {}

    def details(self) -> dict[str, float]:
        """Figures of the implementation's own, counted up since it was made; units in their names."""
        return {}

    def close(self) -> None:  # noqa: B027 (most implementations hold nothing)
        """Frees what outlives the object (hooks, threads); the process group stays."""


def _require_finite(own: Tensor, result: StepResult) -> None:
    """Only a loss that is not finite in the sum costs a look at this rank's own part of it."""
    if math.isfinite(result.loss) and math.isfinite(result.grad_norm):
        return
    if not math.isfinite(result.loss):
        if not math.isfinite(own.item()):
            raise FloatingPointError(f"the loss of this rank's own batch is {own.item()}")
        return  # another rank's; it reports that
    raise FloatingPointError(f"all losses are finite, but the gradient norm is {result.grad_norm}")


BuildModel = Callable[[], nn.Module]
"""Builds the model with the same initial weights on every rank that calls it."""
