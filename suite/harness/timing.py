"""How long a step took, by the clock of whatever computed it."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Elapsed:
    """`host_s` by this process' clock; `device_s` by the accelerator's own, between two events on the
    current stream; None on the CPU."""

    host_s: float
    device_s: float | None

    @property
    def seconds(self) -> float:
        """The device's where there is one: what the host does before the first and after the last
        kernel is not in it, waking up the host least of all."""
        return self.host_s if self.device_s is None else self.device_s


class Stopwatch:
    """Times what one thread does, and has an accelerator do, between `start` and `stop`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._events: tuple[torch.Event, torch.Event] | None = None
        if device.type != "cpu":
            self._events = (torch.Event(device, enable_timing=True), torch.Event(device, enable_timing=True))
        self._started = 0.0

    def start(self) -> None:
        """Waits for the device first: what was queued before is not timed."""
        synchronize(self._device)
        self._started = time.perf_counter()
        if self._events is not None:
            self._events[0].record()

    def stop(self) -> Elapsed:
        """Waits for the device: all that was queued on the current stream is timed, and what that
        stream waits for."""
        if self._events is None:
            return Elapsed(time.perf_counter() - self._started, None)
        first, last = self._events
        last.record()
        synchronize(self._device)
        host_s = time.perf_counter() - self._started
        return Elapsed(host_s, first.elapsed_time(last) / 1e3)


def synchronize(device: torch.device) -> None:
    """Returns when the device has done all that it was given; at once on the CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
