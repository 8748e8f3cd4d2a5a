"""Peak memory of this rank: the accelerator's allocator where there is one, else resident memory."""

from __future__ import annotations

import torch


class PeakMemory:
    """Made before the model is built; what was resident by then (interpreter, libraries) is not
    counted against the implementation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._baseline = 0 if device.type == "cuda" else _status("VmRSS")

    def reset(self) -> None:
        """Forgets the peak so far, so that building the model does not count."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # resets VmHWM (man 5 proc)

    def read(self) -> int:
        """Bytes at the peak since `reset`, above the baseline."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return max(0, _status("VmHWM") - self._baseline)


def _status(key: str) -> int:
    """A field of /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise KeyError(f"/proc/self/status has no {key}")
