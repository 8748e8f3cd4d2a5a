"""Checkpoints: atomic, asynchronous, and loadable with any world and partition size.

A checkpoint is a folder of safetensors files, written by `torch.distributed.checkpoint`: of every
parameter, under the model's own name and flattened, its fp32 master and its optimizer states, each
rank writing the range that it owns; and `training.json` with all that is not a tensor. Nothing in it
is pickled. It is written beside its final name and renamed when it is complete on all ranks; a save that
fails leaves nothing.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    LoadPlan,
    SavePlan,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from suite import typed
from suite.errors import OutputError, UsageError
from suite.impls.sharded.engine import Engine
from suite.impls.sharded.manifest import (
    TRAINING,
    Training,
    fingerprints,
    read_training,
    reason,
    tensor_files,
    together,
    update_groups,
    verify,
    write_training,
)
from suite.impls.sharded.optimizer import LossScale
from suite.impls.sharded.units import Bucket

PARTIAL = ".partial"


class Stateful(Protocol):
    """A learning-rate scheduler, say; its state must be JSON."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass(frozen=True)
class Part:
    """Elements [begin, begin + len(values)) of a flattened tensor of `numel`; `values` is a 1-D view."""

    numel: int
    begin: int
    values: Tensor

    @property
    def chunk(self) -> ChunkStorageMetadata:
        return ChunkStorageMetadata(torch.Size([self.begin]), torch.Size([len(self.values)]))


@dataclass(frozen=True)
class Owned:
    """What this rank owns of a parameter, and which of the optimizer's tensors that lies in."""

    name: str
    part: Part
    optimized: Tensor | None
    """The tensor in the optimizer's groups that holds these elements; None when frozen."""
    at: int
    """Where in it, flattened, they begin."""

    def state(self, values: Tensor) -> Part:
        """The same elements of one of the optimizer's states; a scalar state as one element."""
        if values.dim() == 0:
            return Part(1, 0, values.view(1))
        return replace(self.part, values=values.view(-1).narrow(0, self.at, len(self.part.values)))


# --- saving


class Saving:
    """A checkpoint on its way to the disk; the training may go on meanwhile."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        """Returns when it is complete on all ranks. Raises OutputError on every rank when it could not be
        written on one."""
        self._future.result()

    @property
    def done(self) -> bool:
        return self._future.done()


class Checkpointer:
    """Saves an engine's training, one checkpoint at a time. Every rank makes one, after the engine.

    It holds a process group of its own, so that writing does not get between the training's messages.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._group = dist.new_group(backend="gloo")
        self._thread = ThreadPoolExecutor(1, "checkpoint")

    def save(self, folder: Path, position: int = 0, scheduler: Stateful | None = None) -> Saving:
        """Copies the present state, then writes it to `folder` in the background; collective.

        `position` counts what was consumed of the data (steps, say). Raises UsageError when the
        folder exists.
        """
        _require_free(folder)
        engine = self._engine
        owned = list(owned_by(engine))
        tensors = _tensors(owned, engine.optimizer) | _random_states(dist.get_rank(), engine.device)
        copies = {name: replace(part, values=_copy(part.values)) for name, part in tensors.items()}
        training = replace(
            _training(engine.optimizer, position, scheduler),
            ranks=dist.get_world_size(),
            device=engine.device.type,
            loss_scale=None if engine.loss_scale is None else dict(vars(engine.loss_scale)),
        )
        place = (self._group, dist.get_rank(), dist.get_world_size())
        return Saving(self._thread.submit(_write, folder, copies, training, *place))

    def close(self) -> None:
        """Waits for what is being written."""
        self._thread.shutdown(wait=True)


def save_plain(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    position: int = 0,
    scheduler: Stateful | None = None,
) -> None:
    """A checkpoint of plain, unsharded training in one process, in the same format."""
    _require_free(folder)
    tensors = _tensors(list(owned_by_plain(model, optimizer)), optimizer)
    _write(folder, tensors, _training(optimizer, position, scheduler), None, 0, 1)


def _write(
    folder: Path,
    tensors: dict[str, Part],
    training: Training,
    group: dist.ProcessGroup | None,
    rank: int,
    ranks: int,
) -> None:
    """Each step fails on all ranks or on none."""
    partial = folder.with_name(folder.name + PARTIAL)
    first = rank == 0

    def finish() -> None:
        files = {name: values for part in parts for name, values in part.items()}
        _finish(partial, folder, replace(training, files=files))

    try:
        together(group, lambda: _begin(partial) if first else None)
        write_tensors(partial, tensors, group)
        parts = together(group, lambda: fingerprints(tensor_files(partial)[rank::ranks]))
        together(group, lambda: finish() if first else None)
    except (Exception, dcp.CheckpointException) as error:  # they share no narrower base class
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise OutputError(f"checkpoint {folder} cannot be written: {reason(error)}") from error


