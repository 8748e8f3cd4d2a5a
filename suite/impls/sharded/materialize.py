"""Models built on the `meta` device: weights come into being one unit at a time.

A unit is initialised on every rank alike and cut into shards before the next one begins, so that no
rank ever holds the whole model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn

from suite.errors import UsageError
from suite.impls.sharded.units import Unit

Initialize = Callable[[nn.Module], None]
"""Sets a module's parameters and buffers; called as by `nn.Module.apply`, children first, and for a
module around several units once for each: what belongs to others is on `meta` meanwhile."""


class Materializer:
    """Brings what a model has on `meta` into being; the engine calls `materialize` for each unit, then
    `finish`.

    A module's initialisation may set what modules inside it own (that of attention in GPT-2 and T5),
    so every module around a unit's weights is called. All other weights are hidden from it: sharded
    ones have no memory, and none may change.
    """

    def __init__(self, model: nn.Module, device: torch.device, initialize: Initialize | None) -> None:
        """Collective, where something is on `meta`. Without `initialize` the modules' `reset_parameters`
        are used and, inside of a Hugging Face model, its own initialisation after them."""
        self._model, self._device = model, device
        on_meta = {parameter for parameter in model.parameters() if parameter.is_meta}
        self._calls = [
            (call, module, on_meta.intersection(module.parameters()))
            for call, module in _initializations(model, initialize)
        ]
        self._buffers = _allocate_buffers(model, device)
        self._seed = _common_seed(device) if on_meta or self._buffers else 0

    def materialize(self, unit: Unit) -> None:
        """Gives a unit's parameters on `meta` memory and values, the same on every rank; others are left
        as they are. Raises UsageError for a parameter that nothing sets."""
        waiting = {slot.parameter: slot.name for slot in unit.slots if slot.parameter.is_meta}
        if not waiting:
            return
        for parameter in waiting:
            unset = torch.full_like(parameter, torch.nan, device=self._device)
            # Swapped, not replaced: the optimizer and tied modules go on holding the same object.
            torch.utils.swap_tensors(parameter, _with_values(parameter, unset))
        calls = [(call, module) for call, module, held in self._calls if not held.isdisjoint(waiting)]
        self._initialize(calls, waiting, 1 + unit.index)
        for parameter, name in waiting.items():
            if parameter.isnan().any():
                raise UsageError(
                    f"parameter {name} is on the meta device and no module's initialisation sets all of it; "
                    "pass initialize="
                )

    def finish(self) -> None:
        """Fills what the initialisation of parameters has not: buffers of modules without any (rotary
        positions, say). Raises UsageError for a buffer that nothing sets."""
        left = {module for module, _ in self._buffers}
        calls = [(call, module) for call, module, held in self._calls if module in left and not held]
        if calls:
            self._initialize(calls, (), 0)
        names = {module: name for name, module in self._model.named_modules()}
        for module, unset in self._buffers:
            for name in unset:
                if _is_unset(module._buffers[name], unset[name]):
                    owner = names[module] or type(module).__name__
                    raise UsageError(
                        f"buffer {name} of {owner} is on the meta device and its module's initialisation "
                        "leaves it alone; pass initialize="
                    )

    def _initialize(
        self, calls: list[tuple[Initialize, nn.Module]], visible: Collection[nn.Parameter], number: int
    ) -> None:
        """The ranks draw the same random numbers, which `number` chooses."""
        devices = [self._device] if self._device.type != "cpu" else []
        kind = self._device.type if devices else "cuda"
        with torch.random.fork_rng(devices, device_type=kind), torch.no_grad(), _only(self._model, visible):
            torch.manual_seed(self._seed + number)
            for call, module in calls:
                call(module)


def _initializations(
    model: nn.Module, initialize: Initialize | None
) -> Iterator[tuple[Initialize, nn.Module]]:
    """What is to be called for which module, in this order: as when the model is built elsewhere."""
    order = list(_in_post_order(model, None, set()))
    for module, _ in order:
        if initialize is not None:
            yield initialize, module
        elif callable(getattr(module, "reset_parameters", None)):
            yield _reset, module
    for module, pretrained in order:
        if initialize is None and pretrained is not None:
            yield pretrained, module


def _reset(module: nn.Module) -> None:
    module.reset_parameters()  # type: ignore[operator]


def _in_post_order(
    module: nn.Module, pretrained: Initialize | None, seen: set[nn.Module]
) -> Iterator[tuple[nn.Module, Initialize | None]]:
    """Every module once, children first, with the initialisation of the innermost model around it that
    has one for all of its modules, as Hugging Face's have (they may contain each other)."""
    seen.add(module)
    own = getattr(module, "_init_weights", None)
    if callable(own) and _takes_one(own):
        pretrained = own
    for child in module.children():
        if child not in seen:
            yield from _in_post_order(child, pretrained, seen)
    yield module, pretrained


def _takes_one(method: Callable[..., object]) -> bool:
    """Whether it can be called with a module: some are for their own alone, and take nothing."""
    try:
        inspect.signature(method).bind(None)
    except TypeError:
        return False
    return True


@contextmanager
def _only(model: nn.Module, visible: Collection[nn.Parameter]) -> Iterator[None]:
    """All other parameters are on `meta` meanwhile, where initialisation has no effect; so are tied ones
    everywhere but in the first of their modules, which is the one that would have set them."""
    shown: set[nn.Parameter] = set()
    hidden = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if parameter in visible and parameter not in shown:
                shown.add(parameter)
            else:
                hidden.append((module, name, parameter))
    for module, name, parameter in hidden:
        module._parameters[name] = _with_values(parameter, torch.empty_like(parameter, device="meta"))
    try:
        yield
    finally:
        for module, name, parameter in hidden:
            module._parameters[name] = parameter


def _with_values(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    """Another parameter, with these values and what the model has noted at this one ("do not decay")."""
    other = nn.Parameter(values, parameter.requires_grad)
    other.__dict__.update(parameter.__dict__)
    return other


def _common_seed(device: torch.device) -> int:
    """Rank 0's; collective."""
    seed = torch.tensor(torch.initial_seed() % 2**31).to(device)
    dist.broadcast(seed, 0)
    return int(seed)


def _allocate_buffers(model: nn.Module, device: torch.device) -> list[tuple[nn.Module, dict[str, Tensor]]]:
    """Gives buffers on `meta` memory, filled with what no initialisation leaves there; returns their
    modules and how these buffers look until something sets them."""
    waiting = []
    for module in model.modules():
        unset = {
            name: _unset(buffer, device)
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_meta
        }
        module._buffers.update({name: buffer.clone() for name, buffer in unset.items()})
        if unset:
            waiting.append((module, unset))
    return waiting


def _unset(buffer: Tensor, device: torch.device) -> Tensor:
    if buffer.dtype is torch.bool:
        return torch.zeros_like(buffer, device=device)  # no value is left over: taken for what is meant
    counted = not (buffer.is_floating_point() or buffer.is_complex())
    value = torch.iinfo(buffer.dtype).max if counted else torch.nan
    return torch.full_like(buffer, value, device=device)


def _is_unset(buffer: Tensor | None, unset: Tensor) -> bool:
    checkable = unset.numel() and unset.dtype is not torch.bool
    return bool(checkable) and torch.equal(_comparable(buffer), _comparable(unset))


def _comparable(buffer: Tensor | None) -> Tensor:
    assert buffer is not None
    if buffer.is_complex():
        return _comparable(torch.view_as_real(buffer))
    return buffer.nan_to_num(nan=torch.finfo(buffer.dtype).min) if buffer.is_floating_point() else buffer
