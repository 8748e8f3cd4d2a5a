"""What a testbed offers: ranks that run one program, and calls that reach all of them at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from suite.testbeds.whereabouts import Whereabouts


@dataclass(frozen=True)
class RankContext:
    """What a rank knows when its program starts; the process group is already initialised."""

    rank: int
    world_size: int
    ranks_per_node: int
    device: torch.device
    whereabouts: Whereabouts = field(default_factory=Whereabouts)
    """Where the program may tell what it is doing: a failure then names it, and a rank that tells
    something new is not taken for one that hangs."""

    def barrier(self) -> None:
        dist.barrier()


Program = Callable[[RankContext], Any]
"""Called once on every rank; the object that it returns then answers `Ranks.call` on that rank."""


class Ranks(Protocol):
    """Running ranks. Only the process that launched them may call."""

    def call(self, method: str, *arguments: Any, timeout_s: float) -> list[Any]:
        """Runs that method of every rank's program object, on all ranks at the same time.

        Returns the answers in rank order. Raises RankError when a rank raised (with its traceback),
        died, or when for `timeout_s` no rank that still owes its answer has made any progress (with the
        stacks); all ranks have ended then.
        """
        ...

    def pids(self) -> list[int]:
        """Process ids in rank order, for accounting."""
        ...


class Testbed(ABC):
    """A place where ranks can run."""

    __test__ = False

    evidence: str
    """What a number taken here is: `measured`, `emulated` or `projected`."""

    device_type: str | None = None
    """Of the ranks; None means an accelerator where there is one, else the CPU."""

    busy_limit: float | None = None
    """Share of this machine's cores beyond which times taken here are those of the machine rather
    than of what is measured; None where the machine is what is measured."""

    @abstractmethod
    def launch(self, program: Program, startup_timeout_s: float) -> AbstractContextManager[Ranks]:
        """Starts `program` on every rank; leaving the context ends all of them, whatever happened."""

    def everywhere(self, function: Callable[[], None]) -> None:
        """Runs it in every process from which ranks will be forked: imports, caches. `function` must be
        picklable."""
        function()

    def conditions(self) -> dict[str, Any]:
        """What a result taken here depends on beyond its configuration and this machine."""
        return {}

    def notes(self) -> list[str]:
        """What a reader of a number taken here has to know."""
        return []
