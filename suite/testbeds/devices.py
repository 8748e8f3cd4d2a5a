"""Which device a rank computes on, and the process-group backend that serves it."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from suite.errors import UsageError


def stay_off_devices() -> None:
    """To be called in a parent that forks ranks, before anything asks whether there is a GPU: torch
    then counts them without starting CUDA, which a forked process could not use any more."""
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")


def accelerator_type() -> str | None:
    """`cuda`, say; None on a host without one, also where torch has been built for it."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return None if accelerator is None else accelerator.type


def require_devices(ranks_on_host: int) -> None:
    """Raises UsageError unless each rank can have an accelerator of its own, where there is any:
    collectives between two ranks on one device do not exist."""
    if accelerator_type() is None:
        return
    count = torch.accelerator.device_count()
    if ranks_on_host > count:
        raise UsageError(
            f"{ranks_on_host} ranks need an accelerator each, and this host has {count}; "
            f"use testbed.ranks={count}, or hide them (CUDA_VISIBLE_DEVICES=) to run on the CPU"
        )


def claim_device(index: int) -> tuple[torch.device, str]:
    """(device, backend) of a host's rank number `index`, which this process then is; LOCAL_RANK says so
    to the libraries that look there.

    The backend serves tensors of the CPU, too: checks and checkpoints send some.
    """
    kind = accelerator_type()
    if kind is None:
        return on_the_cpu(index)
    device = torch.device(kind, index)
    torch.accelerator.set_device_index(index)
    os.environ["LOCAL_RANK"] = str(index)
    return device, f"{kind}:{dist.get_default_backend_for_device(device)},cpu:gloo"


def on_the_cpu(index: int) -> tuple[torch.device, str]:
    """The same for ranks that leave accelerators alone."""
    return torch.device("cpu"), "gloo"


def bound(device: torch.device) -> torch.device | None:
    """`device_id` of `init_process_group`: an accelerator's communicators are then made at once, groups
    are split off from them, and a barrier knows where to run."""
    return None if device.type == "cpu" else device
