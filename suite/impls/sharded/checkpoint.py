"""Checkpoints: atomic, asynchronous, and loadable with any world and partition size.

A checkpoint is a folder of safetensors files, written by `torch.distributed.checkpoint`: of every
parameter, under the model's own name and flattened, its fp32 master and its optimizer states, each
rank writing the range that it owns; the persistent buffers as rank 0 has them; and `training.json` with
all that is not a tensor. Nothing in it is pickled. It is written beside its final name and renamed when it
is complete on all ranks; a save that fails leaves nothing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from suite import typed
from suite.errors import OutputError, UsageError
from suite.impls.sharded.collectives import end_group
from suite.impls.sharded.engine import Engine
from suite.impls.sharded.kept import PARTIAL
from suite.impls.sharded.manifest import (
    Training,
    fingerprints,
    from_json,
    merged,
    read_whole,
    reason,
    refused,
    tensor_files,
    to_json,
    together,
    update_groups,
    write_training,
)
from suite.impls.sharded.optimizer import LossScale
from suite.impls.sharded.part_files import read_tensors, write_tensors
from suite.impls.sharded.parts import (
    Owned,
    Part,
    buffers_of,
    make_states,
    owned_by,
    owned_by_plain,
    random_states,
    set_buffers,
    states_of,
    tensors_of,
)


class Stateful(Protocol):
    """A learning-rate scheduler, say; its state is made of numbers, text, and lists and mappings of them."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


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
        folder exists, and for a scheduler whose state cannot be saved.
        """
        _require_free(folder)
        engine = self._engine
        owned = list(owned_by(engine))
        training = replace(
            _training(owned, engine.optimizer, position, scheduler),
            ranks=dist.get_world_size(),
            device=engine.device.type,
            loss_scale=None if engine.loss_scale is None else dict(vars(engine.loss_scale)),
        )
        tensors = tensors_of(owned, engine.optimizer, training.states_of)
        tensors |= random_states(dist.get_rank(), engine.device)
        if dist.get_rank() == 0:
            tensors |= buffers_of(engine.model)
        copies = {name: replace(part, values=_copy(part.values)) for name, part in tensors.items()}
        place = (self._group, dist.get_rank(), dist.get_world_size())
        return Saving(self._thread.submit(_write, folder, copies, training, *place))

    def close(self) -> None:
        """Waits for what is being written; collective."""
        self._thread.shutdown(wait=True)
        end_group(self._group)


def save_plain(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    position: int = 0,
    scheduler: Stateful | None = None,
) -> None:
    """A checkpoint of plain, unsharded training in one process, in the same format."""
    _require_free(folder)
    owned = list(owned_by_plain(model, optimizer))
    training = _training(owned, optimizer, position, scheduler)
    tensors = tensors_of(owned, optimizer, training.states_of) | buffers_of(model)
    _write(folder, tensors, training, None, 0, 1)


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

    def begin() -> Training:
        if first:
            _begin(partial)
        return training

    def finish() -> None:
        files = {name: values for part in parts for name, values in part.items()}
        _finish(partial, folder, replace(merged(trainings), files=files))

    try:
        trainings = together(group, begin)
        write_tensors(partial, tensors, group)
        parts = together(group, lambda: fingerprints(tensor_files(partial)[rank::ranks]))
        together(group, lambda: finish() if first else None)
    except (Exception, dcp.CheckpointException) as error:  # they share no narrower base class
        if first:
            shutil.rmtree(partial, ignore_errors=True)
        raise OutputError(f"checkpoint {folder} cannot be written: {reason(error)}") from error


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


def load(folder: Path, engine: Engine, scheduler: Stateful | None = None) -> int:
    """Continues from a checkpoint of any world and partition size; returns its position. Collective.

    The random state is restored where this rank, on such a device, existed at the time. Raises
    UsageError for a checkpoint that is not there, damaged, or of another model.
    """
    training = read_whole(folder, dist.group.WORLD)
    owned = list(owned_by(engine))
    tensors = _to_be_filled(owned, engine.optimizer, training)
    here = dist.get_rank() < training.ranks and training.device == engine.device.type
    random = random_states(dist.get_rank(), engine.device) if here else {}
    buffers = buffers_of(engine.model) if training.buffers else {}
    engine.quiesce()
    read_tensors(folder, tensors | random | buffers, dist.group.WORLD)
    set_buffers(engine.model, buffers)
    for name, part in random.items():
        device_type = name.split("/")[1]
        module = torch if device_type == "cpu" else torch.get_device_module(device_type)
        module.set_rng_state(part.values)
    _set_training(folder, training, engine.optimizer, scheduler)
    if engine.loss_scale is not None and training.loss_scale is not None:
        with refused(folder):
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
    training = read_whole(folder, None)
    owned = list(owned_by_plain(model, optimizer))
    tensors = _to_be_filled(owned, optimizer, training)
    buffers = buffers_of(model) if training.buffers else {}
    read_tensors(folder, tensors | buffers, None)
    set_buffers(model, buffers)
    _set_training(folder, training, optimizer, scheduler)
    return training.position


def _to_be_filled(
    owned: Sequence[Owned], optimizer: torch.optim.Optimizer, training: Training
) -> dict[str, Part]:
    """The parameters and, made anew, the optimizer states that the checkpoint has of them."""
    make_states(owned, optimizer, training.states_of)
    return tensors_of(owned, optimizer, training.states_of)


def _training(
    owned: Sequence[Owned], optimizer: torch.optim.Optimizer, position: int, scheduler: Stateful | None
) -> Training:
    """All that is not a tensor, as one process sees it."""
    states: dict[str, bool] = {}
    stateful: dict[str, list[str]] = {}
    for item in owned:
        for key, values in states_of(item, optimizer).items():
            states[key] = item.is_scalar(values) or states.get(key, False)
            stateful.setdefault(item.name, []).append(key)
    return Training(
        position=position,
        ranks=0,
        device=None,
        states=states,
        stateful=stateful,
        buffers=True,
        groups=[{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups],
        scheduler=None if scheduler is None else to_json(scheduler.state_dict()),
    )


def _set_training(
    folder: Path, training: Training, optimizer: torch.optim.Optimizer, scheduler: Stateful | None
) -> None:
    with refused(folder):
        update_groups(optimizer, training.groups)
        if scheduler is not None and training.scheduler is not None:
            scheduler.load_state_dict(from_json(training.scheduler))
