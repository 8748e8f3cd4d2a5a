"""Models built on the `meta` device: weights come into being one unit at a time.

A unit is initialised on every rank alike and cut into shards before the next one begins, so that no
rank ever holds the whole model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from suite.impls.sharded.units import Unit

Initialize = Callable[[nn.Module], None]
"""Sets the parameters and buffers that a module itself owns (not those of its children)."""


MetaBuffers = list[tuple[nn.Module, dict[str, Tensor]]]
"""Modules whose buffers were on `meta`, and how these look while nothing has filled them."""


def allocate_buffers(model: nn.Module, device: torch.device) -> MetaBuffers:
    """Gives buffers on `meta` memory, filled with what no initialisation leaves there."""
    waiting = []
    for module in model.modules():
        empty = {
            name: _unset(buffer, device)
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_meta
        }
        module._buffers.update({name: buffer.clone() for name, buffer in empty.items()})
        if empty:
            waiting.append((module, empty))
    return waiting


def initialize_buffers(model: nn.Module, buffers: MetaBuffers, initialize: Initialize | None) -> None:
    """Fills what the initialisation of parameters has not: modules that own buffers alone (rotary
    positions, say). Raises ValueError for a buffer that nothing fills."""
    names = {id(module): name for name, module in model.named_modules()}
    for module, empty in buffers:
        if not any(True for _ in module.parameters(recurse=False)):
            with torch.no_grad():
                (initialize or _initializer(model, module))(module)
        for name, before in empty.items():
            checkable = before.numel() and before.dtype is not torch.bool
            if checkable and torch.equal(_comparable(module._buffers[name]), _comparable(before)):
                owner = names[id(module)] or type(module).__name__
                raise ValueError(
                    f"buffer {name} of {owner} is on the meta device and its module's initialisation "
                    "leaves it alone; pass initialize="
                )


def _unset(buffer: Tensor, device: torch.device) -> Tensor:
    if buffer.dtype is torch.bool:
        return torch.zeros_like(buffer, device=device)  # no value is left over: taken for what is meant
    counted = not (buffer.is_floating_point() or buffer.is_complex())
    value = torch.iinfo(buffer.dtype).max if counted else torch.nan
    return torch.full_like(buffer, value, device=device)


def _comparable(buffer: Tensor | None) -> Tensor:
    assert buffer is not None
    if buffer.is_complex():
        return _comparable(torch.view_as_real(buffer))
    return buffer.nan_to_num(nan=torch.finfo(buffer.dtype).min) if buffer.is_floating_point() else buffer


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
