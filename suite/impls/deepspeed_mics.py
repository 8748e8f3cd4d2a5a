"""DeepSpeed's own MiCS, which its releases have carried up to 0.19.6."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from suite.errors import UsageError
from suite.impls.deepspeed_build import import_deepspeed
from suite.impls.deepspeed_shims import broadcast_weights, mend_coalesced_gather, mended_mics_init
from suite.impls.deepspeed_zero import DeepSpeedZero, stage3_sizes
from suite.impls.options import PartitionOptions
from suite.impls.trainer import BuildModel, Recipe, Topology, Trainer


@dataclass
class MiCSOptions(PartitionOptions):
    """`partition_size` as for every method that has one; `hierarchical` gathers parameters between
    the nodes first and then inside them, for partition groups of several whole nodes.

    `mend_reduction_group=False` leaves DeepSpeed's group for gradients as it is shipped: the first
    step hangs (see docs/findings.md). It is here so that the checks can be seen to catch that.
    """

    hierarchical: bool = False
    mend_reduction_group: bool = True

    def resolve(self, world_size: int, ranks_per_node: int) -> MiCSOptions:
        resolved = super().resolve(world_size, ranks_per_node)
        assert isinstance(resolved, MiCSOptions) and resolved.partition_size is not None
        size = resolved.partition_size
        if resolved.hierarchical and (size <= ranks_per_node or size % ranks_per_node):
            raise UsageError(
                f"impl.options.hierarchical=true needs a partition_size of several nodes, "
                f"not {size} with {ranks_per_node} ranks per node; use a larger multiple of "
                f"{ranks_per_node}"
            )
        return resolved


class DeepSpeedMiCS(DeepSpeedZero):
    """ZeRO-3 inside partition groups: gradients are reduce-scattered in the partition group at every
    micro-step and all-reduced in the replication group at the last one.

    Everything else, the dtypes included, as in DeepSpeed's stage 3. The masters that
    `full_parameters` shows are gathered in this rank's own partition group.
    """

    def __init__(
        self, build_model: BuildModel, recipe: Recipe, topology: Topology, options: MiCSOptions
    ) -> None:
        Trainer.__init__(self, recipe, topology)
        self.partition_size = options.partition_size
        self._mended = options.mend_reduction_group
        import_deepspeed(topology.device.type)
        # DeepSpeed asks the accelerator for it, which on the CPU is another question.
        os.environ["NDEV_PER_NODE"] = str(topology.ranks_per_node)
        model = build_model()
        sizes = {
            "mics_shard_size": options.partition_size,
            "mics_hierarchical_params_gather": options.hierarchical,
        }
        self._start(model, {"stage": 3, **stage3_sizes(model), **sizes})

    def _shard(self, model: nn.Module, config: dict[str, Any]) -> nn.Module:
        from deepspeed.runtime.zero.mics import MiCS_Init

        mend_coalesced_gather()
        # deepspeed.initialize casts the model for the ZeRO stages, but not one that is sharded already.
        model.to(self.topology.device, self.recipe.dtype)
        broadcast_weights(model)
        wrap = mended_mics_init() if self._mended else MiCS_Init
        wrap(module=model, config_dict_or_path=config)
        return model


def require_mics() -> None:
    """Raises UsageError when the installed DeepSpeed has no MiCS. Imports nothing."""
    package = importlib.util.find_spec("deepspeed")
    if package is None or package.origin is None:
        return
    if not (Path(package.origin).parent / "runtime" / "zero" / "mics.py").exists():
        version = importlib.metadata.version("deepspeed")
        raise UsageError(f"DeepSpeed {version} has no MiCS (removed after 0.19.6); install deepspeed==0.19.6")
