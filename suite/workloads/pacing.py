"""Blocks that take as long as on another device, while they really compute on small shapes.

A paced block sleeps where its compute would be: at the start of its forward (a recomputation in the
backward pass included, which may be cut off once it has what it needs), and at the start of its
backward, when the gradient of its output has arrived and its own gradients are still to be computed.
Collectives that run meanwhile overlap with it as they would with real kernels: sleeping releases the
interpreter lock. What a block has to wait for inside, such as weights that are gathered one by one, is
not hidden by it.

What the training thread really computes belongs to the modelled time: it is taken off the next
sleep, and so is a sleep's overshoot. Otherwise many ranks on few cores would look slower than few ranks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from suite.impls.trace import Kind, Trace
from suite.workloads.scale_model import BlockTimes


class BusyClock:
    """Seconds in which the thread that made it was running or was ready to and had no core: what is
    left of wall time is waiting, for messages or in sleep. Without the kernel's scheduling
    statistics (CONFIG_SCHED_INFO) only the running counts."""

    def __init__(self) -> None:
        self._statistics: int | None = None
        with suppress(OSError):
            self._statistics = os.open("/proc/thread-self/schedstat", os.O_RDONLY)

    def read(self) -> float:
        """Only for the thread that made the clock."""
        ready_s = 0.0
        if self._statistics is not None:
            ready_s = int(os.pread(self._statistics, 100, 0).split()[1]) / 1e9
        return time.thread_time() + ready_s


@dataclass(frozen=True)
class PacedStep:
    """One step on one rank. `computing_s`: host seconds in which the training thread computed or slept
    instead, rather than waited. `sent_bytes` left its node in the step, `sent_computing_bytes` of them
    while the thread slept for a block's compute."""

    computing_s: float
    sent_bytes: int
    sent_computing_bytes: int


class Pacer:
    """Spends the modelled times of one rank's blocks, on the thread that made it.

    `sent` reads how many bytes have left this rank's node. Counted over all steps: `modelled_s`, what
    the blocks asked for, and `overshoot_s`, by how much the compute of each step took longer than that.
    """

    def __init__(self, times: BlockTimes, trace: Trace, sent: Callable[[], int] = lambda: 0) -> None:
        self.times = times
        self.modelled_s = 0.0
        self.overshoot_s = 0.0
        self._trace = trace
        self._sent = sent
        self._sent_before = 0
        self._sent_computing = 0
        self._clock = BusyClock()
        self._counted_until = 0.0
        self._computing_s = 0.0  # in this step: sleep, and real work of the thread
        self._ahead_s = 0.0  # in this step: by how much that exceeds what has been modelled
        self.start_step()

    def pace(self, blocks: Iterable[nn.Module]) -> None:
        """From now on these modules are paced. Their names, parameters and results stay the same; an
        implementation may wrap, shard, checkpoint and differentiate them like any others."""
        blocks = list(blocks)
        paced = {kind: _paced(kind) for kind in map(type, blocks)}
        for index, block in enumerate(blocks):
            block._pacing = _Pacing(self, str(index))  # type: ignore[assignment]
            block.__class__ = paced[type(block)]

    def start_step(self) -> None:
        self._counted_until = self._clock.read()
        self._computing_s = self._ahead_s = 0.0
        self._sent_before, self._sent_computing = self._read_link(), 0

    def spend(self, seconds: float, name: str) -> None:
        """Returns when a block's compute of that length would be done."""
        self._count_work()
        sent, start = self._read_link(), self._trace.now()
        time.sleep(max(0.0, seconds - self._ahead_s))
        slept_s = self._trace.now() - start
        self._trace.add(Kind.COMPUTE, name, start)
        self._sent_computing += self._read_link() - sent
        self.modelled_s += seconds
        self._computing_s += slept_s
        self._ahead_s += slept_s - seconds
        self._counted_until = self._clock.read()

    def end_step(self) -> PacedStep:
        self._count_work()
        self.overshoot_s += self._ahead_s
        return PacedStep(self._computing_s, self._read_link() - self._sent_before, self._sent_computing)

    def _read_link(self) -> int:
        sent = self._sent()
        self._trace.mark(sent)
        return sent

    def _count_work(self) -> None:
        now = self._clock.read()
        self._computing_s += now - self._counted_until
        self._ahead_s += now - self._counted_until
        self._counted_until = now


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
