"""Blocks that take as long as on another device, while they really compute on small shapes.

A paced block sleeps where its compute would be: at the start of its forward (a recomputation in the
backward pass included, which may be cut off once it has what it needs), and at the start of its
backward, when the gradient of its output has arrived and its own gradients are still to be computed.
Collectives that run meanwhile overlap with it as they would with real kernels: sleeping releases the
interpreter lock. What the block really computes comes on top, and what it has to wait for inside,
such as weights that are gathered one by one, is not hidden by it.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from suite.impls.trace import Kind, Trace
from suite.workloads.scale_model import BlockTimes


class Pacer:
    """Spends the modelled times of one rank's blocks and keeps count: `modelled_s` is what was asked
    for, `spent_s` what the sleeps really took (never less)."""

    def __init__(self, times: BlockTimes, trace: Trace) -> None:
        self.times = times
        self.modelled_s = 0.0
        self.spent_s = 0.0
        self._trace = trace

    def pace(self, blocks: Iterable[nn.Module]) -> None:
        """From now on these modules are paced. Their names, parameters and results stay the same; an
        implementation may wrap, shard, checkpoint and differentiate them like any others."""
        blocks = list(blocks)
        paced = {kind: _paced(kind) for kind in map(type, blocks)}
        for index, block in enumerate(blocks):
            block._pacing = _Pacing(self, str(index))  # type: ignore[assignment]
            block.__class__ = paced[type(block)]

    def spend(self, seconds: float, name: str) -> None:
        start = self._trace.now()
        time.sleep(seconds)
        self.modelled_s += seconds
        self.spent_s += self._trace.now() - start
        self._trace.add(Kind.COMPUTE, name, start)


@dataclass(frozen=True)
class _Pacing:
    """What one block knows of its pace."""

    pacer: Pacer
    name: str

    def forward(self) -> None:
        # Inside a running backward pass a forward is a recomputation.
        again = torch._C._current_graph_task_id() != -1
        phase = "recompute" if again else "forward"
        self.pacer.spend(self.pacer.times.forward_s, f"{phase} {self.name}")

    def backward(self) -> None:
        self.pacer.spend(self.pacer.times.backward_s, f"backward {self.name}")


def _paced(block_class: type[nn.Module]) -> type[nn.Module]:
    """A subclass rather than a wrapper or hooks: a wrapper would change the parameters' names, and
    hooks would run outside of what activation checkpointing repeats."""

    def forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
        self._pacing.forward()
        return _with_backward(block_class.forward(self, *arguments, **keywords), self._pacing)

    return type(f"Paced{block_class.__name__}", (block_class,), {"forward": forward})


def _with_backward(output: Any, pacing: _Pacing) -> Any:
    """The block's output (a tensor, or a tuple that starts with one) through the backward sleep."""
    if isinstance(output, tuple):
        return (_with_backward(output[0], pacing), *output[1:])
    return _SleepInBackward.apply(output, pacing)


class _SleepInBackward(torch.autograd.Function):
    """The identity."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, pacing: _Pacing) -> Tensor:
        ctx.pacing = pacing
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        ctx.pacing.backward()
        return gradient, None
