"""The published runs as configurations, and how far the projection is from their numbers.

Conditions and numbers are those of the sources (S1, S2: the two posts; D1, D2: DeepSpeed pull request
1453 and issue 1069). What a source does not state is an assumption, named with the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from multiprocessing import get_context

from suite.config import Config
from suite.config_load import load
from suite.projection.assumptions import Assumptions, default_assumptions
from suite.projection.project import Projection, project

FITTED = "fitted"
PREDICTED = "predicted"
ELSEWHERE = "elsewhere"
DERIVED = "follows from fitted"
OLD_ZERO2 = "deepspeed-zero2-v0.5"
OLD_ZERO3 = "deepspeed-zero3-v0.5"
P3DN = ("workload=roberta-10b", "cluster=p3dn", "train.micro_batch=8", "train.micro_steps=8")
P4D = ("cluster=p4d", "train.micro_batch=16")
BERT_100B = ("workload=bert-100b", "cluster=p4d")
SMALL_BUCKETS = "impl.options.reduce_bucket_size=50000000"
"""DeepSpeed's default of 500 million elements would keep gathers waiting behind a gigabyte."""
MICS = (SMALL_BUCKETS, "impl.options.prefetch_bucket_size=2000000000")
"""S2 does not state its prefetch: a block ahead is ours."""
PARTITION_128 = "impl.options.partition_size=128"
BATCH_100B = 14
"""The largest even micro-batch with which both methods fit 128 GPUs, as far as our own memory model
knows."""


@dataclass(frozen=True)
class Run:
    """A run of a source: `words` are the options that say what was run; `unstated` what we chose."""

    key: str
    words: tuple[str, ...]
    unstated: str = ""

    def config(self) -> Config:
        return _config(self.words)


@dataclass(frozen=True)
class Number:
    """A published number and the runs that it is made of; `quantity` says how (see `_value`)."""

    what: str
    quantity: str
    runs: tuple[Run, ...]
    published: float
    source: str
    role: str = PREDICTED
    unit: str = "TFLOPS/GPU"


@dataclass(frozen=True)
class Comparison:
    """One row: a published number beside the projected one. `error` is relative, but for
    efficiencies, where it is in percentage points, and for memory, where it is None."""

    number: Number
    projected: float
    error: float | None
    within: bool
    unstated: str
    runs: tuple[Projection, ...]

    def made(self) -> Number:
        """The number as if the projection were the truth."""
        return replace(self.number, published=self.projected)


def _p3dn(impl: str, nodes: int) -> Run:
    words = (f"impl={impl}", *P3DN, f"cluster.nodes={nodes}")
    return Run(f"10B {impl} p3dn {nodes}", words, "8 micro-steps are ours")


def _p4d(impl: str, size: int, nodes: int) -> Run:
    buckets = (SMALL_BUCKETS,) if impl == "deepspeed-zero3" else ()
    words = (f"impl={impl}", f"workload=roberta-{size}b", *P4D, f"cluster.nodes={nodes}", *buckets)
    return Run(f"{size}B {impl} p4d {nodes}", words, "" if size == 10 else "64 layers of hidden 8192")


def _100b(impl: str, nodes: int, *words: str) -> Run:
    chosen = (f"impl={impl}", *BERT_100B, f"cluster.nodes={nodes}", f"train.micro_batch={BATCH_100B}")
    unstated = f"shape, sequence 512 and micro-batch {BATCH_100B} are ours"
    return Run(f"100B {impl} p4d {nodes}", (*chosen, *words), unstated)


def _bert_p3dn(impl: str, *words: str) -> Run:
    chosen = ("workload=bert-10b", "cluster=p3dn", "cluster.nodes=16", "train.micro_batch=8")
    return Run(
        f"BERT-10B {impl} p3dn 16",
        (f"impl={impl}", *chosen, "train.micro_steps=8", *words),
        "16 nodes, micro-batch 8 and 8 micro-steps are ours",
    )


MICS_175B = Run(
    "175B mics-s2 p4de 16",
    (
        "impl=mics-s2",
        "workload=bert-175b",
        "cluster=p4de",
        "cluster.nodes=16",
        "train.micro_batch=4",
        *MICS,
    ),
    "96 layers of hidden 12288 and micro-batch 4 are ours",
)

