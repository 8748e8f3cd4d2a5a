"""The collectives that an implementation asks for, recorded without any network.

torch's fake process group answers every collective at once and moves nothing, so one process shows
what one rank of any world calls.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from suite.config import ModelConfig
from suite.impls import registry
from suite.impls.ddp import DDP
from suite.impls.sharded import native, two_hop
from suite.impls.sharded.chain import Chain, Errand, Job
from suite.impls.trainer import Recipe, Topology
from suite.workloads.models import build_model

KINDS = {
    "_allgather_base_": "all-gather",
    "allgather_": "all-gather",
    "allgather_into_tensor_coalesced_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
    "reduce_scatter_": "reduce-scatter",
    "allreduce_": "all-reduce",
    "allreduce_coalesced_": "all-reduce",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
}
SMALL = 100
"""Elements; norms, losses and flags are no part of a schedule."""

Call = tuple[str, int]
"""(kind, bytes of the whole buffer)."""


class _Recorder(TorchDispatchMode):
    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.world_size = world_size
        self.calls: list[Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = str(func)
        if name.startswith("c10d."):
            sizes = [_bytes(item) for item in tree_flatten(args)[0] if isinstance(item, torch.Tensor)]
            kind = KINDS.get(name.split(".")[1])
            # Lists hold the parts of the buffer, and both ends of a scatter or gather are there.
            whole = max(sizes) if len(sizes) <= 2 else sum(sizes) - min(sizes)
            if kind is not None and whole > SMALL * 4:
                self.calls.append((kind, whole))
        return func(*args, **(kwargs or {}))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


class _InLine(Chain):
    """Runs jobs where they are submitted: a recorder sees nothing of other threads."""

    def run(self, job: Job, give_back: Callable[[], None] = lambda: None) -> Errand:
        for transfer in job():
            transfer.wait()
        give_back()
        return _Done()

    def close(self) -> None:
        """Holds nothing."""


class _Done(Errand):
    def wait_stages(self) -> None:
        """Over already."""

    def wait(self) -> None:
        """Over already."""


def _watch_buckets(trainer: DDP, calls: list[Call]) -> None:
    """The fake process group does not answer DDP's reducer, so its hook does."""

    def hook(_: None, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        calls.append(("all-reduce", _bytes(bucket.buffer())))
        done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        done.set_result(bucket.buffer())
        return done

    hook.__annotations__.clear()  # it wants classes there, and these are their names
    trainer._ddp.register_comm_hook(None, hook)


class _Batch:
    def __init__(self, model: ModelConfig) -> None:
        self.ids = torch.randint(2, model.vocab, (1, model.seq_len))

    def loss(self, model: nn.Module) -> torch.Tensor:
        return model(input_ids=self.ids, labels=self.ids).loss


def record_step(
    impl: str, model: ModelConfig, world_size: int, micro_steps: int, options: Mapping[str, Any]
) -> list[Call]:
    """The calls of rank 0's second step, in bf16 with activation checkpointing.

    In a forked process: a process group is for ever.
    """
    registry.preload(impl, "cpu")
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_record, args=(sender, impl, model, world_size, micro_steps, dict(options)), daemon=True
    )
    process.start()
    sender.close()
    try:
        return receiver.recv()
    finally:
        process.join()


def _record(
    sender: Any, impl: str, model: ModelConfig, world_size: int, micro_steps: int, options: dict[str, Any]
) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    for module in (native, two_hop):
        setattr(module, "make_chain", lambda device: _InLine())  # noqa: B010 (mypy)
    trainer = registry.build(
        impl,
        lambda: build_model(model, 0, activation_checkpointing=True),
        Recipe(precision="bf16", micro_steps=micro_steps),
        Topology(0, world_size, 2),
        options,
    )
    batches = [_Batch(model)] * micro_steps
    buckets: list[Call] = []
    if isinstance(trainer, DDP):
        _watch_buckets(trainer, buckets)
    trainer.train_step(batches)
    buckets.clear()
    with _Recorder(world_size) as recorder:
        trainer.train_step(batches)
    sender.send(recorder.calls + buckets)
