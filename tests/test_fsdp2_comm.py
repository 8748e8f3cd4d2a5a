"""This engine's collectives under `fully_shard`, where a script uses more of it than `fsdp2-mics`."""

from __future__ import annotations

import torch
from engine_scenarios import Stack, batch_of, one_forward
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from suite.impls.sharded.fsdp2_comm import use_engine_collectives
from suite.testbeds.local import LocalTestbed
from suite.testbeds.testbed import RankContext


class Program:
    def __init__(self, context: RankContext) -> None:
        self._rank = context.rank

    def unsharded_ahead(self) -> bool:
        """Whether a block that was asked for ahead of its use is there once it was waited for."""
        torch.manual_seed(3)
        model = Stack()
        whole = {name: p.detach().clone() for name, p in model.blocks[1].named_parameters()}
        mesh = init_device_mesh("cpu", (2,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        collectives = use_engine_collectives(model, 2, 2)
        with torch.no_grad():
            one_forward(model, batch_of(self._rank, 0, 0))
        block = model.blocks[1]
        block.unshard(async_op=True).wait()
        found = {name: p.detach().clone() for name, p in block.named_parameters()}
        collectives.close()
        return all(torch.equal(found[name], whole[name]) for name in whole)


def test_an_asynchronous_unshard_is_waited_for() -> None:
    with LocalTestbed(2, 2).launch(Program, 60) as ranks:
        assert all(ranks.call("unsharded_ahead", timeout_s=30))
