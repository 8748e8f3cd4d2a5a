"""The optimizer over the arenas: any element-wise `torch.optim` optimizer, norm, clipping, scaling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from suite.impls.sharded.units import ALIGNMENT, Bucket, Unit


def rebind(optimizer: torch.optim.Optimizer, units: Sequence[Unit], index: int) -> None:
    """Points an optimizer that was made for the model's parameters at this rank's shards of them.

    Groups and their settings stay, so learning-rate schedulers go on working. Raises ValueError when
    the optimizer has already stepped: its states would belong to the whole parameters.
    """
    if optimizer.state:
        raise ValueError("the optimizer has states already; shard the model before the first step")
    group_of = {
        parameter: number
        for number, group in enumerate(optimizer.param_groups)
        for parameter in group["params"]
    }
    ranges: list[list[Range]] = [[] for _ in optimizer.param_groups]
    for bucket in sorted((b for unit in units for b in unit.buckets if b.trainable), key=_address):
        for begin, end, parameter in _owned(bucket, index):
            if parameter in group_of:
                _extend(ranges[group_of[parameter]], Range(bucket, begin, end))
    for group, members in zip(optimizer.param_groups, ranges, strict=True):
        group["params"] = [member.parameter() for member in members]


@dataclass
class Range:
    """Elements [begin, end) of a bucket's shard, running on into later buckets of the same arena."""

    bucket: Bucket
    begin: int
    end: int

    def parameter(self) -> Tensor:
        """The masters of this range as one tensor, its gradient bound to the gradients' arena."""
        master, gradient = self.bucket.master, self.bucket.gradient
        assert gradient is not None
        values = _window(master, self.begin, self.end)
        values.grad = _window(gradient, self.begin, self.end)
        return values

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


def _owned(bucket: Bucket, index: int) -> list[tuple[int, int, nn.Parameter]]:
    """(begin, end, parameter) within shard `index`; padding counts to the parameter before it, so
    that the ranges of neighbouring buckets run on into each other."""
    first, last = index * bucket.shard_numel, (index + 1) * bucket.shard_numel
    owned = []
    for number, slot in enumerate(bucket.slots):
        is_last = number == len(bucket.slots) - 1
        slot_end = len(bucket.full) if is_last else slot.offset + slot.numel
        begin, end = max(slot.offset, first), min(slot_end, last)
        if begin < end:
            owned.append((begin - first, end - first, slot.parameter))
    return owned


def gradient_norm(gradients: Sequence[Tensor], group: dist.ProcessGroup | None, size: int) -> Tensor:
    """Global L2 norm from the shards: one pass per allocation, one all-reduce, no host wait.

    Taken row by row: one vector_norm over millions of fp32 numbers is off by 4e-4 on the CPU
    (docs/findings.md).
    """
    rows = [torch.linalg.vector_norm(shard.view(-1, ALIGNMENT), dim=1) for shard in gradients]
    square = torch.stack([row.square().sum() for row in rows]).sum()
    if size > 1:
        dist.all_reduce(square, group=group)
    return square.sqrt()


def gradient_norm_per_tensor(
    gradients: Sequence[Tensor], group: dist.ProcessGroup | None, size: int
) -> Tensor:
    """The same as it was done before: a norm per tensor, each brought to the host (Z7)."""
    total = sum(shard.norm().item() ** 2 for shard in gradients)
    square = torch.tensor([total], dtype=torch.float32, device=gradients[0].device)
    if size > 1:
        dist.all_reduce(square, group=group)
    return square.sqrt().squeeze(0)


def scale_to_norm(gradients: Sequence[Tensor], norm: Tensor, limit: float) -> None:
    """Scales the gradients down to `limit` where the norm exceeds it; no host wait."""
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(list(gradients), factor)
