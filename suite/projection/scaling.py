"""Weak scaling: the same work per GPU on ever more of them, and where each method stops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from suite.config import Config
from suite.projection.assumptions import Assumptions
from suite.projection.methods import find_method
from suite.projection.project import Projection, project, takes_partition, with_nodes

NODES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 12544)
"""With 8 GPUs each: 8 to 100,352; the last holds partition groups of up to 256 nodes."""
STOPS_BELOW = 0.8
"""A method has stopped scaling when its efficiency is below this share."""


@dataclass(frozen=True)
class Point:
    """`efficiency`: throughput per GPU against the method's smallest cluster that holds the model;
    None where this one does not hold it."""

    projection: Projection
    efficiency: float | None

    @property
    def gpus(self) -> int:
        return self.projection.world_size


@dataclass(frozen=True)
class Curve:
    """`stops_at`: the first number of GPUs below the limit; None when it scales to the last."""

    impl: str
    points: tuple[Point, ...]
    stops_at: int | None


def weak_scaling(
    config: Config, nodes: Sequence[int] = NODES, assumptions: Assumptions | None = None
) -> Curve:
    """The configuration on each of these clusters, but for those whose nodes its partition groups do not
    fill. Raises UsageError for what cannot be on any.

    A partition size that is left open is chosen on the smallest cluster that holds the model, and kept.
    """
    points: list[Point] = []
    base: Projection | None = None
    if not any(takes_partition(with_nodes(config, count)) for count in nodes):
        project(with_nodes(config, nodes[-1]), assumptions)  # says which sizes there are
    for count in nodes:
        if not takes_partition(with_nodes(config, count)):
            continue
        projection = project(with_nodes(config, count), assumptions)
        if base is None and projection.memory.fits:
            base = projection
            config = _keeping_partition(config, projection)
        fits = base is not None and projection.memory.fits
        per_gpu = projection.model_tflops_per_gpu
        efficiency = per_gpu / base.model_tflops_per_gpu if fits and base is not None else None
        points.append(Point(projection, efficiency))
    slow = (p.gpus for p in points if p.efficiency is not None and p.efficiency < STOPS_BELOW)
    return Curve(config.impl.name, tuple(points), next(slow, None))


def _keeping_partition(config: Config, chosen: Projection) -> Config:
    if not find_method(config.impl.name).groups:
        return config
    options = {**config.impl.options, "partition_size": chosen.partition_size}
    return replace(config, impl=replace(config.impl, options=options))
