"""Units, buckets and arenas: how a model's parameters become shards of flat buffers.

A *unit* is what is gathered and released together, normally one transformer block. Its parameters
lie in *buckets*, the flat buffers that collectives move: one for all (or, uncoalesced, one per
parameter), frozen parameters apart. All of a rank's shards of one kind (master weights, compute
copy, gradients) lie in one *arena*.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from suite.errors import UsageError

ALIGNMENT = 64
"""Shards are a multiple of this many elements: 128 bytes or more, as wide loads like it."""


@dataclass
class Slot:
    """A parameter's place in its bucket: elements [offset, offset + numel) of the flat buffer."""

    name: str
    parameter: nn.Parameter
    offset: int
    numel: int
    shape: torch.Size


@dataclass
class Bucket:
    """A flat buffer of `partition_size * shard_numel` elements, of which this rank keeps one shard.

    Of its shard it *owns*, which is to say updates, everything; or, when the optimizer is sharded
    over the whole world, one of as many equal parts as there are replicas.

    `full` always is the same tensor and its storage is what comes and goes: autograd saves views of
    gathered weights, and a view must see the weights again when its unit is gathered for backward.
    """

    slots: list[Slot]
    shard_numel: int
    trainable: bool
    full: Tensor
    """Compute dtype, [partition_size * shard_numel]; without memory while released."""
    first: int = field(init=False)
    """Where in the full buffer the owned elements begin."""
    master: Tensor = field(init=False)
    """fp32 [owned], what the optimizer updates."""
    compute: Tensor = field(init=False)
    """[shard_numel] in the compute dtype, what is gathered; in fp32 the master itself, if it is all."""
    gradient: Tensor | None = field(init=False, default=None)
    """fp32 [shard_numel], the sum over micro-steps so far; None when frozen."""
    owned_gradient: Tensor | None = field(init=False, default=None)
    """fp32 [owned], what the optimizer sees; `gradient` itself when that is all owned."""
    has_gradient: bool = field(init=False, default=False)
    """Whether `gradient` holds something of this step, rather than of the last."""
    synchronized: bool = field(init=False, default=False)
    """Whether `gradient` is, or is about to be, summed over the replicas."""

    @property
    def owned_compute(self) -> Tensor:
        """The owned elements of `compute`, a view."""
        return self.compute.narrow(0, self.first % self.shard_numel, len(self.master))

    @property
    def numel(self) -> int:
        """Elements that parameters cover; the rest of the buffer is padding."""
        return sum(slot.numel for slot in self.slots)

    @property
    def nbytes(self) -> int:
        return self.full.numel() * self.full.element_size()

    @property
    def resident(self) -> bool:
        """Whether the shard is the whole buffer, so that nothing ever has to be gathered."""
        return self.full is self.compute

    def allocate(self) -> None:
        if not self.resident:
            self.full.untyped_storage().resize_(self.nbytes)

    def free(self) -> None:
        if not self.resident:
            self.full.untyped_storage().resize_(0)

    @property
    def allocated(self) -> bool:
        return self.full.untyped_storage().size() > 0


@dataclass
class Unit:
    """The parameters of `module` that no inner unit owns."""

    index: int
    name: str
    module: nn.Module
    buckets: list[Bucket]
    compiled: bool = False
    """Whether its forward is one graph."""

    @property
    def nbytes(self) -> int:
        """Gathered size."""
        return sum(bucket.nbytes for bucket in self.buckets)

    @property
    def slots(self) -> Iterator[Slot]:
        return (slot for bucket in self.buckets for slot in bucket.slots)

    def require_as_sharded(self) -> None:
        """Raises UsageError for a parameter that was frozen or thawed since: the optimizer would go on moving
        the one, and does not know of the other."""
        for bucket in self.buckets:
            for slot in bucket.slots:
                if slot.parameter.requires_grad != bucket.trainable:
                    was, is_now = ("trained", "frozen") if bucket.trainable else ("frozen", "trained")
                    raise UsageError(
                        f"{slot.name} was {was} when the model was sharded, and is {is_now} now; set "
                        "requires_grad before that"
                    )


