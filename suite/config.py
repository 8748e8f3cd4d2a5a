"""The typed configuration: OmegaConf dotlists over the presets in `configs/`.

Every room reads these dataclasses; nobody reads YAML or dotlists elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from suite.errors import UsageError, unknown
from suite.secrets import names_a_secret

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SHORT_KEYS = ("impl", "testbed", "workload", "cluster")
"""Keys with a name of their own, which may be given alone: `impl=ddp`."""
PRECISIONS = ("fp32", "bf16", "fp16")
REAL_CLUSTERS = ("torchrun", "slurm")
"""Testbeds on machines that something else than this program has brought together."""
NOT_MEASURED = (
    *("timeout_s", "startup_timeout_s", "min_ranks"),
    *("partition", "time_limit", "max_nodes", "sbatch"),
)
"""Keys of `testbed` that do not change what is measured."""


@dataclass
class ImplConfig:
    """Which implementation, and its own switches (checked against its options dataclass)."""

    name: str = "ddp"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class ModelConfig:
    """Shape of a masked-language model; `family` is `bert` or `roberta`."""

    family: str = "bert"
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    intermediate: int = 512
    vocab: int = 2048
    seq_len: int = 64


@dataclass
class WorkloadConfig:
    """A preset of `configs/workloads/`.

    `data` is `python-docs` (the text that every Python carries), `synthetic` (random tokens),
    a path to a text file or folder, or `hf:NAME` (a Hugging Face dataset, for those online).
    `scale_of` names the workload whose blocks this one's stand for on the emulated testbed.
    """

    name: str = "bert-tiny"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: str = "python-docs"
    scale_of: str | None = None


@dataclass
class TrainConfig:
    """What every implementation of a comparison shares. `micro_batch` is in samples per rank;
    `global_batch` (samples per step) may be given instead and is then dealt out to the ranks.
    `checkpoint_every` so many steps `suite run` saves the training, to go on from there after a failure
    (see `testbed.min_ranks`) or an interruption."""

    micro_batch: int = 2
    micro_steps: int = 1
    global_batch: int | None = None
    steps: int = 5
    warmup: int = 2
    precision: str = "fp32"
    lr: float = 1e-3
    weight_decay: float = 0.01
    clip: float | None = None
    activation_checkpointing: bool = False
    seed: int = 0
    checkpoint_every: int | None = None


@dataclass
class TestbedConfig:
    """Where ranks run: `local`, `emulated`, `torchrun` (in processes that torchrun has started) or `slurm`
    (in a job of such). `ranks = nodes * ranks_per_node`; any two say the third.

    `dilation` is how many times slower than the real cluster an emulated one runs; None chooses one
    for which this host is fast enough.

    `timeout_s` is how long all ranks of a run may stand still (begin no block, finish no collective)
    before it is ended; `startup_timeout_s` the same for building and compiling the model. With
    `min_ranks` a training that saves checkpoints goes on with fewer ranks, down to that many, when one fails.

    `alone`: the implementations of a cohort are not alive together, each in a part of the memory, but
    started one after the other in several rounds.

    For Slurm only: `partition` and `time_limit` (`90m`, `2h`, `1d`; None is the cluster's default),
    `max_nodes`, which all jobs of a sweep together occupy at most, and `sbatch`, further options of that
    command (`--gres=gpu:8`). They change where and when something is measured, not what.
    """

    __test__ = False  # the name starts with "Test", but pytest has nothing to collect here

    name: str = "local"
    ranks: int | None = None
    nodes: int | None = None
    ranks_per_node: int | None = None
    dilation: float | None = None
    timeout_s: float = 25.0
    startup_timeout_s: float = 300.0
    min_ranks: int | None = None
    alone: bool = False
    partition: str | None = None
    time_limit: str | None = None
    max_nodes: int | None = None
    sbatch: list[str] = field(default_factory=list)


@dataclass
class ClusterConfig:
    """One kind of node, and how many of them (`configs/clusters/`): what the emulated testbed makes a
    scale model of and the projection computes with. Bandwidths are per direction.

    `peak_tflops`: dense half precision with tensor cores, per GPU; `kernel_efficiency`: the share of it
    that a transformer block's kernels reach when they wait for nothing. `intra_node_gb_s`: per GPU,
    gigabytes/s through NVLink or what there is. `inter_node_gbit_s`: per node, gigabits/s. `network`
    names the kind of network between nodes, whose efficiency is assumed in `configs/projection.yaml`.

    `env` are environment variables for ranks on the real cluster (`FI_PROVIDER`, `NCCL_*`); what is
    already set there wins. They are recorded with each result: secrets do not belong here.
    """

    name: str = "p3dn"
    nodes: int = 8
    gpus_per_node: int = 8
    gpu: str = "V100"
    peak_tflops: float = 125.0
    kernel_efficiency: float = 0.5
    memory_gb: float = 32.0
    memory_gb_s: float = 900.0
    intra_node_gb_s: float = 150.0
    intra_node_latency_us: float = 5.0
    network: str = "efa-100g"
    inter_node_gbit_s: float = 100.0
    inter_node_latency_us: float = 20.0
    env: dict[str, str] = field(default_factory=dict)


@dataclass
class WandbConfig:
    """Weights & Biases; `offline` needs no account, `online` a login, `disabled` writes nothing."""

    mode: str = "offline"
    entity: str | None = None
    project: str = "sharded-data-parallel"


@dataclass
class Config:
    """One run of one implementation. `cluster` matters where something else than this host is meant."""

    impl: ImplConfig = field(default_factory=ImplConfig)
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    testbed: TestbedConfig = field(default_factory=TestbedConfig)
    cluster: ClusterConfig | None = None
    wandb: WandbConfig = field(default_factory=WandbConfig)
    out: str | None = None

    @property
    def world_size(self) -> int:
        assert self.testbed.ranks is not None, "Config is made by load(), which fills in ranks"
        return self.testbed.ranks

    @property
    def ranks_per_node(self) -> int:
        assert self.testbed.ranks_per_node is not None
        return self.testbed.ranks_per_node

    @property
    def global_batch(self) -> int:
        """Samples per optimizer step over all ranks and micro-steps."""
        return self.train.micro_batch * self.train.micro_steps * self.world_size

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def hash(self) -> str:
        """Identity of the result: equal hashes would measure the same thing."""
        what = self.to_dict()
        for key in ("wandb", "out"):
            del what[key]
        for key in NOT_MEASURED:
            del what["testbed"][key]
        del what["train"]["checkpoint_every"]
        if not self.testbed.alone:  # results from before this key was there keep their identity
            del what["testbed"]["alone"]
        # On any other testbed the ranks never see the cluster's environment.
        if what["cluster"] is not None and self.testbed.name not in REAL_CLUSTERS:
            del what["cluster"]["env"]
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def presets(kind: str) -> list[str]:
    """Names of the YAML presets under `configs/<kind>/`."""
    return sorted(path.stem for path in (CONFIGS / kind).glob("*.yaml"))


def load(overrides: Iterable[str] | Mapping[str, Any] = ()) -> Config:
    """The configuration for a dotlist (`["impl=ddp", "train.steps=3"]`) or a nested mapping.

    `impl=NAME` and `testbed=NAME` are short for `impl.name=NAME` and `testbed.name=NAME`;
    `workload=NAME` and `cluster=NAME` load that preset. Raises UsageError for an unknown key, preset or
    value.
    """
    try:
        given = _given(overrides)
        _refuse_references(OmegaConf.to_container(given, resolve=False))
        for key in SHORT_KEYS:
            if given.get(key) is not None and not isinstance(given[key], DictConfig):
                given[key] = {"name": given[key]}
        config = _typed(given)
    except (OmegaConfBaseException, RecursionError) as error:
        raise UsageError(f"cannot read the configuration: {_first_line(error)}") from error
    return _resolve(config)


def _typed(given: DictConfig) -> Config:
    merged = OmegaConf.structured(Config)
    merged = _merge(
        merged, _preset("workloads", OmegaConf.select(given, "workload.name", default="bert-tiny"))
    )
    if given.get("cluster") is not None:
        merged.cluster = ClusterConfig()
        merged = _merge(merged, _preset("clusters", OmegaConf.select(given, "cluster.name", default="p3dn")))
    config = OmegaConf.to_object(_merge(merged, given))
    assert isinstance(config, Config)
    return config


def _refuse_references(value: Any) -> None:
    """No value may be fetched from elsewhere: an environment variable, for one, may hold a secret."""
    if isinstance(value, dict):
        for item in value.values():
            _refuse_references(item)
    elif isinstance(value, list):
        for item in value:
            _refuse_references(item)
    elif isinstance(value, str) and ("${" in value or value == "???"):
        raise UsageError(f"{value!r} is not possible as a value; write the value itself")


def _preset(kind: str, name: Any) -> Any:
    if name not in presets(kind):
        raise unknown(kind.removesuffix("s"), str(name), presets(kind))
    return OmegaConf.load(CONFIGS / kind / f"{name}.yaml")


def _given(overrides: Iterable[str] | Mapping[str, Any]) -> DictConfig:
    if isinstance(overrides, Mapping):
        try:
            result = OmegaConf.create(dict(overrides))
        except Exception as error:  # keys and values that OmegaConf has no types for
            raise UsageError(f"cannot read the configuration: {_first_line(error)}") from error
    else:
        words = list(overrides)
        for word in words:
            if "=" not in word:
                raise UsageError(f"{word!r} is not an option; options are written key=value")
        # A bare name and a key below it may both be given (`workload=x workload.data=y`), in
        # any order: the name goes first, or OmegaConf would overwrite the rest.
        short = {f"{key}=" for key in SHORT_KEYS}
        words = [
            word.replace("=", ".name=", 1) if word[: word.index("=") + 1] in short else word for word in words
        ]
        try:
            result = OmegaConf.from_dotlist(words)
        except Exception as error:
            raise UsageError(f"cannot read the options {words}: {_first_line(error)}") from error
    assert isinstance(result, DictConfig)
    return result


def _merge(base: Any, extra: Any) -> DictConfig:
    try:
        merged = OmegaConf.merge(base, extra)
    except ConfigKeyError as error:
        key = str(error.full_key)
        raise unknown("key", key, key_names(Config(cluster=ClusterConfig()))) from error
    except OmegaConfBaseException as error:
        where = error.full_key or "a group of keys"
        raise UsageError(f"bad value for {where}: {_first_line(error)}") from error
    assert isinstance(merged, DictConfig)
    return merged


def key_names(node: Any, prefix: str = "") -> list[str]:
    """All dotted keys of a configuration dataclass, for error messages and documentation."""
    names: list[str] = []
    for item in fields(node):
        value = getattr(node, item.name)
        name = prefix + item.name
        names += [name, *key_names(value, name + ".")] if is_dataclass(value) else [name]
    return names


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _resolve(config: Config) -> Config:
    """Fills in what follows from the rest and refuses what cannot be run."""
    _require_finite(config.to_dict())
    _require_cluster_settings(config)
    _resolve_ranks(config.testbed)
    train, model = config.train, config.workload.model
    for key in ("micro_batch", "micro_steps", "steps"):
        _require(getattr(train, key) >= 1, f"train.{key}", getattr(train, key), "at least 1")
    _require(train.warmup >= 0, "train.warmup", train.warmup, "at least 0")
    for key in ("timeout_s", "startup_timeout_s"):
        value = getattr(config.testbed, key)
        _require(value > 0, f"testbed.{key}", value, "above 0")
    every, least = train.checkpoint_every, config.testbed.min_ranks
    _require(every is None or every >= 1, "train.checkpoint_every", every, "at least 1")
    _require(least is None or least >= 1, "testbed.min_ranks", least, "at least 1")
    if every is not None and config.testbed.name in REAL_CLUSTERS:
        raise UsageError(
            f"train.checkpoint_every has no meaning for testbed={config.testbed.name}; leave it out"
        )
    if least is not None and every is None:
        raise UsageError(
            f"testbed.min_ranks={least} needs checkpoints to go on from; give train.checkpoint_every"
        )
    _require(train.lr > 0, "train.lr", train.lr, "above 0")
    _require(train.clip is None or train.clip > 0, "train.clip", train.clip, "above 0, or null")
    if train.precision not in PRECISIONS:
        raise unknown("train.precision", train.precision, PRECISIONS)
    if config.wandb.mode not in ("offline", "online", "disabled"):
        raise unknown("wandb.mode", config.wandb.mode, ("offline", "online", "disabled"))
    _require_scale_model(config)
    for key in ("layers", "hidden", "heads", "intermediate", "vocab", "seq_len"):
        _require(getattr(model, key) >= 1, f"workload.model.{key}", getattr(model, key), "at least 1")
    if model.hidden % model.heads:
        raise UsageError(
            f"workload.model.hidden={model.hidden} is not a multiple of "
            f"workload.model.heads={model.heads}; choose one that is"
        )
    if train.global_batch is not None:
        parts = config.world_size * train.micro_steps
        if train.global_batch < 1 or train.global_batch % parts:
            raise UsageError(
                f"train.global_batch={train.global_batch} does not divide by {config.world_size} ranks "
                f"x {train.micro_steps} micro-steps; use a multiple of {parts}"
            )
        train.micro_batch = train.global_batch // parts
    return config


def _require_scale_model(config: Config) -> None:
    """The emulated testbed needs to know what it stands for; no other one may be slowed down."""
    testbed, workload, cluster = config.testbed, config.workload, config.cluster
    _require(
        testbed.dilation is None or testbed.dilation > 0, "testbed.dilation", testbed.dilation, "above 0"
    )
    if workload.scale_of is not None and workload.scale_of not in presets("workloads"):
        raise unknown("workload.scale_of", workload.scale_of, presets("workloads"))
    if testbed.name != "emulated":
        if testbed.dilation is not None:
            raise UsageError(f"testbed.dilation has no meaning for testbed={testbed.name}; leave it out")
        return
    if cluster is None:
        raise UsageError(
            f"testbed=emulated needs a cluster to emulate; give cluster={'|'.join(presets('clusters'))}"
        )
    efficiency = cluster.kernel_efficiency
    _require(0 < efficiency <= 1, "cluster.kernel_efficiency", efficiency, "above 0 and at most 1")
    if workload.scale_of is None:
        raise UsageError(
            f"workload={workload.name} is no scale model of a real one, which testbed=emulated needs; "
            "use workload=bert-scale, or name one with workload.scale_of=bert-10b"
        )


def _require_cluster_settings(config: Config) -> None:
    """What goes into Slurm's job script, and what only real clusters know."""
    testbed, cluster = config.testbed, config.cluster
    for key, pattern, example in (
        ("partition", r"[\w.,-]+", "a name"),
        # Not Slurm's own 1:30:00, which YAML reads as 5400.
        ("time_limit", r"[1-9]\d*[mhd]", "minutes, hours or days, like 90m, 2h or 1d"),
    ):
        value = getattr(testbed, key)
        _require(value is None or re.fullmatch(pattern, value) is not None, f"testbed.{key}", value, example)
    for option in testbed.sbatch:
        ok = re.fullmatch(r"--[a-z][\w-]*(=[\w.,:/@%+=\[\]-]+)?", option) is not None
        _require(ok, "an option in testbed.sbatch", option, "like --name or --name=value")
    for name in cluster.env if cluster is not None else ():
        _require(re.fullmatch(r"[A-Za-z_]\w*", name) is not None, "cluster.env", name, "a variable's name")
        if names_a_secret(name):
            raise UsageError(
                f"cluster.env.{name} looks like a secret, and configurations are recorded; "
                "leave it out and export it where the job runs"
            )
    if testbed.name in REAL_CLUSTERS and testbed.ranks is None and testbed.ranks_per_node is None:
        if testbed.name == "torchrun" and "WORLD_SIZE" in os.environ:
            testbed.ranks = int(os.environ["WORLD_SIZE"])
            testbed.ranks_per_node = int(os.environ.get("LOCAL_WORLD_SIZE", testbed.ranks))
        elif cluster is not None:
            testbed.ranks_per_node = cluster.gpus_per_node
    if testbed.name == "slurm" and testbed.max_nodes is not None:
        wanted = testbed.nodes or 1
        _require(testbed.max_nodes >= wanted, "testbed.max_nodes", testbed.max_nodes, f"at least {wanted}")


def _resolve_ranks(testbed: TestbedConfig) -> None:
    for key in ("ranks", "nodes", "ranks_per_node"):
        value = getattr(testbed, key)
        _require(value is None or value >= 1, f"testbed.{key}", value, "at least 1")
    if testbed.ranks is None:
        if testbed.nodes is None and testbed.ranks_per_node is None:
            testbed.ranks = 4
        else:
            testbed.ranks = (testbed.nodes or 1) * (testbed.ranks_per_node or 1)
    if testbed.nodes is None:
        testbed.nodes = testbed.ranks // (testbed.ranks_per_node or testbed.ranks) or 1
    if testbed.ranks_per_node is None:
        testbed.ranks_per_node = testbed.ranks // testbed.nodes
    if testbed.nodes * testbed.ranks_per_node != testbed.ranks:
        raise UsageError(
            f"testbed.ranks={testbed.ranks} is not testbed.nodes={testbed.nodes} x "
            f"testbed.ranks_per_node={testbed.ranks_per_node}; give two of the three"
        )


def _require_finite(values: Mapping[str, Any], prefix: str = "") -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _require_finite(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            _require(math.isfinite(value), f"{prefix}{key}", value, "finite")
        elif isinstance(value, int):
            _require(abs(value) < 2**63, f"{prefix}{key}", value, "a number of 64 bits")


def _require(ok: bool, key: str, value: Any, wanted: str) -> None:
    if not ok:
        raise UsageError(f"{key}={value} is not possible; it must be {wanted}")
