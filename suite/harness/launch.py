"""From a configuration to running ranks: everything that can be refused is refused before."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from suite.config import Config, load
from suite.errors import unknown
from suite.impls import registry
from suite.testbeds.emulated import EmulatedTestbed
from suite.testbeds.forked import stay_forkable
from suite.testbeds.local import LocalTestbed
from suite.testbeds.testbed import RankContext, Ranks, Testbed
from suite.workloads import data, models
from suite.workloads.scale_model import Host, ScaleModel, scale_model

TESTBEDS = ("local", "emulated")


def testbed_of(config: Config) -> Testbed:
    """The configured testbed. Raises UsageError for a name that does not exist."""
    if config.testbed.name not in TESTBEDS:
        raise unknown("testbed", config.testbed.name, TESTBEDS)
    scale = scale_of(config)
    if scale is None:
        return LocalTestbed(config.world_size, config.ranks_per_node)
    nodes = config.world_size // config.ranks_per_node
    return EmulatedTestbed(nodes, config.ranks_per_node, scale.link_bits_per_s)


def scale_of(config: Config) -> ScaleModel | None:
    """How the configured testbed relates to the real cluster; None where it is the real thing."""
    workload, train, cluster = config.workload, config.train, config.cluster
    if config.testbed.name != "emulated":
        return None
    assert cluster is not None and workload.scale_of is not None, "load() refuses to emulate nothing"
    real = load([f"workload={workload.scale_of}"]).workload.model
    host = Host(config.world_size // config.ranks_per_node, config.world_size, os.cpu_count() or 1)
    return scale_model(workload.model, real, cluster, train, host, config.testbed.dilation)


def prepare(config: Config) -> None:
    """Checks what only the rooms themselves know (the implementation's options, its packages, the
    text) and does once, in the parent, what all ranks need: tokenizer, imports, compiled helpers.

    Raises UsageError; nothing has been started or written into the results by then.
    """
    stay_forkable()
    testbed = testbed_of(config)
    registry.parse_options(config.impl.name, config.impl.options, config.world_size, config.ranks_per_node)
    registry.require_precision(config.impl.name, config.train.precision)
    data.prepare(config.workload, config.global_batch)
    models.preload(config.workload.model)
    registry.preload(config.impl.name, testbed.device_type)


def launch(config: Config, program: Callable[[Config, RankContext], Any]) -> AbstractContextManager[Ranks]:
    """Starts `program(config, context)` on every rank of the configured testbed."""
    return testbed_of(config).launch(
        lambda context: program(config, context), config.testbed.startup_timeout_s
    )
