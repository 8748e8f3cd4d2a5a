"""The whole model as safetensors that `from_pretrained` loads, streamed unit by unit to rank 0."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from suite.impls.sharded.engine import Engine
from suite.impls.sharded.parts import persistent_buffers

FILE = "model-{:05}-of-{:05}.safetensors"
INDEX = "model.safetensors.index.json"


def save_pretrained(engine: Engine, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """Writes weights (masters, cast to `dtype`), persistent buffers and the model's configuration.

    One file per unit, so that no rank ever holds more than one whole unit. Every rank calls it;
    rank 0 writes. A tied weight is written once, under the first of its names.
    """
    first = dist.get_rank() == 0
    if first:
        folder.mkdir(parents=True, exist_ok=True)
    places: dict[str, str] = {}
    total = 0
    for unit in engine.units:
        tensors = {name: tensor.to(dtype) for name, tensor in engine.full_unit(unit)}
        if unit.index == 0:
            buffers = persistent_buffers(engine.model)
            tensors |= {name: buffer.cpu().clone() for name, buffer in buffers.items()}
        if first and tensors:
            file = FILE.format(unit.index + 1, len(engine.units))
            save_file(tensors, folder / file, metadata={"format": "pt"})
            places |= dict.fromkeys(tensors, file)
            total += sum(tensor.nbytes for tensor in tensors.values())
    if first:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=1))
        config: Any = getattr(engine.model, "config", None)
        if hasattr(config, "save_pretrained"):
            config.save_pretrained(folder)
    dist.barrier()
