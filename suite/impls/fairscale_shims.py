"""What FairScale 0.4.13 needs to run on the CPU: its FullyShardedDataParallel speaks CUDA directly."""

from __future__ import annotations

import importlib
import math
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FSDP_SHIMS = (
    "streams: torch.cpu stands in for torch.cuda inside FairScale's module; record_stream does nothing",
    "clip_grad_norm_: the same computation without moving the norm to CUDA",
    "reduce-scatter: gloo takes its input flat",
)


def run_fsdp_on_cpu() -> None:
    """Installs all of `FSDP_SHIMS` in this process; installing them again changes nothing."""
    fsdp: Any = importlib.import_module("fairscale.nn.data_parallel.fully_sharded_data_parallel")
    bucketer: Any = importlib.import_module("fairscale.internal.reduce_scatter_bucketer")
    if isinstance(fsdp.torch, _Substitute):
        return
    # torch.cpu has streams of the same interface, for code that does not care where it runs.
    fsdp.torch = _Substitute(torch, cuda=torch.cpu)
    fsdp.FullyShardedDataParallel.clip_grad_norm_ = _clip_grad_norm_
    bucketer.dist = _Substitute(dist, _reduce_scatter_base=_reduce_scatter_flat)
    # There is no allocator to be told of streams on the CPU, and torch refuses the call.
    torch.Tensor.record_stream = _record_stream  # type: ignore[method-assign, assignment]


class _Substitute(ModuleType):
    """A module that answers as another one does, but for the names given."""

    def __init__(self, module: ModuleType, **names: Any) -> None:
        super().__init__(module.__name__)
        self._module = module
        self.__dict__.update(names)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _record_stream(tensor: Tensor, stream: object) -> None:
    pass


def _reduce_scatter_flat(output: Tensor, data: Tensor, group: dist.ProcessGroup) -> None:
    dist.reduce_scatter_tensor(output, data.flatten(), group=group)


@torch.no_grad()
def _clip_grad_norm_(module: Any, max_norm: float) -> Tensor:
    gradients = [parameter.grad for parameter in module.params_with_grad]
    squared = torch.nn.utils.get_total_norm(gradients) ** 2
    dist.all_reduce(squared, group=module.process_group)
    norm = squared.sqrt()
    if max_norm < math.inf:
        torch.nn.utils.clip_grads_with_norm_(module.params_with_grad, max_norm, norm)
    return norm
