"""The optimizer over the arenas: any element-wise `torch.optim` optimizer, norm, clipping, scaling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from suite.impls.sharded.units import ALIGNMENT, Bucket, Unit


def rebind(optimizer: torch.optim.Optimizer, units: Sequence[Unit]) -> list[tuple[Tensor, Tensor]]:
    """Points an optimizer that was made for the model's parameters at what this rank owns of them;
    returns (values, gradient) of all that it steps from now on.

    Groups and their settings stay, so learning-rate schedulers go on working. Raises ValueError when
    the optimizer has already stepped (its states would belong to the whole parameters), and for one
    that is not element-wise.
    """
    if isinstance(optimizer, NOT_ELEMENT_WISE):
        raise ValueError(
            f"{type(optimizer).__name__} looks at whole parameters, of which a rank has only parts; "
            "use an element-wise optimizer such as AdamW"
        )
    initial = _initial_states(optimizer)
    group_of = {
        parameter: number
        for number, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }
    ranges: list[list[Range]] = [[] for _ in optimizer.param_groups]
    for bucket in sorted((b for unit in units for b in unit.buckets if b.trainable), key=_address):
        for begin, end, parameter in _owned(bucket):
            if parameter in group_of:
                _extend(ranges[group_of[parameter]], Range(bucket, begin, end))
    optimized: list[tuple[Tensor, Tensor]] = []
    for group, members in zip(optimizer.param_groups, ranges, strict=True):
        pairs = [member.values_and_gradient() for member in members]
        group["params"] = [values for values, _ in pairs]
        optimized += pairs
    for values, _ in optimized if initial else ():
        optimizer.state[values] = {key: _spread(value, values) for key, value in initial.items()}
    return optimized


NOT_ELEMENT_WISE: tuple[type[torch.optim.Optimizer], ...] = tuple(
    getattr(torch.optim, name)
    for name in ("LBFGS", "Adafactor", "Muon", "SparseAdam")
    if hasattr(torch.optim, name)  # not all are in every version
)


def _initial_states(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimizer gives every parameter before the first step (Adagrad does), by its name; each
    one value throughout. Raises ValueError when there is more, and clears it."""
    states = [dict(state) for state in optimizer.state.values()]
    for key, value in (item for state in states for item in state.items()):
        first = states[0].get(key)
        if not isinstance(value, Tensor) or first is None or value.ne(first.flatten()[:1]).any():
            raise ValueError("the optimizer has states already; shard the model before the first step")
    if any(float(state.get("step", torch.ones(()))) for state in states):
        raise ValueError("the optimizer has states already; shard the model before the first step")
    optimizer.state.clear()
    return states[0] if states else {}


def _spread(value: Tensor, over: Tensor) -> Tensor:
    return value.clone() if value.dim() == 0 else torch.full_like(over, value.flatten()[0].item())


@dataclass
class Range:
    """Elements [begin, end) of a bucket's master, running on into later buckets of the same arena."""

    bucket: Bucket
    begin: int
    end: int

    def values_and_gradient(self) -> tuple[Tensor, Tensor]:
        """The masters of this range as one tensor, and what the gradients' arena holds for them."""
        master, gradient = self.bucket.master, self.bucket.owned_gradient
        assert gradient is not None
        return _window(master, self.begin, self.end), _window(gradient, self.begin, self.end)

    def adjoins(self, other: Range) -> bool:
        ours, theirs = self.bucket.master, other.bucket.master
        same = ours.untyped_storage().data_ptr() == theirs.untyped_storage().data_ptr()
        return same and ours.storage_offset() + self.end == theirs.storage_offset() + other.begin


def _window(shard: Tensor, begin: int, end: int) -> Tensor:
    return torch.as_strided(shard, (end - begin,), (1,), shard.storage_offset() + begin)


def _extend(ranges: list[Range], new: Range) -> None:
    if ranges and ranges[-1].adjoins(new):
        ranges[-1].end += new.end - new.begin
    else:
        ranges.append(new)


def _address(bucket: Bucket) -> tuple[int, int]:
    return bucket.master.untyped_storage().data_ptr(), int(bucket.master.storage_offset())


def _owned(bucket: Bucket) -> list[tuple[int, int, nn.Parameter]]:
    """(begin, end, parameter) within the master; padding counts to the parameter before it, so that
    the ranges of neighbouring buckets run on into each other."""
    first, last = bucket.first, bucket.first + len(bucket.master)
    owned = []
    for number, slot in enumerate(bucket.slots):
        is_last = number == len(bucket.slots) - 1
        slot_end = len(bucket.full) if is_last else slot.offset + slot.numel
        begin, end = max(slot.offset, first), min(slot_end, last)
        if begin < end:
            owned.append((begin - first, end - first, slot.parameter))
    return owned


def sum_of_squares(gradients: Sequence[Tensor]) -> Tensor:
    """This rank's part of the squared gradient norm: one pass per allocation, no host wait.

    Taken row by row: one vector_norm over millions of fp32 numbers is off by 4e-4 on the CPU
    (docs/findings.md).
    """
    rows = [torch.linalg.vector_norm(shard.view(-1, ALIGNMENT), dim=1) for shard in gradients]
    return torch.stack([row.square().sum() for row in rows]).sum()


def sum_of_squares_per_tensor(gradients: Sequence[Tensor]) -> Tensor:
    """The same as it was done before: a norm per tensor, each brought to the host (Z7)."""
    total = sum(shard.norm().item() ** 2 for shard in gradients)
    return torch.tensor(total, dtype=torch.float32, device=gradients[0].device)


def rescale(gradients: Sequence[Tensor], norm: Tensor, limit: float | None, scale: float) -> None:
    """Takes the loss scale out of the gradients and scales them down to `limit` where their norm
    (without that scale) exceeds it; no host wait."""
    factor = torch.ones_like(norm) if limit is None else (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(list(gradients), factor / scale)


@dataclass
class LossScale:
    """Dynamic loss scaling for fp16: small gradients are lifted above its smallest numbers.

    An overflow anywhere skips the step everywhere and halves the scale; `interval` steps without one
    double it.
    """

    value: float = 2.0**16
    interval: int = 2000
    good_steps: int = 0

    def update(self, overflow: bool) -> None:
        """After each step."""
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.value /= 2
        elif self.good_steps == self.interval:
            self.value *= 2
            self.good_steps = 0
