"""From a configuration to running ranks: everything that can be refused is refused before."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from suite.config import Config
from suite.config_load import load
from suite.errors import UsageError, unknown
from suite.harness.nodes import nodes_of, require_equal, summary
from suite.impls import registry
from suite.testbeds.emulated import EmulatedTestbed
from suite.testbeds.forked import stay_forkable
from suite.testbeds.local import LocalTestbed, cores
from suite.testbeds.testbed import RankContext, Ranks, Testbed
from suite.testbeds.torchrun import Seats, TorchrunTestbed
from suite.workloads import data, models
from suite.workloads.scale_model import Host, ScaleModel, scale_model

TESTBEDS = ("local", "emulated", "torchrun", "slurm")

Place = Callable[[Config], Testbed]
"""Where a configuration runs: `testbed_of`, or `on_seats` in processes that torchrun has started."""


def testbed_of(config: Config) -> Testbed:
    """The configured testbed, on this machine. Raises UsageError when it is not there."""
    name = config.testbed.name
    if name not in TESTBEDS:
        raise unknown("testbed", name, TESTBEDS)
    if name == "torchrun":
        raise UsageError(
            "testbed=torchrun runs in processes that torchrun has started; write "
            "torchrun --nproc-per-node=... -m suite.cli and then this command"
        )
    if name == "slurm":
        raise UsageError("testbed=slurm is for `suite run`, `suite check`, `suite sweep` and `suite doctor`")
    scale = scale_of(config)
    if scale is None:
        return LocalTestbed(config.world_size, config.ranks_per_node)
    nodes = config.world_size // config.ranks_per_node
    return EmulatedTestbed(nodes, config.ranks_per_node, scale.link_bits_per_s)


def on_seats(seats: Seats) -> Place:
    """Where configurations run for the process that drives those seats; the reference runs and all else
    that names no such testbed stay on this machine. Raises UsageError when the seats' nodes differ."""
    nodes = nodes_of(seats)
    require_equal(nodes)

    def place(config: Config) -> Testbed:
        if config.testbed.name not in ("torchrun", "slurm"):
            return testbed_of(config)
        if (config.world_size, config.ranks_per_node) != (len(seats), seats.ranks_per_node):
            raise UsageError(
                f"torchrun has started {len(seats)} ranks, {seats.ranks_per_node} per node; "
                f"testbed.ranks={config.world_size} testbed.ranks_per_node={config.ranks_per_node} "
                "must say the same"
            )
        return TorchrunTestbed(seats, config.cluster.env if config.cluster else {}, summary(nodes))

    return place


def scale_of(config: Config) -> ScaleModel | None:
    """How the configured testbed relates to the real cluster; None where it is the real thing."""
    workload, train, cluster = config.workload, config.train, config.cluster
    if config.testbed.name != "emulated":
        return None
    assert cluster is not None and workload.scale_of is not None, "load() refuses to emulate nothing"
    real = load([f"workload={workload.scale_of}"]).workload.model
    host = Host(config.world_size // config.ranks_per_node, config.world_size, cores())
    return scale_model(workload.model, real, cluster, train, host, config.testbed.dilation)


def prepare(config: Config, place: Place = testbed_of) -> None:
    """Checks what only the rooms themselves know (the implementation's options, its packages, the
    text) and does once, where ranks are forked from, what all ranks need: tokenizer, imports, compiled
    helpers.

    Raises UsageError; nothing has been started or written into the results by then.
    """
    testbed = place(config)
    testbed.everywhere(partial(_prepare_process, config, testbed.device_type))


def require(config: Config) -> None:
    """What can be refused without the machine that will run it. Raises UsageError."""
    registry.parse_options(config.impl.name, config.impl.options, config.world_size, config.ranks_per_node)
    registry.require_precision(config.impl.name, config.train.precision)


def _prepare_process(config: Config, device_type: str | None) -> None:
    stay_forkable()
    require(config)
    data.prepare(config.workload, config.global_batch)
    models.preload(config.workload.model)
    registry.preload(config.impl.name, device_type)


def step_timeout_s(config: Config, steps_before: int) -> float:
    """How long the ranks may stand still in their next step: longer while units are being compiled."""
    compiling = steps_before == 0 and bool(config.impl.options.get("compile"))
    return config.testbed.startup_timeout_s if compiling else config.testbed.timeout_s


def launch(
    config: Config, program: Callable[[Config, RankContext], Any], place: Place = testbed_of
) -> AbstractContextManager[Ranks]:
    """Starts `program(config, context)` on every rank of the configured testbed."""
    return place(config).launch(partial(program, config), config.testbed.startup_timeout_s)