def find_unit_modules(model: nn.Module) -> list[nn.Module]:
    """The modules to gather one by one: what is called in every outermost `ModuleList` (the blocks of
    any stack). What none of them owns goes with the model itself, the root unit."""
    blocks: list[nn.Module] = []
    stacks = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    for name, stack in stacks:
        inside = any(name.startswith(other + ".") for other, _ in stacks if other != name)
        if not inside:
            blocks += [block for child in stack for block in _called(child)]
    return blocks


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """The module or, of a mere container (a list in a list), the modules in it; those with weights."""
    if not can_be_called(module):
        for child in module.children():
            yield from _called(child)
    elif any(True for _ in module.parameters()):
        yield module


def can_be_called(module: nn.Module) -> bool:
    """Whether it has a forward: weights of a module that is never called are never gathered for it."""
    return getattr(module.forward, "__func__", None) is not nn.Module.forward


def name_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Each shared parameter once, under the name that torch itself gives it."""
    return dict(model.named_parameters())


def assign_parameters(model: nn.Module, modules: Sequence[nn.Module]) -> list[tuple[nn.Module, list[str]]]:
    """Which parameters each unit owns: the root (the model itself) first, then `modules` in order.

    A parameter belongs to the innermost unit around it; one that several units use (tied embeddings)
    to the root, which is gathered for as long as any of them runs. Raises ValueError for a module
    that is not a part of the model.
    """
    unit_of: dict[nn.Module, int] = {}
    for index, module in enumerate(modules, 1):
        unit_of.setdefault(module, index)
    users: dict[nn.Parameter, set[int]] = {}
    unit_at = {"": 0}
    for path, part in model.named_modules(remove_duplicate=False):
        if path:
            unit_at[path] = unit_of.get(part, unit_at[path.rpartition(".")[0]])
        for parameter in part.parameters(recurse=False):
            users.setdefault(parameter, set()).add(unit_at[path])
    parts = set(model.modules())
    for module in unit_of:
        if module not in parts:
            raise ValueError(f"unit_modules: a {type(module).__name__} is not a part of the model")
    assigned: list[tuple[nn.Module, list[str]]] = [(model, []), *((module, []) for module in modules)]
    for name, parameter in name_parameters(model).items():
        units = users[parameter]
        assigned[units.pop() if len(units) == 1 else 0][1].append(name)
    return [(module, names) for module, names in assigned if names]


def build_units(
    model: nn.Module,
    modules: Sequence[nn.Module],
    partition_size: int,
    parts: int,
    compute_dtype: torch.dtype,
    device: torch.device,
    coalesced: bool,
    group_of: Mapping[nn.Parameter, int],
) -> list[Unit]:
    """The units of a model, with buckets laid out and nothing moved yet.

    Shards can be divided into `parts` equal parts.

    In a unit the parameters of one optimizer group (`group_of`) lie together, so that the optimizer
    sees few ranges, and small ones before large ones, so that they can be sent in one message.
    """
    names = {id(module): name for name, module in model.named_modules()}
    parameters = name_parameters(model)

    def place(name: str) -> tuple[int, int]:
        return group_of.get(parameters[name], len(group_of)), parameters[name].numel()

    units: list[Unit] = []
    for module, owned in assign_parameters(model, modules):
        ordered = sorted(owned, key=place)
        buckets = [
            _layout(members, parameters, partition_size, parts, compute_dtype, device)
            for members in _groups(ordered, parameters, coalesced)
        ]
        units.append(Unit(len(units), names[id(module)] or "root", module, buckets))
    return units


def _groups(
    names: Sequence[str], parameters: dict[str, nn.Parameter], coalesced: bool
) -> Iterable[list[str]]:
    """Which parameters share a bucket."""
    if not coalesced:
        return [[name] for name in names]
    trainable = [name for name in names if parameters[name].requires_grad]
    frozen = [name for name in names if not parameters[name].requires_grad]
    return [group for group in (trainable, frozen) if group]


def _layout(
    names: Sequence[str],
    parameters: dict[str, nn.Parameter],
    partition_size: int,
    parts: int,
    dtype: torch.dtype,
    device: torch.device,
) -> Bucket:
    slots, offset = [], 0
    for name in names:
        parameter = parameters[name]
        if not parameter.is_floating_point():
            raise ValueError(
                f"parameter {name} is {parameter.dtype}; only floating-point ones can be sharded"
            )
        slots.append(Slot(name, parameter, offset, parameter.numel(), parameter.shape))
        offset += parameter.numel()
    shard_numel = -(-offset // (partition_size * parts * ALIGNMENT)) * parts * ALIGNMENT
    full = torch.empty(partition_size * shard_numel, dtype=dtype, device=device)
    full.untyped_storage().resize_(0)
    return Bucket(slots, shard_numel, parameters[names[0]].requires_grad, full)


class Arena:
    """All shards of one kind; contiguous (one allocation) unless told otherwise.

    Moving everything that persists into one buffer at initialisation keeps it from fragmenting the
    memory between the buffers that come and go (S1, "initialization-time defragmentation").
    """

    def __init__(
        self, sizes: Sequence[int], dtype: torch.dtype, device: torch.device, contiguous: bool
    ) -> None:
        if contiguous:
            whole = torch.zeros(sum(sizes), dtype=dtype, device=device)
            self.tensors = [whole]
            self.shards = list(whole.split(list(sizes)))
        else:
            self.shards = [torch.zeros(size, dtype=dtype, device=device) for size in sizes]
            self.tensors = self.shards


@dataclass(frozen=True)
class Arenas:
    """A rank's model states but for the optimizer's own."""

    master: Arena
    compute: Arena
    gradient: Arena
    owned_gradient: Arena
    _copies: list[tuple[Tensor, Tensor]]
    """(to, from): the owned elements of `compute`, and of `master`."""

    def refresh_compute(self) -> None:
        """The masters into the compute copy, casting: as few kernels as there are allocations."""
        if self.compute is not self.master:
            torch._foreach_copy_([to for to, _ in self._copies], [source for _, source in self._copies])


def build_arenas(units: Sequence[Unit], contiguous: bool, index: int, part: int, parts: int) -> Arenas:
    """Allocates the arenas and binds every bucket to its shards.

    This rank holds shard `index` of every bucket and owns part `part` of `parts` of it.
    """
    buckets = [bucket for unit in units for bucket in unit.buckets]
    # Trainable shards first: then the gradients' arena runs in step with the masters'.
    buckets.sort(key=lambda bucket: not bucket.trainable)
    dtype, device = buckets[0].full.dtype, buckets[0].full.device
    trainable = [bucket for bucket in buckets if bucket.trainable]

    def arena(members: Sequence[Bucket], dtype: torch.dtype, share: int) -> Arena:
        return Arena([bucket.shard_numel // share for bucket in members], dtype, device, contiguous)

    master = arena(buckets, torch.float32, parts)
    compute = master if dtype is torch.float32 and parts == 1 else arena(buckets, dtype, 1)
    gradient = arena(trainable, torch.float32, 1)
    owned_gradient = gradient if parts == 1 else arena(trainable, torch.float32, parts)
    for bucket, own, low in zip(buckets, master.shards, compute.shards, strict=True):
        bucket.master, bucket.compute = own, low
        bucket.first = index * bucket.shard_numel + part * len(own)
    for bucket, shard, own in zip(trainable, gradient.shards, owned_gradient.shards, strict=True):
        bucket.gradient, bucket.owned_gradient = shard, own
    if parts == 1:
        pairs = list(zip(compute.tensors, master.tensors, strict=True))
    else:
        pairs = [(bucket.owned_compute, bucket.master) for bucket in buckets]
    return Arenas(master, compute, gradient, owned_gradient, pairs)


def take_over(unit: Unit, index: int) -> None:
    """Moves a unit's parameters into the shards: afterwards this rank holds shard `index` of them,
    and the parameters are views of the (released) full buffers."""
    for bucket in unit.buckets:
        flat = torch.zeros(bucket.full.numel(), dtype=torch.float32, device=bucket.full.device)
        for slot in bucket.slots:
            flat.narrow(0, slot.offset, slot.numel).copy_(slot.parameter.detach().reshape(-1))
        bucket.master.copy_(flat.narrow(0, bucket.first, len(bucket.master)))
        if bucket.compute is not bucket.master:
            bucket.compute.copy_(flat.narrow(0, index * bucket.shard_numel, bucket.shard_numel))
        if len(bucket.compute) == len(bucket.full):
            # A partition group of one rank: the shard is the whole, nothing comes and goes.
            bucket.full = bucket.compute
        bucket.allocate()
        for slot in bucket.slots:
            slot.parameter.data = bucket.full.narrow(0, slot.offset, slot.numel).view(slot.shape)
        bucket.free()
