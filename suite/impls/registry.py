"""All implementations by name. Importing this file imports no optional package."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from suite.errors import UsageError, first_line, unknown
from suite.impls import deepspeed_build
from suite.impls.ddp import DDP
from suite.impls.deepspeed_mics import DeepSpeedMiCS, MiCSOptions, require_mics
from suite.impls.deepspeed_shims import MICS_SHIMS
from suite.impls.deepspeed_zero import STAGE3_SIZES, DeepSpeedZero
from suite.impls.fairscale_sharded import FairScaleFSDP, FairScaleSDP, SDPOptions
from suite.impls.fairscale_shims import FSDP_SHIMS
from suite.impls.floor import Floor
from suite.impls.fsdp2 import FSDP2, HSDP, FSDP2MiCS, FSDP2MiCSOptions
from suite.impls.mics import MiCS
from suite.impls.options import Options, PartitionOptions
from suite.impls.sharded.options import MicsOptions, UnoptimizedOptions, Zero3Options
from suite.impls.trainer import BuildModel, Recipe, Topology, Trainer
from suite.impls.zero3 import Zero3


@dataclass(frozen=True)
class Implementation:
    """One entry of the registry.

    `trainer(build_model, recipe, topology, options)` builds it on a rank. `requires` are the
    optional packages that it imports, `extra` the extra of this project that installs them.
    `precisions` are those that it is set up for here; `limits_on_cpu` and `shims` (one line each) are
    shown beside its numbers. `check` raises UsageError when an installed package is not one it can
    use; `prepare(device_type)` runs once in the parent of ranks that are about to be forked.
    """

    name: str
    trainer: Callable[[BuildModel, Recipe, Topology, Any], Trainer]
    summary: str
    limits_on_cpu: str
    options: type[Options] = Options
    requires: tuple[str, ...] = ()
    extra: str | None = None
    shims: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ("fp32", "bf16")
    check: Callable[[], None] | None = None
    prepare: Callable[[str | None], None] | None = None
    has_checkpoints: bool = False


ENGINE_PRECISIONS = ("fp32", "bf16", "fp16")

_ZERO_STAGES = {
    1: "DeepSpeed ZeRO-1: optimizer states sharded over the world",
    2: "DeepSpeed ZeRO-2: optimizer states and gradients sharded over the world",
    3: "DeepSpeed ZeRO-3: parameters, gradients and optimizer states sharded over the world",
}


def _deepspeed_zero(stage: int, summary: str) -> Implementation:
    return Implementation(
        f"deepspeed-zero{stage}",
        partial(DeepSpeedZero, stage),
        summary,
        "Its streams do nothing on the CPU: only what it starts asynchronously overlaps.",
        requires=("deepspeed",),
        extra="baselines",
        shims=(STAGE3_SIZES,) if stage == 3 else (),
        prepare=deepspeed_build.prepare,
    )


_ALL = (
    Implementation(
        "floor",
        Floor,
        "every rank steps alone, without gradient communication: a lower bound, not a method",
        "None of its own: it does not communicate.",
    ),
    Implementation(
        "ddp",
        DDP,
        "torch DistributedDataParallel: everything on every rank, gradients all-reduced",
        "Buckets are all-reduced by gloo threads that share the cores with the backward.",
    ),
    Implementation(
        "fsdp2",
        FSDP2,
        "torch fully_shard per block: parameters, gradients and states sharded over the world",
        "Its gathers block on the CPU, and gloo's reduce-scatter moves an all-reduce's bytes.",
    ),
    Implementation(
        "hsdp",
        HSDP,
        "fully_shard inside partition groups, gradients all-reduced across them at the last micro-step",
        "Its gathers block on the CPU, and gloo's reduce-scatter moves an all-reduce's bytes.",
        options=PartitionOptions,
    ),
    Implementation(
        "fsdp2-mics",
        FSDP2MiCS,
        "HSDP with this project's hierarchical collectives, handed to fully_shard by its public interface",
        "Its gathers block on the CPU.",
        options=FSDP2MiCSOptions,
    ),
    *(_deepspeed_zero(stage, summary) for stage, summary in _ZERO_STAGES.items()),
    Implementation(
        "deepspeed-mics",
        DeepSpeedMiCS,
        "DeepSpeed MiCS: ZeRO-3 inside partition groups, gradients all-reduced across them",
        "Its streams do nothing on the CPU: only what it starts asynchronously overlaps.",
        options=MiCSOptions,
        requires=("deepspeed",),
        extra="baselines",
        shims=(*MICS_SHIMS, STAGE3_SIZES),
        check=require_mics,
        prepare=deepspeed_build.prepare,
    ),
    Implementation(
        "fairscale-sdp",
        FairScaleSDP,
        "FairScale OSS + ShardedDataParallel: optimizer states and gradients sharded by parameter",
        "Reductions run in gloo threads that share the cores with the backward.",
        options=SDPOptions,
        requires=("fairscale",),
        extra="baselines",
        shims=("zero_grad(set_to_none=False): with torch's present default it trains wrong",),
    ),
    Implementation(
        "fairscale-fsdp",
        FairScaleFSDP,
        "FairScale FullyShardedDataParallel per block: like ZeRO-3",
        "Its streams do nothing on the CPU: only what it starts asynchronously overlaps.",
        requires=("fairscale",),
        extra="baselines",
        shims=FSDP_SHIMS,
    ),
    Implementation(
        "zero3",
        Zero3,
        "this project's engine, one partition group: ZeRO-3 with every published optimisation",
        "Its messages are sent by threads that share the cores with the compute.",
        options=Zero3Options,
        precisions=ENGINE_PRECISIONS,
        has_checkpoints=True,
    ),
    Implementation(
        "zero3-unoptimized",
        Zero3,
        "the same engine with every optimisation off: stage 3 as it was before them",
        "Blocking by design, and on gloo's own collectives.",
        options=UnoptimizedOptions,
        precisions=ENGINE_PRECISIONS,
        has_checkpoints=True,
    ),
    Implementation(
        "mics",
        MiCS,
        "the same engine with partition groups, hierarchical collectives and two-hop synchronisation",
        "Its messages are sent by threads that share the cores with the compute.",
        options=MicsOptions,
        precisions=ENGINE_PRECISIONS,
        has_checkpoints=True,
    ),
)

IMPLEMENTATIONS: dict[str, Implementation] = {item.name: item for item in _ALL}


def find(name: str) -> Implementation:
    """Raises UsageError, naming the closest known one, when there is none by that name."""
    if name not in IMPLEMENTATIONS:
        raise unknown("implementation", name, IMPLEMENTATIONS)
    return IMPLEMENTATIONS[name]


def require(name: str) -> None:
    """Raises UsageError when this installation cannot run the implementation. Imports nothing."""
    item = find(name)
    missing = [package for package in item.requires if importlib.util.find_spec(package) is None]
    if missing:
        raise UsageError(
            f"impl={name} needs {' and '.join(missing)}; pip install 'sharded-training-suite[{item.extra}]'"
        )
    if item.check is not None:
        item.check()


def parse_options(name: str, options: Mapping[str, Any], world_size: int, ranks_per_node: int) -> Options:
    """The typed options of an implementation, with their defaults for that world filled in.

    Raises UsageError for an unknown implementation, key or value, and when the implementation
    cannot run with this installation.
    """
    item = find(name)
    known = [field.name for field in fields(item.options)]
    for key in options:
        if key not in known:
            if not known:
                raise UsageError(f"impl.options.{key} is unknown; {name} has no options")
            raise unknown(f"option of {name}", str(key), known)
    require(name)
    return _typed(item.options, options).resolve(world_size, ranks_per_node)


def require_precision(name: str, precision: str) -> None:
    """Raises UsageError when the implementation is not set up for it here."""
    known = find(name).precisions
    if precision not in known:
        raise UsageError(f"train.precision={precision} is not there for {name}; use {' or '.join(known)}")


def require_checkpoints(name: str) -> None:
    """Raises UsageError when the implementation cannot save and load its training here."""
    if not find(name).has_checkpoints:
        able = [item.name for item in _ALL if item.has_checkpoints]
        raise UsageError(
            f"train.checkpoint_every: {name} has no checkpoints here; use impl={' or '.join(able)}"
        )


def preload(name: str, device_type: str | None = None) -> None:
    """Imports what the implementation needs, so that forked ranks find it in memory.

    `device_type` is that of the ranks; None means an accelerator where there is one, else the CPU. For
    an accelerator nothing is imported: a package that looks at the device then would keep the forked
    ranks from using it. Raises UsageError when a package cannot be imported or a helper not compiled.
    """
    item = find(name)
    require(name)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    on_cpu = device_type == "cpu" or (device_type is None and accelerator is None)
    try:
        if item.prepare is not None:
            item.prepare(device_type)
        for package in item.requires if on_cpu else ():
            importlib.import_module(package)
    except UsageError:
        raise
    except Exception as error:  # whatever an import or a compiler may raise: it costs this one, not the sweep
        raise UsageError(f"impl={name} cannot be prepared: {first_line(error)}") from error


def build(
    name: str,
    build_model: BuildModel,
    recipe: Recipe,
    topology: Topology,
    options: Mapping[str, Any] | None = None,
) -> Trainer:
    """The implementation at work on this rank; every rank calls it, after `init_process_group` and
    with the usual RANK, LOCAL_RANK, WORLD_SIZE and MASTER_* in the environment."""
    typed = parse_options(name, options or {}, topology.world_size, topology.ranks_per_node)
    return find(name).trainer(build_model, recipe, topology, typed)


def _typed(kind: type[Options], options: Mapping[str, Any]) -> Options:
    try:
        typed = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), dict(options)))
    except OmegaConfBaseException as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"bad value for impl.options.{error.full_key}: {reason}") from error
    assert isinstance(typed, kind)
    return typed