def write_tensors(folder: Path, tensors: dict[str, Part], group: dist.ProcessGroup | None) -> None:
    """One safetensors file per rank; `group` None: this process alone."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is meant
        dcp.save(tensors, storage_writer=writer, planner=_Saver(), process_group=group, no_dist=group is None)


def _require_free(folder: Path) -> None:
    if folder.exists():
        raise UsageError(f"{folder} exists already; save under another name")


def _begin(partial: Path) -> None:
    """An empty folder; what an earlier, interrupted save left there is removed."""
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)


def _finish(partial: Path, folder: Path, training: Training) -> None:
    """Makes sure that everything is on the disk, then gives it its name."""
    write_training(partial, training)
    for path in [*partial.iterdir(), partial]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    partial.rename(folder)


def _copy(values: Tensor) -> Tensor:
    return values.detach().to("cpu", copy=True)


# --- loading


def latest(root: Path) -> Path | None:
    """The complete checkpoint under `root` whose name comes last, if there is one."""
    return max(_complete(root), key=lambda folder: folder.name, default=None)


def discard_damaged(root: Path) -> list[Path]:
    """Removes the complete checkpoints after the last one whose files are as they were written, and returns
    their folders. For one process: it reads them all through."""
    damaged = []
    for folder in sorted(_complete(root), reverse=True):
        try:
            _read_whole(folder, None)
            break
        except UsageError:
            damaged.append(folder)
            shutil.rmtree(folder)
    return damaged


def keep_newest(root: Path, count: int) -> None:
    """Removes all complete checkpoints under `root` but the last ones."""
    for folder in sorted(_complete(root))[:-count]:
        shutil.rmtree(folder, ignore_errors=True)


def discard_unfinished(root: Path) -> None:
    """Removes what saves that were killed have left under `root`; nobody may be saving there."""
    for folder in root.glob(f"*{PARTIAL}"):
        shutil.rmtree(folder, ignore_errors=True)


def _complete(root: Path) -> list[Path]:
    return [file.parent for file in root.glob(f"*/{TRAINING}") if not file.parent.name.endswith(PARTIAL)]


def load(folder: Path, engine: Engine, scheduler: Stateful | None = None) -> int:
    """Continues from a checkpoint of any world and partition size; returns its position. Collective.

    The random state is restored where this rank, on such a device, existed at the time. Raises
    UsageError for a
    checkpoint that is not there, damaged, or of another model.
    """
    training = _read_whole(folder, dist.group.WORLD)
    owned = list(owned_by(engine))
    _make_states(owned, engine.optimizer, training)
    tensors = _tensors(owned, engine.optimizer)
    here = dist.get_rank() < training.ranks and training.device == engine.device.type
    random = _random_states(dist.get_rank(), engine.device) if here else {}
    read_tensors(folder, tensors | random, dist.group.WORLD)
    for name, part in random.items():
        device_type = name.split("/")[1]
        module = torch if device_type == "cpu" else torch.get_device_module(device_type)
        module.set_rng_state(part.values)
    _set_training(folder, training, engine.optimizer, scheduler)
    if engine.loss_scale is not None and training.loss_scale is not None:
        with _refused(folder):
            vars(engine.loss_scale).update(vars(typed.build(LossScale, training.loss_scale)))
    engine.refresh_weights()
    return training.position


def load_plain(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Stateful | None = None,
) -> int:
    """The same into plain, unsharded training in one process."""
    training = _read_whole(folder, None)
    owned = list(owned_by_plain(model, optimizer))
    _make_states(owned, optimizer, training)
    read_tensors(folder, _tensors(owned, optimizer), None)
    _set_training(folder, training, optimizer, scheduler)
    return training.position


def _read_whole(folder: Path, group: dist.ProcessGroup | None) -> Training:
    """What is not a tensor, after the ranks have shared out to look whether all files are as written."""
    training = read_training(folder)
    rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    share = dict(sorted(training.files.items())[rank::ranks])
    with _refused(folder):
        together(group, lambda: verify(folder, share))
    return training


def read_tensors(folder: Path, tensors: dict[str, Part], group: dist.ProcessGroup | None) -> None:
    """Fills the parts' values in place, from wherever in the checkpoint they are."""
    reader = HuggingFaceStorageReader(str(folder))
    with _refused(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is meant
        dcp.load(
            tensors,
            storage_reader=reader,
            planner=_Loader(),
            process_group=group,
            no_dist=group is None,
        )


@contextmanager
def _refused(folder: Path) -> Iterator[None]:
    """Whatever goes wrong with what the checkpoint says is the checkpoint's fault."""
    try:
        yield
    except (Exception, dcp.CheckpointException) as error:  # they share no narrower base class
        raise UsageError(f"checkpoint {folder} cannot be loaded: {reason(error)}") from error


# --- what is in a checkpoint


def owned_by(engine: Engine) -> Iterator[Owned]:
    """What this rank is the owner of: in MiCS the same as its replicas."""
    optimized = [tensor for group in engine.optimizer.param_groups for tensor in group["params"]]
    for unit in engine.units:
        for bucket in unit.buckets:
            yield from _owned_in(bucket, optimized)


def _owned_in(bucket: Bucket, optimized: Sequence[Tensor]) -> Iterator[Owned]:
    last = bucket.first + len(bucket.master)
    for slot in bucket.slots:
        begin, end = max(slot.offset, bucket.first), min(slot.offset + slot.numel, last)
        if begin < end:
            values = bucket.master.narrow(0, begin - bucket.first, end - begin)
            holder = next((tensor for tensor in optimized if _holds(tensor, values)), None)
            at = 0 if holder is None else int(values.storage_offset() - holder.storage_offset())
            yield Owned(slot.name, Part(slot.numel, begin - slot.offset, values), holder, at)


def _holds(outer: Tensor, inner: Tensor) -> bool:
    same = outer.untyped_storage().data_ptr() == inner.untyped_storage().data_ptr()
    return same and 0 <= inner.storage_offset() - outer.storage_offset() < outer.numel()


def owned_by_plain(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[Owned]:
    """Everything. Raises ValueError for a parameter that is not contiguous."""
    optimized = {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.numel():
            values = parameter.data.view(-1)
            holder = parameter if id(parameter) in optimized else None
            yield Owned(name, Part(len(values), 0, values), holder, 0)


def _tensors(owned: Sequence[Owned], optimizer: torch.optim.Optimizer) -> dict[str, Part]:
    tensors = {}
    for item in owned:
        tensors[f"parameters/{item.name}"] = item.part
        states = optimizer.state.get(item.optimized, {}) if item.optimized is not None else {}
        for key, values in states.items():
            if values is not None:
                tensors[f"optimizer/{key}/{item.name}"] = item.state(values)
    return tensors


def _random_states(rank: int, device: torch.device) -> dict[str, Part]:
    states = {f"random/cpu/{rank}": torch.get_rng_state()}
    if device.type != "cpu":
        states[f"random/{device.type}/{rank}"] = torch.get_device_module(device).get_rng_state(device)
    return {name: Part(len(state), 0, state) for name, state in states.items()}


def _training(optimizer: torch.optim.Optimizer, position: int, scheduler: Stateful | None) -> Training:
    """All that is not a tensor, as one process sees it."""
    states = {
        key: values.dim() == 0
        for state in optimizer.state.values()
        for key, values in state.items()
        if values is not None
    }
    return Training(
        position=position,
        ranks=0,
        device=None,
        states=states,
        groups=[{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        scheduler=None if scheduler is None else scheduler.state_dict(),
    )


def _make_states(owned: Sequence[Owned], optimizer: torch.optim.Optimizer, training: Training) -> None:
    """Empty optimizer states of the kinds that the checkpoint holds, to be filled. Scalars (the step
    count) lie on the device where the optimizer's kernel reads them, else on the CPU."""
    optimizer.state.clear()
    on_device = {
        id(tensor)
        for group in optimizer.param_groups
        for tensor in group["params"]
        if group.get("fused") or group.get("capturable")
    }
    for holder in {id(item.optimized): item.optimized for item in owned}.values():
        if holder is not None and training.states:
            scalar = torch.zeros((), device=holder.device if id(holder) in on_device else "cpu")
            optimizer.state[holder] = {
                key: scalar.clone() if is_scalar else torch.zeros_like(holder, requires_grad=False)
                for key, is_scalar in training.states.items()
            }


def _set_training(
    folder: Path, training: Training, optimizer: torch.optim.Optimizer, scheduler: Stateful | None
) -> None:
    with _refused(folder):
        update_groups(optimizer, training.groups)
        if scheduler is not None and training.scheduler is not None:
            scheduler.load_state_dict(training.scheduler)


# --- how torch.distributed.checkpoint sees it


class _Saver(DefaultSavePlanner):
    """Plans the writing of `Part`s; equal parts of several ranks are written once."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan([_write_item(name, part) for name, part in self.state_dict.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        values: Tensor = self.state_dict[index.fqn].values
        return values


class _Loader(DefaultLoadPlanner):
    """Plans the reading of `Part`s, each from all saved parts that it overlaps."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """The default one would replace what is not a tensor by None."""
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for name, part in self.state_dict.items():
            saved: Any = self.metadata.state_dict_metadata.get(name)
            if saved is None:
                raise ValueError(f"it does not hold {name}")
            if saved.size != torch.Size([part.numel]):
                raise ValueError(f"{name} has {saved.size.numel()} elements there and {part.numel} here")
            found = create_read_items_for_chunk_list(name, saved, [part.chunk])
            there = sum(item.lengths.numel() for item in found)
            if there != len(part.values):
                raise ValueError(f"it holds {there} of the {len(part.values)} elements wanted of {name}")
            items += found
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        values: Tensor = self.state_dict[index.fqn].values
        return values


def _write_item(name: str, part: Part) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(name, part.chunk.offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=part.chunk,
            properties=TensorProperties.create_from_tensor(part.values),
            size=torch.Size([part.numel]),
        ),
    )
