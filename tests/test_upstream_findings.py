"""The upstream defects of docs/findings.md, reproduced as they are shipped.

A test here that fails after an upgrade is good news: the shim that it belongs to may go.
"""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.file_baton import FileBaton

from suite.config import Config
from suite.config_load import load
from suite.errors import RankError, UsageError
from suite.harness import traffic
from suite.harness.check import check
from suite.harness.worker import model_builder, recipe_of
from suite.impls import deepspeed_build, deepspeed_mics, deepspeed_zero, registry
from suite.impls.trainer import Topology
from suite.testbeds.local import LocalTestbed
from suite.testbeds.testbed import RankContext
from suite.workloads.data import open_stream

MODEL = [f"workload.model.{key}" for key in ("layers=4", "hidden=64", "intermediate=128", "vocab=512")]


def configuration(impl: str, *words: str) -> Config:
    return load([f"impl={impl}", *MODEL, "workload.model.seq_len=32", "workload.data=synthetic", *words])


def require(impl: str) -> None:
    try:
        registry.preload(impl)
    except UsageError as error:
        pytest.skip(str(error))


def on_ranks(program: Callable[[RankContext], Any], ranks: int = 4, per_node: int = 4) -> list[Any]:
    """What `program` returns on each rank of a fresh world."""

    class Program:
        def __init__(self, context: RankContext) -> None:
            self._context = context

        def run(self) -> Any:
            return program(self._context)

    with LocalTestbed(ranks, per_node).launch(Program, 60) as running:
        return running.call("run", timeout_s=100)


def trainer_on(context: RankContext, config: Config, seed: int = 0, **options: Any) -> Any:
    """The configured implementation on this rank, from weights of that seed."""
    topology = Topology(context.rank, context.world_size, context.ranks_per_node, context.device)
    config.train.seed = seed
    return registry.build(config.impl.name, model_builder(config), recipe_of(config.train), topology, options)


def step(context: RankContext, trainer: Any, config: Config, index: int = 0) -> None:
    stream = open_stream(config.workload, 0)
    train = config.train
    trainer.train_step(
        stream.micro_batches(index, context.rank, context.world_size, train.micro_batch, train.micro_steps)
    )


def test_fairscale_sdp_trains_wrong_from_the_second_step_when_gradients_are_set_to_none() -> None:
    require("fairscale-sdp")
    result = check(configuration("fairscale-sdp", "impl.options.zero_grad_set_to_none=true"))
    assert not result.ok
    assert result.max_rel_grad_diff < 1e-5  # the gradients of step 1 are right
    assert result.max_abs_param_diff > 1e-3
    assert result.max_rel_grad_norm_diff > 0.1


def test_fairscale_fsdp_does_not_run_on_the_cpu_as_it_is_shipped() -> None:
    require("fairscale-fsdp")

    def forward(context: RankContext) -> None:
        from fairscale.nn.data_parallel import FullyShardedDataParallel

        model = FullyShardedDataParallel(torch.nn.Linear(8, 8), compute_device=context.device)
        model(torch.ones(2, 8))

    with pytest.raises(RankError, match="KeyError: 'all_gather'"):
        on_ranks(forward, 2, 2)


@pytest.mark.slow
def test_deepspeed_mics_hangs_when_gradients_go_to_the_group_it_is_shipped_with() -> None:
    require("deepspeed-mics")
    words = ("impl.options.partition_size=2", "testbed.ranks=4", "testbed.timeout_s=10")
    with pytest.raises(RankError, match="made no progress for 10 s in step") as hung:
        check(configuration("deepspeed-mics", "impl.options.mend_reduction_group=false", *words))
    assert "allreduce_mics_shard_grads" in hung.value.details


def test_deepspeed_coalesced_gather_does_not_run_on_gloo() -> None:
    require("deepspeed-mics")

    def gather(context: RankContext) -> None:
        backend = importlib.import_module("deepspeed.comm.torch").TorchBackend("gloo", None, None)
        shard, whole = torch.ones(4), torch.zeros(8)
        backend.all_gather_coalesced([whole], [shard], group=dist.group.WORLD, async_op=True)

    with pytest.raises(RankError, match="startCoalescing"):
        on_ranks(gather, 2, 2)


@pytest.mark.parametrize("broadcast", [False, True])
def test_deepspeed_mics_broadcasts_initial_weights_inside_a_partition_group_only(broadcast: bool) -> None:
    """Every rank starts from weights of its own; two partition groups of two ranks."""
    require("deepspeed-mics")
    config = configuration("deepspeed-mics")

    def first_weights(context: RankContext) -> Tensor:
        if not broadcast:
            deepspeed_mics.broadcast_weights = lambda model: None
        trainer = trainer_on(context, config, seed=context.rank, partition_size=2)
        step(context, trainer, config)
        return trainer.full_parameters()["bert.encoder.layer.0.output.dense.weight"]

    weights = on_ranks(first_weights)
    assert torch.equal(weights[0], weights[1]) and torch.equal(weights[2], weights[3])
    assert torch.equal(weights[0], weights[2]) == broadcast


