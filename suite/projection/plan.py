"""Which configuration of MiCS trains a model fastest on a given cluster, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from suite.config import Config
from suite.errors import UsageError
from suite.projection.assumptions import Assumptions, default_assumptions
from suite.projection.hardware import GIB, hardware_of
from suite.projection.project import Projection, memory_for, partition_sizes, project
from suite.projection.published_runs import projected_config

SAMPLES_PER_GPU = 64
"""Of a step, when no global batch is asked for: 8192 samples on 128 GPUs."""
EQUAL = 0.005
"""Relative difference in throughput below which the model cannot tell two configurations apart."""


@dataclass(frozen=True)
class Choice:
    """What the search varies."""

    partition_size: int
    micro_batch: int
    micro_steps: int
    hierarchical: bool
    world_optimizer: bool

    def applied_to(self, config: Config) -> Config:
        """The configuration with this choice made."""
        options = {
            "partition_size": self.partition_size,
            "optimizer_sharding": "world" if self.world_optimizer else "partition",
            "hierarchical": self.hierarchical,
        }
        train = replace(config.train, micro_batch=self.micro_batch, micro_steps=self.micro_steps)
        return replace(config, impl=replace(config.impl, options=options), train=train)


@dataclass(frozen=True)
class Candidate:
    """A choice and what became of it; `reason` says why it is not the first, empty for that."""

    choice: Choice
    projection: Projection
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """`fastest` in order, equally fast ones by memory; `lost` is the best of every other partition
    size, or why it cannot run."""

    fastest: tuple[Candidate, ...]
    lost: tuple[str, ...]
    tried: int
    out_of_memory: int


def make_plan(
    model: str,
    cluster: str,
    gpus: int,
    global_batch: int | None = None,
    top: int = 5,
    assumptions: Assumptions | None = None,
) -> Plan:
    """Searches all choices for that many GPUs; `global_batch` in samples per step.

    Raises UsageError when the GPUs do not fill nodes, the batch cannot be dealt out, or nothing fits.
    """
    given = assumptions or default_assumptions()
    base = _base(model, cluster, gpus)
    choices = list(_choices(base, gpus, global_batch, given))
    fitting: list[Candidate] = []
    short: dict[int, float] = {}
    for choice in choices:
        config = choice.applied_to(base)
        memory = memory_for(config, given)
        if memory.fits:
            fitting.append(Candidate(choice, project(config, given)))
        else:
            need = memory.total / GIB
            short[choice.partition_size] = min(need, short.get(choice.partition_size, need))
    if not fitting:
        raise UsageError(
            f"{model} does not fit {gpus} GPUs of {cluster}: the smallest configuration needs "
            f"{min(short.values()):.0f} GiB on each; use more GPUs"
        )
    ranked = _ranked(fitting)
    fastest = [_explained(item, ranked[0]) for item in ranked[:top]]
    return Plan(tuple(fastest), tuple(_lost(ranked, short)), len(choices), len(choices) - len(fitting))


def _base(model: str, cluster: str, gpus: int) -> Config:
    words = ["impl=mics", f"workload={model}", f"cluster={cluster}"]
    config = projected_config(words)
    assert config.cluster is not None
    per_node = config.cluster.gpus_per_node
    if gpus < 1 or gpus % per_node:
        raise UsageError(f"--gpus {gpus} does not fill nodes of {cluster}; use a multiple of {per_node}")
    return projected_config([*words, f"cluster.nodes={gpus // per_node}"])


def _choices(config: Config, gpus: int, global_batch: int | None, given: Assumptions) -> Iterator[Choice]:
    assert config.cluster is not None
    hardware = hardware_of(config.cluster, given)
    samples = SAMPLES_PER_GPU if global_batch is None else global_batch // gpus
    if global_batch is not None and (global_batch % gpus or global_batch < gpus):
        raise UsageError(f"--global-batch {global_batch} does not divide by {gpus} GPUs; use a multiple")
    batches = [size for size in range(1, samples + 1) if samples % size == 0]
    for partition in partition_sizes(hardware):
        for micro_batch in batches:
            for hierarchical in (False, True) if partition > hardware.ranks_per_node else (False,):
                for world in (False, True) if partition < gpus else (False,):
                    yield Choice(partition, micro_batch, samples // micro_batch, hierarchical, world)


def _ranked(fitting: Sequence[Candidate]) -> list[Candidate]:
    """Those that are as fast as the fastest by what they need, then the others by speed."""
    best = max(item.projection.model_tflops_per_gpu for item in fitting)

    def key(item: Candidate) -> tuple[bool, float]:
        rate = item.projection.model_tflops_per_gpu
        slower = rate < (1 - EQUAL) * best
        return slower, -rate if slower else item.projection.memory.total

    return sorted(fitting, key=key)


def _explained(item: Candidate, first: Candidate) -> Candidate:
    return Candidate(item.choice, item.projection, _reason(item.projection, first.projection))


def _reason(loser: Projection, winner: Projection) -> str:
    """What the loser's step has more of."""
    if loser is winner:
        return ""
    behind = 1 - loser.model_tflops_per_gpu / winner.model_tflops_per_gpu
    if behind <= EQUAL:
        more = (loser.memory.total - winner.memory.total) / GIB
        return f"as fast (within {EQUAL:.1%}), but takes {more:.1f} GiB more" if more > 0 else "as fast"
    waits, computes = loser.exposed_s - winner.exposed_s, loser.compute_s - winner.compute_s
    if waits >= computes:
        return f"waits {waits:.2f} s longer for communication"
    return f"computes {computes:.2f} s longer"


def _lost(ranked: Sequence[Candidate], short: dict[int, float]) -> Iterator[str]:
    """One line for every partition size that did not win."""
    winner = ranked[0]
    best: dict[int, Candidate] = {}
    for item in ranked:
        best.setdefault(item.choice.partition_size, item)
    for size in sorted({*best, *short} - {winner.choice.partition_size}):
        if size in best:
            projection = best[size].projection
            yield (
                f"partition size {size}: at best {projection.hardware_tflops_per_gpu:.1f} TFLOPS/GPU; "
                f"{_reason(projection, winner.projection)}"
            )
        else:
            yield f"partition size {size}: out of memory, needs at least {short[size]:.0f} GiB per GPU"
