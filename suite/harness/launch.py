"""From a configuration to running ranks: everything that can be refused is refused before."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from suite.config import Config
from suite.errors import unknown
from suite.impls import registry
from suite.testbeds.forked import stay_forkable
from suite.testbeds.local import LocalTestbed
from suite.testbeds.testbed import RankContext, Ranks, Testbed
from suite.workloads import data, models

TESTBEDS = ("local",)


def testbed_of(config: Config) -> Testbed:
    """The configured testbed. Raises UsageError for a name that does not exist."""
    if config.testbed.name not in TESTBEDS:
        raise unknown("testbed", config.testbed.name, TESTBEDS)
    return LocalTestbed(config.world_size, config.ranks_per_node)


def prepare(config: Config) -> None:
    """Checks what only the rooms themselves know (the implementation's options, its packages, the
    text) and does once, in the parent, what all ranks need: tokenizer, imports, compiled helpers.

    Raises UsageError; nothing has been started or written into the results by then.
    """
    stay_forkable()
    testbed_of(config)
    registry.parse_options(config.impl.name, config.impl.options, config.world_size, config.ranks_per_node)
    data.prepare(config.workload, config.global_batch)
    models.preload(config.workload.model)
    registry.preload(config.impl.name)


def launch(config: Config, program: Callable[[Config, RankContext], Any]) -> AbstractContextManager[Ranks]:
    """Starts `program(config, context)` on every rank of the configured testbed."""
    return testbed_of(config).launch(
        lambda context: program(config, context), config.testbed.startup_timeout_s
    )
