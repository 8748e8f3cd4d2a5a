"""Which collectives the ranks make, held against each other before each of them.

Ranks that make different collectives hang, or worse, add up what does not belong together. With the
ledger on, each first says what it is about to do (unit, op, bytes) and hears what the others are: the first
difference is reported instead of waited for. It makes every collective wait for all ranks, so it is for
looking for mistakes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from suite.errors import SuiteError


class DesyncError(SuiteError):
    """The ranks do not make the same collectives; raised on every rank that takes part."""


class Ledger:
    """The one that compares nothing."""

    def enter(self, lane: str, op: str, unit: str, nbytes: int) -> None:
        """This rank is about to make that collective. `lane` names the thread that makes it: positions are
        counted in each lane of its own."""


@dataclass
class _Lane:
    store: dist.Store
    position: int = 0
    last: str = "none"


class SharedLedger(Ledger):
    """Kept in the store over which the ranks have found each other; every rank makes one.

    All ranks of the world are compared: partition groups run the same modules in the same order, too.
    """

    def __init__(self, store: dist.Store, rank: int, world_size: int, timeout_s: float) -> None:
        self._store = dist.PrefixStore("collectives", store)
        self._rank, self._world_size = rank, world_size
        self._timeout_s = timeout_s
        self._lanes: dict[str, _Lane] = {}

    def enter(self, lane: str, op: str, unit: str, nbytes: int) -> None:
        """Raises DesyncError when another rank is about to make another one, or does not come."""
        if lane not in self._lanes:
            # A connection each: a lane that waits must not keep another one from speaking.
            self._lanes[lane] = _Lane(dist.PrefixStore(lane, self._store.clone()))  # type: ignore[attr-defined]
        line = self._lanes[lane]
        what = f"{op} of {unit}, {nbytes} bytes"
        keys = [f"{line.position}/{rank}" for rank in range(self._world_size)]
        line.store.set(keys[self._rank], what)
        try:
            line.store.wait(keys, timedelta(seconds=self._timeout_s))
        except dist.DistStoreError as error:
            absent = [rank for rank, key in enumerate(keys) if not line.store.check([key])]
            raise DesyncError(
                f"{_ranks(absent)} did not come to collective {line.position} of the {lane} ({what}) within "
                f"{self._timeout_s:g} s; the last one made there was {line.last}"
            ) from error
        made = [line.store.get(key).decode() for key in keys]
        if len(set(made)) > 1:
            raise DesyncError(f"the ranks differ at collective {line.position} of the {lane}: {_sides(made)}")
        if line.position > 0:  # everybody has read the one before
            line.store.delete_key(f"{line.position - 1}/{self._rank}")
        line.position, line.last = line.position + 1, what


def make_ledger(on: bool, timeout_s: float) -> Ledger:
    """Every rank calls it, after `init_process_group`."""
    if not on:
        return Ledger()
    store = dist.distributed_c10d._get_default_store()
    return SharedLedger(store, dist.get_rank(), dist.get_world_size(), timeout_s)


def _sides(made: Sequence[str]) -> str:
    """Who does what, the few before the many."""
    sides = Counter(made).most_common()[::-1]
    return "; ".join(
        f"{_ranks([rank for rank, what in enumerate(made) if what == side])}: {side}" for side, _ in sides
    )


def _ranks(numbers: Sequence[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
