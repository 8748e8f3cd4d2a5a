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

from suite.impls.sharded.engine import Engine, make_collectives
from suite.impls.sharded.options import EngineOptions
from suite.impls.sharded.units import find_unit_modules

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def shard(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    precision: str = "fp32",
    clip: float | None = None,
    unit_modules: Sequence[nn.Module] | None = None,
    device: torch.device | None = None,
    options: EngineOptions | None = None,
) -> Engine:
    """Partitions the model's parameters, gradients and optimizer states over the world (ZeRO-3).

    Every rank calls it, after `init_process_group`, with equal weights and an optimizer that has not
    stepped yet; the optimizer object stays valid, its groups then hold this rank's shards.
    `unit_modules` are gathered one by one (by default the children of every outermost `ModuleList`);
    `device` is where to compute (by default where the parameters are). `bf16` computes and
    communicates in bf16 and keeps fp32 masters.

    Gradients of ranks and micro-steps are *added up*: divide the loss by their number for a mean.
    """
    if precision not in DTYPES:
        raise ValueError(f"precision={precision!r} is not one of {', '.join(DTYPES)}")
    options = options or EngineOptions()
    rank, size = dist.get_rank(), dist.get_world_size()
    return Engine(
        model,
        optimizer,
        find_unit_modules(model) if unit_modules is None else unit_modules,
        make_collectives(dist.group.WORLD, rank, size, options),
        DTYPES[precision],
        device or next(model.parameters()).device,
        options,
        clip,
    )