def test_deepspeed_mics_leaves_a_built_model_in_fp32_although_bf16_is_on() -> None:
    require("deepspeed-mics")

    def dtype_after(context: RankContext) -> torch.dtype:
        from deepspeed.runtime.zero.mics import MiCS_Init

        deepspeed = deepspeed_build.import_deepspeed("cpu")
        config = configuration("deepspeed-mics", "train.precision=bf16")
        zero = {"stage": 3, "mics_shard_size": 2}
        settings = deepspeed_zero.engine_config(recipe_of(config.train), zero)
        os.environ["NDEV_PER_NODE"] = "2"
        model = model_builder(config)()
        MiCS_Init(module=model, config_dict_or_path=settings)
        optimizer = torch.optim.AdamW(model.parameters())
        deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
        return next(model.parameters()).dtype

    assert on_ranks(dtype_after, 2, 2) == [torch.float32] * 2


@pytest.mark.parametrize(
    ("sizes", "least", "most"),
    [
        ("defaults", 0.5, 0.5),  # once per optimizer step: everything stays resident
        ("no reuse, nothing resident", 0.9, 1.3),  # once per micro-step: the prefetch prevents releases
        ("the suite's", 1.9, 2.2),
    ],
)
def test_deepspeed_zero3_gathers_a_small_model_twice_per_micro_step_only_with_sizes_made_for_it(
    sizes: str, least: float, most: float
) -> None:
    """Elements gathered per micro-step in the third step, in units of the model's size."""
    require("deepspeed-zero3")
    config = configuration("deepspeed-zero3", "train.micro_steps=2")
    made_for_it = deepspeed_zero.stage3_sizes

    def partly(model: Any) -> dict[str, int]:
        chosen = made_for_it(model)
        del chosen["stage3_max_live_parameters"]
        return chosen

    def gathered(context: RankContext) -> float:
        choices = {"defaults": lambda model: {}, "the suite's": made_for_it}
        deepspeed_zero.stage3_sizes = choices.get(sizes, partly)
        backend = importlib.import_module("deepspeed.comm.torch").TorchBackend
        original, elements = backend.all_gather_into_tensor, []

        def counting(self: Any, output_tensor: Tensor, *rest: Any, **more: Any) -> Any:
            elements.append(output_tensor.numel())
            return original(self, output_tensor, *rest, **more)

        backend.all_gather_into_tensor = counting
        trainer = trainer_on(context, config)
        for index in range(3):
            elements.clear()
            step(context, trainer, config, index)
        return sum(elements) / 2 / sum(value.ds_numel for value in trainer._parameters.values())

    for volume in on_ranks(gathered, 2, 2):
        assert least <= volume <= most


def test_a_model_that_deepspeed_s_defaults_release_is_left_to_them() -> None:
    large = torch.nn.ModuleList(torch.nn.Linear(20_000, 20_000, device="meta") for _ in range(3))
    assert sum(parameter.numel() for parameter in large.parameters()) > 1e9
    assert deepspeed_zero.stage3_sizes(large) == {}
    assert deepspeed_zero.stage3_sizes(large[:2])["stage3_param_persistence_threshold"] == 0


def test_gloo_reduce_scatter_sends_the_bytes_of_an_all_reduce() -> None:
    size = 1 << 20

    class Program:
        def __init__(self, context: RankContext) -> None:
            self._context = context
            context.barrier()

        def connections(self) -> list[traffic.Connection]:
            return traffic.connections()

        def reduce_scatter(self) -> None:
            dist.reduce_scatter_tensor(torch.empty(size // 16), torch.ones(size // 4))
            self._context.barrier()

    with LocalTestbed(4, 4).launch(Program, 60) as ranks:
        before = traffic.matrix(ranks.call("connections", timeout_s=30))
        ranks.call("reduce_scatter", timeout_s=30)
        after = traffic.matrix(ranks.call("connections", timeout_s=30))
    assert traffic.per_rank(before, after) == pytest.approx(2 * 3 / 4 * size, rel=0.02)  # not 3/4


def test_a_lock_that_a_killed_build_left_stops_torch_but_not_the_suite(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    require("deepspeed-zero1")
    built = deepspeed_build.extensions_folder()
    monkeypatch.setenv("SUITE_CACHE", str(tmp_path))
    folder = deepspeed_build.extensions_folder()
    shutil.copytree(built, folder)
    lock = folder / deepspeed_build.HELPER / "lock"
    lock.touch()
    assert not FileBaton(str(lock)).try_acquire()  # and FileBaton.wait() then waits until it is gone
    code = "from suite.impls.deepspeed_build import import_deepspeed; import_deepspeed('cpu')"
    subprocess.run([sys.executable, "-c", code], timeout=110, check=True, capture_output=True)
    assert not lock.exists()
