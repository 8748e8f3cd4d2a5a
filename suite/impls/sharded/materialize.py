"""Models built on the `meta` device: weights come into being one unit at a time.

A unit is initialised on every rank alike and cut into shards before the next one begins, so that no
rank ever holds the whole model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from suite.impls.sharded.units import Unit

Initialize = Callable[[nn.Module], None]
"""Sets the parameters and buffers that a module itself owns (not those of its children)."""


def materialize_buffers(model: nn.Module, device: torch.device) -> None:
    """Gives buffers on `meta` memory; their modules' initialisation fills them."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[name] = torch.zeros_like(buffer, device=device)


def materialize(model: nn.Module, unit: Unit, device: torch.device, initialize: Initialize | None) -> None:
    """Gives a unit's parameters on `meta` memory and values, the same on every rank; others are left
    as they are. Collective.

    Without `initialize` a module's `reset_parameters` is used, or a Hugging Face model's own
    initialisation. Raises ValueError for a module that has neither.
    """
    waiting = [slot.parameter for slot in unit.slots if slot.parameter.is_meta]
    if not waiting:
        return
    owners = [
        module
        for module in unit.module.modules()
        if any(own is parameter for own in module.parameters(recurse=False) for parameter in waiting)
    ]
    for parameter in waiting:
        values = torch.zeros_like(parameter, device=device)
        # Swapped, not replaced: the optimizer and tied modules go on holding the same object.
        torch.utils.swap_tensors(parameter, nn.Parameter(values, parameter.requires_grad))
    seed = torch.tensor(torch.initial_seed() % 2**31 + unit.index)
    seed = seed.to(device)
    dist.broadcast(seed, 0)
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"), torch.no_grad():
        torch.manual_seed(int(seed))
        for module in owners:
            (initialize or _initializer(model, module))(module)


def _initializer(model: nn.Module, module: nn.Module) -> Initialize:
    pretrained = getattr(model, "_init_weights", None)
    if callable(pretrained):
        return pretrained
    if callable(getattr(module, "reset_parameters", None)):
        return lambda item: item.reset_parameters()  # type: ignore[operator]
    raise ValueError(
        f"{type(module).__name__} is on the meta device and has no reset_parameters; pass initialize="
    )