RUNS: dict[str, Run] = {
    run.key: run
    for run in (
        _p3dn(OLD_ZERO2, 16),
        *(_p3dn(OLD_ZERO3, nodes) for nodes in (16, 8, 4, 2, 1)),
        *(_p4d(impl, size, 8) for size in (10, 50) for impl in (OLD_ZERO3, "deepspeed-zero3")),
        _p4d(OLD_ZERO2, 10, 8),
        _p4d("deepspeed-zero3", 50, 32),
        *(_100b("mics-s2", nodes, *MICS, PARTITION_128) for nodes in (16, 64)),
        *(_100b(OLD_ZERO3, nodes, SMALL_BUCKETS) for nodes in (16, 64)),
        MICS_175B,
        _bert_p3dn("mics-s2", "impl.options.partition_size=8", *MICS),
        _bert_p3dn(OLD_ZERO3),
    )
}


def _number(
    what: str,
    published: float,
    source: str,
    role: str,
    *keys: str,
    quantity: str = "model",
    unit: str = "TFLOPS/GPU",
) -> Number:
    return Number(what, quantity, tuple(RUNS[key] for key in keys), published, source, role, unit)


NUMBERS = (
    _number("RoBERTa-10B, ZeRO-2, 16 p3dn", 44.7, "D2", FITTED, f"10B {OLD_ZERO2} p3dn 16"),
    _number("RoBERTa-10B, ZeRO-3, 16 p3dn", 19.5, "D2", FITTED, f"10B {OLD_ZERO3} p3dn 16"),
    _number("RoBERTa-10B, ZeRO-3, 8 p3dn", 21.9, "D2", PREDICTED, f"10B {OLD_ZERO3} p3dn 8"),
    _number("RoBERTa-10B, ZeRO-3, 4 p3dn", 23.5, "D2", PREDICTED, f"10B {OLD_ZERO3} p3dn 4"),
    _number("RoBERTa-10B, ZeRO-3, 2 p3dn", 23.5, "D2", FITTED, f"10B {OLD_ZERO3} p3dn 2"),
    _number(
        "RoBERTa-10B, ZeRO-3, 1 p3dn",
        0,
        "D2",
        PREDICTED,
        f"10B {OLD_ZERO3} p3dn 1",
        quantity="memory",
        unit="fits",
    ),
    _number("RoBERTa-10B, ZeRO-3 before, 8 p4d", 54.86, "D1", FITTED, f"10B {OLD_ZERO3} p4d 8"),
    _number("RoBERTa-10B, ZeRO-3 after, 8 p4d", 92.07, "D1", FITTED, "10B deepspeed-zero3 p4d 8"),
    _number("RoBERTa-50B, ZeRO-3 before, 8 p4d", 67.61, "D1", FITTED, f"50B {OLD_ZERO3} p4d 8"),
    _number("RoBERTa-50B, ZeRO-3 after, 8 p4d", 116.06, "D1", FITTED, "50B deepspeed-zero3 p4d 8"),
    _number("RoBERTa-50B, ZeRO-3 after, 32 p4d", 108, "D1", PREDICTED, "50B deepspeed-zero3 p4d 32"),
    *(
        _number(
            f"RoBERTa-{size}B, after against before",
            published,
            "S1",
            DERIVED,
            f"{size}B deepspeed-zero3 p4d 8",
            f"{size}B {OLD_ZERO3} p4d 8",
            quantity="ratio",
            unit="×",
        )
        for size, published in ((10, 1.68), (50, 1.73))
    ),
    _number(
        "RoBERTa-10B, optimised ZeRO-3 against ZeRO-2",
        1.0,
        "D1",
        PREDICTED,
        "10B deepspeed-zero3 p4d 8",
        f"10B {OLD_ZERO2} p4d 8",
        quantity="ratio",
        unit="×",
    ),
    _number("MiCS 175 B, 16 p4de", 169, "S2", PREDICTED, MICS_175B.key, quantity="hardware"),
    _number("MiCS 100 B, 64 p4d", 170, "S2", FITTED, "100B mics-s2 p4d 64", quantity="hardware"),
    _number("ZeRO-3 100 B, 64 p4d", 62, "S2", FITTED, f"100B {OLD_ZERO3} p4d 64", quantity="hardware"),
    *(
        _number(
            f"{method} 100 B, 128 → 512 GPUs",
            published,
            "S2",
            PREDICTED,
            f"100B {impl} p4d 64",
            f"100B {impl} p4d 16",
            quantity="efficiency",
            unit="%",
        )
        for method, impl, published in (("MiCS", "mics-s2", 99.4), ("ZeRO-3", OLD_ZERO3, 72))
    ),
    _number(
        "MiCS against ZeRO-3, BERT-10B on p3dn (up to)",
        2.82,
        "S2",
        PREDICTED,
        "BERT-10B mics-s2 p3dn 16",
        f"BERT-10B {OLD_ZERO3} p3dn 16",
        quantity="ratio",
        unit="×",
    ),
)
"""Every published number that a projection can be held against."""

