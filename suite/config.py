"""The typed configuration: what can be asked of the suite, with its defaults, and what identifies a result.

Every room reads these dataclasses; `config_load.py` makes them, `config_rules.py` completes and judges them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
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
    before it is ended; `startup_timeout_s` the same for building and compiling the model, a checkpoint that
    is read or written, a check's reference and comparison. With
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
