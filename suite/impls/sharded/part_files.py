"""Writes `Part`s to safetensors files and reads them back, by `torch.distributed.checkpoint`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
    LoadPlan,
    SavePlan,
)
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from suite.impls.sharded.manifest import refused
from suite.impls.sharded.parts import Part


def write_tensors(folder: Path, tensors: dict[str, Part], group: dist.ProcessGroup | None) -> None:
    """One safetensors file per rank; `group` None: this process alone."""
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is meant
        dcp.save(tensors, storage_writer=writer, planner=_Saver(), process_group=group, no_dist=group is None)


def read_tensors(folder: Path, tensors: dict[str, Part], group: dist.ProcessGroup | None) -> None:
    """Fills the parts' values in place, from wherever in the checkpoint they are."""
    reader = HuggingFaceStorageReader(str(folder))
    with refused(folder), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is meant
        dcp.load(
            tensors,
            storage_reader=reader,
            planner=_Loader(),
            process_group=group,
            no_dist=group is None,
        )


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
