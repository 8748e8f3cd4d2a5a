"""The switches of an implementation: one dataclass each, checked against the world they run in."""

from __future__ import annotations

from dataclasses import dataclass, replace

from suite.errors import UsageError


@dataclass
class Options:
    """An implementation without switches; base of those with some."""

    def resolve(self, world_size: int, ranks_per_node: int) -> Options:
        """These options with every default filled in for that world.

        Raises UsageError for what cannot run in it.
        """
        return self


@dataclass
class PartitionOptions(Options):
    """`partition_size`: ranks that together hold one replica of the model states.

    None means a node where there are several, otherwise half of the world.
    """

    partition_size: int | None = None

    def resolve(self, world_size: int, ranks_per_node: int) -> PartitionOptions:
        size = self.partition_size
        if size is None:
            size = default_partition_size(world_size, ranks_per_node)
        check_partition_size(size, world_size)
        return replace(self, partition_size=size)


def default_partition_size(world_size: int, ranks_per_node: int) -> int:
    """A node where there are several, otherwise half of the world."""
    return ranks_per_node if world_size > ranks_per_node else max(1, world_size // 2)


def check_partition_size(size: int, world_size: int) -> None:
    """Raises UsageError unless partition groups of that size fill the world."""
    if size < 1 or world_size % size:
        divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
        raise UsageError(
            f"impl.options.partition_size={size} does not divide the {world_size} ranks; "
            f"use one of {', '.join(map(str, divisors))}"
        )
