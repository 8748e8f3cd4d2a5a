"""The engine, usable by itself: `shard` a model and its optimizer, then train.

engine = shard(model, torch.optim.AdamW(model.parameters(), lr=1e-4), precision="bf16", clip=1.0)
loss = model(**batch).loss / dist.get_world_size()
engine.backward(loss)
norm = engine.step()
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import nn

from suite.impls.sharded.engine import Engine
from suite.impls.sharded.groups import make_groups
from suite.impls.sharded.materialize import Initialize
from suite.impls.sharded.options import EngineOptions
from suite.impls.sharded.topology import PartitionTopology
from suite.impls.sharded.units import find_unit_modules

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def shard(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    precision: str = "fp32",
    clip: float | None = None,
    partition_size: int | None = None,
    ranks_per_node: int | None = None,
    unit_modules: Sequence[nn.Module] | None = None,
    device: torch.device | None = None,
    initialize: Initialize | None = None,
    options: EngineOptions | None = None,
) -> Engine:
    """Partitions the model's parameters, gradients and optimizer states over groups of
    `partition_size` ranks (MiCS), by default over the world (ZeRO-3).

    Every rank calls it, after `init_process_group`, with equal weights and an optimizer that has not
    stepped yet; the optimizer object stays valid, its groups then hold this rank's shards.
    `ranks_per_node` says which ranks are neighbours (by default, all); `unit_modules` are gathered one
    by one (by default what is called in every outermost `ModuleList`); `device` is where to compute (by
    default where the parameters are). A model on the `meta` device is initialised shard by shard, by
    `initialize`, called as by `nn.Module.apply` (by default in the model's own way). `bf16` and `fp16`
    compute and communicate in that dtype (fp32 inputs of the model and of units are cast, buffers are
    not) and keep fp32 masters; fp16 scales the loss dynamically.

    Gradients of ranks and micro-steps are *added up*: divide the loss by their number for a mean.
    All ranks must call the same modules in the same order; which parameters a rank's data reaches
    inside them may differ. Outside of the model's calls its weights have no memory.
    Raises ValueError for sizes that do not divide the world, UsageError for a weight on `meta` that no
    initialisation sets.
    """
    if precision not in DTYPES:
        raise ValueError(f"precision={precision!r} is not one of {', '.join(DTYPES)}")
    options = options or EngineOptions(hierarchical=True)
    device = device or next(model.parameters()).device
    if device.type == "meta":
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    world = dist.get_world_size()
    topology = PartitionTopology(
        world,
        ranks_per_node or world,
        partition_size or world,
        options.hierarchical and options.preflattened,
    )
    return Engine(
        model,
        optimizer,
        find_unit_modules(model) if unit_modules is None else unit_modules,
        make_groups(topology, options, device),
        DTYPES[precision],
        device,
        options,
        clip,
        initialize,
    )
