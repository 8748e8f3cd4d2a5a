"""How much of this machine something else used while we measured."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

from suite.testbeds.local import cores

LIMIT = 0.10
"""Share of the cores beyond which a measurement is marked noisy and taken again."""

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Noise:
    """Shares of the cores that we may use over one measurement, each 0..1.

    `others` is what processes that are not ours used, `steal` what the hypervisor took, `ours` what
    we used ourselves, `interrupts` what the kernel did in them (network packets, mostly). `attempts`
    counts the tries that it took. `busy_limit` bounds the sum of all of them where only a machine with
    time to spare gives a valid measurement.
    """

    others: float
    steal: float
    ours: float
    limit: float
    attempts: int
    interrupts: float = 0.0
    busy_limit: float | None = None

    @property
    def disturbed(self) -> bool:
        """By others."""
        return self.others + self.steal > self.limit

    @property
    def too_busy(self) -> bool:
        busy = self.others + self.steal + self.ours + self.interrupts
        return self.busy_limit is not None and busy > self.busy_limit

    @property
    def noisy(self) -> bool:
        return self.disturbed or self.too_busy

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "noisy": self.noisy}


@dataclass(frozen=True)
class CpuReading:
    """CPU seconds since boot (of the cores that we may use) or since start (ours), at one moment."""

    at_s: float
    busy_s: float
    steal_s: float
    ours_s: float
    interrupts_s: float = 0.0


def read_cpu(pids: Iterable[int]) -> CpuReading:
    """One reading; `pids` and this process are ours, children that they waited for included."""
    user, nice, system, _, _, irq, softirq, steal = _ticks_of(os.sched_getaffinity(0))
    # Interrupt time is kept apart: loopback traffic is handled there and charged to nobody.
    ours = sum(_process_ticks(pid) for pid in {*pids, os.getpid()})
    return CpuReading(
        time.monotonic(),
        (user + nice + system) / _TICKS_PER_S,
        steal / _TICKS_PER_S,
        ours / _TICKS_PER_S,
        (irq + softirq) / _TICKS_PER_S,
    )


def noise_between(before: CpuReading, after: CpuReading, attempts: int, limit: float = LIMIT) -> Noise:
    """What happened between two readings; meaningful from about a second on (ticks of 10 ms)."""
    capacity = max(after.at_s - before.at_s, 1e-9) * cores()
    ours = (after.ours_s - before.ours_s) / capacity
    others = max(0.0, (after.busy_s - before.busy_s) / capacity - ours)
    steal = (after.steal_s - before.steal_s) / capacity
    interrupts = (after.interrupts_s - before.interrupts_s) / capacity
    return Noise(others, steal, ours, limit, attempts, interrupts)


def _ticks_of(ours: Collection[int]) -> list[int]:
    """`user` to `steal` of /proc/stat, summed over these cores."""
    with open("/proc/stat") as file:
        lines = [line.split() for line in file if line.startswith("cpu")]
    ticks = {name: [int(text) for text in values[:8]] for name, *values in lines}
    mine = [f"cpu{core}" for core in ours]
    if not ticks.keys() >= {*mine}:  # a container that shows its own cores alone, under other numbers
        mine = ["cpu"]
    return [sum(column) for column in zip(*(ticks[name] for name in mine), strict=True)]


def _process_ticks(pid: int) -> int:
    with suppress(FileNotFoundError, ProcessLookupError), open(f"/proc/{pid}/stat") as file:
        # The command name may hold spaces and brackets: count fields after its closing one.
        values = file.read().rpartition(")")[2].split()
        return sum(map(int, values[11:15]))
    return 0