TOLERANCES = {FITTED: 0.05, DERIVED: 0.10, PREDICTED: 0.10, ELSEWHERE: 0.10}
"""Relative errors aimed at."""
EFFICIENCY_TOLERANCE = 3.0
"""Percentage points aimed at."""


def projected_config(words: Sequence[str]) -> Config:
    """The configuration for a projection: half precision and activation checkpointing unless told
    otherwise, and as many ranks as the cluster has GPUs. Raises UsageError."""
    given = ["train.precision=bf16", "train.activation_checkpointing=true", *words]
    cluster = load(given).cluster
    if cluster is not None:
        ranks = cluster.nodes * cluster.gpus_per_node
        given += [f"testbed.ranks={ranks}", f"testbed.ranks_per_node={cluster.gpus_per_node}"]
        given += [f"testbed.nodes={cluster.nodes}"]
    return load(given)


_config = cache(projected_config)


def evaluate(assumptions: Assumptions | None = None, numbers: Sequence[Number] = NUMBERS) -> list[Comparison]:
    """Every number beside its projection; a run that several are made of is projected once."""
    given = assumptions or default_assumptions()
    runs = dict.fromkeys(run for number in numbers for run in number.runs)
    projections = {run: project(run.config(), given) for run in runs}
    return [_compare(number, tuple(projections[run] for run in number.runs)) for number in numbers]


def _compare(number: Number, runs: tuple[Projection, ...]) -> Comparison:
    projected = _value(number, runs)
    unstated = "; ".join(dict.fromkeys(run.unstated for run in number.runs if run.unstated))
    if number.quantity == "memory":
        return Comparison(number, projected, None, projected == number.published, unstated, runs)
    if number.quantity == "efficiency":
        points = projected - number.published
        return Comparison(number, projected, points, abs(points) <= EFFICIENCY_TOLERANCE, unstated, runs)
    error = projected / number.published - 1
    return Comparison(number, projected, error, abs(error) <= TOLERANCES[number.role], unstated, runs)


def _value(number: Number, runs: Sequence[Projection]) -> float:
    """`model` and `hardware`: TFLOPS per GPU of that convention. `ratio`: throughput of the first run
    against the second. `efficiency`: the same per GPU, in percent. `memory`: 1 when it fits."""
    if number.quantity == "memory":
        return float(runs[0].memory.fits)
    if number.quantity == "model":
        return runs[0].model_tflops_per_gpu
    if number.quantity == "hardware":
        return runs[0].hardware_tflops_per_gpu
    per_gpu = [run.model_tflops_per_gpu for run in runs]
    return per_gpu[0] / per_gpu[1] * (100 if number.quantity == "efficiency" else 1)


@dataclass(frozen=True)
class Sensitivity:
    """How far a number moves when one assumption moves over its range, all others kept."""

    assumption: str
    range: tuple[float, float]
    what: str
    at_low: float
    at_high: float


def sensitivities(
    assumptions: Assumptions | None = None, numbers: Sequence[Number] = NUMBERS
) -> list[Sensitivity]:
    """Every number at both ends of every assumption's range; on all cores, it is a thousand projections."""
    given = assumptions or default_assumptions()
    entries = list(given.entries.values())
    ends = [given.with_values({entry.name: value}) for entry in entries for value in (entry.low, entry.high)]
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        found = list(pool.map(partial(evaluate, numbers=numbers), ends))
    rows: list[Sensitivity] = []
    for entry, low, high in zip(entries, found[::2], found[1::2], strict=True):
        rows += [
            Sensitivity(entry.name, (entry.low, entry.high), one.number.what, one.projected, other.projected)
            for one, other in zip(low, high, strict=True)
        ]
    return rows


def fit_numbers() -> list[Number]:
    """The stated subset that the calibration is fitted to."""
    return [number for number in NUMBERS if number.role == FITTED]
