"""What DeepSpeed's MiCS needs to run, and to train correctly (versions 0.19.3 to 0.19.6)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _coalescing_manager

MICS_SHIMS = (
    "all_gather_coalesced: one gather per tensor on gloo, and a handle that waits for all of them",
    "MiCS_Init: gradients are reduced over the partition group, not over the world (pull request 8060)",
    "initial weights are broadcast to all ranks, not inside each partition group alone",
    "bf16: the model is cast before it is sharded; DeepSpeed would leave it in fp32",
)


class Waitable(Protocol):
    def wait(self) -> object: ...


def mend_coalesced_gather() -> None:
    """Replaces `TorchBackend.all_gather_coalesced` in this process.

    Gloo has no coalescing. Where there is, upstream returns the handle of a single gather inside
    the coalescing block instead of the block's own, so that nobody waits for the parameters.
    """
    backend = importlib.import_module("deepspeed.comm.torch").TorchBackend
    backend.all_gather_coalesced = _all_gather_coalesced


def mended_mics_init() -> type:
    """`MiCS_Init`, telling every parameter its partition group before DeepSpeed looks for it.

    Since 0.19.3 the group in which gradients are reduced is a parameter's own, by default the
    world; MiCS never sets it.
    """
    from deepspeed.runtime.zero.mics import MiCS_Init

    class MendedMiCSInit(MiCS_Init):
        def _convert_to_deepspeed_param(self, param: Any) -> None:
            param.ds_zero_partition_process_group = self.mics_comm_groups.param_shard_group
            super()._convert_to_deepspeed_param(param)

    return MendedMiCSInit


def broadcast_weights(model: nn.Module) -> None:
    """Rank 0's weights to everybody, as DeepSpeed does for the ZeRO stages."""
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)


class _All:
    """The handle of several collectives."""

    def __init__(self, handles: Sequence[Waitable]) -> None:
        self._handles = handles

    def wait(self) -> None:
        for handle in self._handles:
            handle.wait()


def _all_gather_coalesced(
    backend: object,
    output_tensors: list[Tensor],
    input_tensors: list[Tensor],
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> Waitable | None:
    pairs = zip(output_tensors, input_tensors, strict=True)
    if dist.get_backend(group) == "gloo":
        handles = [dist.all_gather_into_tensor(*pair, group=group, async_op=True) for pair in pairs]
        handle: Waitable = _All([handle for handle in handles if handle is not None])
    else:
        with _coalescing_manager(group, input_tensors[0].device, async_ops=True) as handle:
            for output, shard in pairs:
                dist.all_gather_into_tensor(output, shard, group=group, async_op=True)
    if async_op:
        return handle
    handle.wait()
    return None
