"""Peak memory of this rank: the accelerator's allocator where there is one, else resident memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch


class PeakMemory:
    """Made before the model is built; what was resident by then (interpreter, libraries) is not
    counted against the implementation."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._on_cpu = device.type == "cpu"
        self._baseline = _status("VmRSS") if self._on_cpu else 0

    def reset(self) -> None:
        """Forgets the peak so far, so that building the model does not count."""
        if self._on_cpu:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # resets VmHWM (man 5 proc)
        else:
            torch.accelerator.reset_peak_memory_stats(self._device)
            torch.accelerator.reset_accumulated_memory_stats(self._device)

    def read(self) -> int:
        """Bytes at the peak since `reset`, above the baseline; on an accelerator those of tensors."""
        if self._on_cpu:
            return max(0, _status("VmHWM") - self._baseline)
        return torch.accelerator.max_memory_allocated(self._device)

    def allocator(self) -> dict[str, float]:
        """What the accelerator's caching allocator did since `reset`; empty on the CPU."""
        return {} if self._on_cpu else allocator_figures(torch.accelerator.memory_stats(self._device))


def allocator_figures(stats: Mapping[str, int]) -> dict[str, float]:
    """From torch's `memory_stats`:

    - `peak_allocated_bytes`: most that tensors took; `peak_reserved_bytes`: most that the allocator
      took from the device for them.
    - `fragmentation`: the share of the reserved bytes that lay in pieces of split blocks with nothing in
      them, at its worst: memory that a large tensor cannot have (S1's reason for contiguous arenas).
    - `alloc_retries`: how often it had to give all it had cached back to the device and try again,
      which waits for the device; `ooms`: how often that did not help.
    """
    reserved = stats.get("reserved_bytes.all.peak", 0)
    split = stats.get("inactive_split_bytes.all.peak", 0)
    return {
        "peak_allocated_bytes": float(stats.get("allocated_bytes.all.peak", 0)),
        "peak_reserved_bytes": float(reserved),
        "fragmentation": split / reserved if reserved else 0.0,
        "alloc_retries": float(stats.get("num_alloc_retries", 0)),
        "ooms": float(stats.get("num_ooms", 0)),
    }


def _status(key: str) -> int:
    """A field of /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise KeyError(f"/proc/self/status has no {key}")
