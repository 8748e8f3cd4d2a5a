"""Which attention kernel torch picks for a model: it depends on shape, dtype, device and version."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from suite.config import ModelConfig
from suite.workloads.models import build_model

PREFIX = "_scaled_dot_product_"
UNFUSED = "math (not fused)"


class _Watch(TorchDispatchMode):
    """Notes the names of the fused attention kernels that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith(PREFIX) and not name.endswith("_backward"):
            self.found.add(name.removeprefix(PREFIX))
        return func(*args, **(kwargs or {}))


def attention_kernel(model: ModelConfig, micro_batch: int, dtype: torch.dtype, device: torch.device) -> str:
    """The kernel behind `scaled_dot_product_attention` in the forward of such a model, found by running
    one block of it: `flash_attention`, `efficient_attention`, `cudnn_attention`, ..., or `math (not
    fused)`. Takes one block's memory for a moment."""
    small = replace(model, layers=1, vocab=64)
    built = build_model(small, seed=0).to(device, dtype)
    tokens = torch.full((micro_batch, model.seq_len), 5, device=device)
    with _Watch() as watch:
        built(input_ids=tokens)
    return " and ".join(sorted(watch.found)) or UNFUSED
