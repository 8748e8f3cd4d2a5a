"""Which records may be held against each other, and how two of them compare."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from suite.config import NOT_MEASURED
from suite.records import AnyRecord, CheckRecord, ProjectionRecord, Record

REFERENCE = "ddp"
FLOOR = "floor"

NO_DIFFERENCE_RULE = (
    "Two step times differ only when their ranges (min to max over the timed steps) do not overlap; "
    "otherwise the table says “no difference”. The range of a ratio runs from min/max to max/min, so "
    "it contains 1 exactly when the two ranges overlap."
)

_TITLE_KEYS = (
    "workload.name",
    "workload.model.",
    "workload.scale_of",
    "cluster",
    "testbed.",
    "train.precision",
    "train.micro_batch",
    "train.micro_steps",
    "train.activation_checkpointing",
)


@dataclass(frozen=True)
class Ratio:
    """Step time over that of a reference; `low` and `high` are the extremes that both spreads allow."""

    low: float
    median: float
    high: float

    @staticmethod
    def of(record: Record, reference: Record) -> Ratio:
        ours, theirs = record.step_time_s, reference.step_time_s
        return Ratio(ours.min / theirs.max, ours.median / theirs.median, ours.max / theirs.min)

    @property
    def differs(self) -> bool:
        """See NO_DIFFERENCE_RULE."""
        return not self.low <= 1 <= self.high


@dataclass(frozen=True)
class Cohort:
    """Runs of the same training, timed interleaved; `runs` holds the fastest first, without `floor`,
    which is no method but the lower bound that they are held against."""

    key: str
    title: str
    runs: tuple[Record, ...]
    floor: Record | None
    labels: tuple[str, ...]

    @property
    def any(self) -> Record:
        """A member, for what all of them share."""
        return self.runs[0] if self.runs else self._only_floor()

    @property
    def members(self) -> tuple[Record, ...]:
        return (*self.runs, self.floor) if self.floor else self.runs

    @property
    def reference(self) -> Record | None:
        """Plain data parallelism, where it was measured."""
        return next((run for run in self.runs if run.impl == REFERENCE), None)

    @property
    def others(self) -> tuple[tuple[str, Record], ...]:
        """Label and run of everything but the reference."""
        pairs = zip(self.labels, self.runs, strict=True)
        return tuple((label, run) for label, run in pairs if run is not self.reference)

    @property
    def conditions(self) -> str:
        """Evidence and conditions, the sentence under every figure and table."""
        run = self.any
        steps = {member.step_time_s.n for member in self.members}
        repeats = f"{min(steps)}" if len(steps) == 1 else f"{min(steps)} to {max(steps)}"
        attention = f" Attention: {run.attention}." if run.attention else ""
        apart = (run.config.get("testbed") or {}).get("alone")
        turns = ", started alone in rounds" if apart else " each, taken in turns"
        return (
            f"{run.evidence.capitalize()} on the {run.testbed} testbed: {ranks(run)} on {device(run)}; "
            f"{repeats} timed steps{turns if len(self.members) > 1 else ''}.{attention}"
        )

    def _only_floor(self) -> Record:
        assert self.floor is not None, "a cohort holds at least one record"
        return self.floor


def is_noisy(run: Record) -> bool:
    return bool(run.noise.get("noisy"))


def has_network(run: Record) -> bool:
    """Whether something like a cluster's network is between its nodes: on one host as it is, they only tell
    the topology."""
    return run.nodes > 1 and run.testbed != "local"


def runs_of(records: Iterable[AnyRecord]) -> list[Record]:
    return [record for record in records if isinstance(record, Record)]


def projections_of(records: Iterable[AnyRecord]) -> list[ProjectionRecord]:
    """But for those that stand for a run."""
    return [item for item in records if isinstance(item, ProjectionRecord) and item.stands_for is None]


def stand_ins_of(records: Iterable[AnyRecord]) -> list[ProjectionRecord]:
    """Projections of what was also run, on an emulated cluster."""
    return [item for item in records if isinstance(item, ProjectionRecord) and item.stands_for is not None]


def all_checks(records: Iterable[AnyRecord]) -> list[CheckRecord]:
    return [record for record in records if isinstance(record, CheckRecord)]


def checks_of(records: Iterable[AnyRecord]) -> list[CheckRecord]:
    """Each as it came out last: one that was not ok is made again."""
    checks = sorted(all_checks(records), key=lambda check: check.started_at)
    return [*{(check.stage, check.config_hash, _device(check)): check for check in checks}.values()]


def _device(check: CheckRecord) -> str:
    return str([check.env.get(key) for key in ("cpu", "accelerators")])


def group_cohorts(records: Iterable[AnyRecord]) -> list[Cohort]:
    """All cohorts among the runs, in order of size of training, named C1, C2, ..."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for run in runs_of(records):
        groups.setdefault((run.cohort, training_key(run)), []).append(run)
    ordered = sorted(groups.values(), key=_cohort_order)
    titles = _titles([group[0] for group in ordered])
    return [
        _cohort(f"C{i}", title, group)
        for i, (title, group) in enumerate(zip(titles, ordered, strict=True), 1)
    ]


def training_key(run: Record) -> str:
    """Equal for runs that do the same arithmetic on the same testbed with the same evidence,
    whatever implementation does it."""
    shared = {key: value for key, value in run.config.items() if key not in ("impl", "wandb", "out")}
    shared["testbed"] = {
        key: value for key, value in shared.get("testbed", {}).items() if key not in NOT_MEASURED
    }
    return json.dumps([run.evidence, shared], sort_keys=True)


def curve_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Largest relative difference over the steps that both took (a noisy measurement is repeated, and
    its training goes on meanwhile); infinite when there are none or one is no number."""
    pairs = zip(ours, theirs, strict=False)
    return max((relative_difference(a, b) for a, b in pairs), default=float("inf"))


def relative_difference(ours: float | None, theirs: float | None) -> float:
    """Infinite when one of them is no number: records hold None for what is not finite."""
    if ours is None or theirs is None or ours != ours or theirs != theirs:
        return float("inf")
    return abs(ours - theirs) / abs(theirs) if theirs else (0.0 if ours == theirs else float("inf"))


def device(record: AnyRecord) -> str:
    """What the ranks computed on, in words."""
    accelerators = record.env.get("accelerators") or []
    on_cpu = isinstance(record, Record) and record.device is None  # whatever else the host holds
    if accelerators and not on_cpu:
        return f"{len(accelerators)} × {accelerators[0]}"
    cores, name = record.env.get("cores"), record.env.get("cpu")
    return f"CPU ({f'{cores} cores, ' if cores else ''}{name or 'model unknown'})"


def ranks(run: Record) -> str:
    noun = "node" if run.nodes == 1 else "nodes"
    return f"{run.world_size} ranks ({run.nodes} {noun} × {run.ranks_per_node})"


def cluster_name(run: Record) -> str:
    """The cluster that an emulated run stands for, with the bandwidth that matters; else empty."""
    cluster = run.config.get("cluster") or {}
    if run.evidence != "emulated" or not cluster:
        return ""
    stands_for = run.config["workload"].get("scale_of")
    as_model = f"as {stands_for} on " if stands_for else ""
    return f"{as_model}{cluster['name']}, {cluster['inter_node_gbit_s']:g} Gbit/s"


def moment(started_at: str) -> str:
    """A record's time, to be read."""
    return started_at.replace("T", " ").replace("+00:00", " UTC")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted keys."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        inner = isinstance(value, Mapping) and value
        result.update(flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value})
    return result


def _cohort(key: str, title: str, group: Sequence[Record]) -> Cohort:
    runs = sorted((run for run in group if run.impl != FLOOR), key=lambda run: run.step_time_s.median)
    floor = next((run for run in group if run.impl == FLOOR), None)
    return Cohort(key, title, tuple(runs), floor, tuple(labels(runs)))


def labels(runs: Sequence[Record]) -> list[str]:
    """The implementation's name, with the options in which it differs from its namesakes."""
    options = [flat(run.config.get("impl", {}).get("options") or {}) for run in runs]
    result = []
    for run, own in zip(runs, options, strict=True):
        namesakes = [other for peer, other in zip(runs, options, strict=True) if peer.impl == run.impl]
        keys = sorted({key for other in namesakes for key in other})
        differing = [key for key in keys if len({str(other.get(key)) for other in namesakes}) > 1]
        words = [f"{key}={own[key]}" for key in differing if key in own]
        result.append(f"{run.impl} ({', '.join(words)})" if words else run.impl)
    return result


def _cohort_order(group: Sequence[Record]) -> tuple[Any, ...]:
    run = group[0]
    size = (run.n_params, run.workload, run.precision != "fp32", run.world_size, run.nodes)
    return (*size, run.micro_steps, run.micro_batch, run.started_at, training_key(run))


def _titles(runs: Sequence[Record]) -> list[str]:
    """What every reader wants to know, then whatever else tells the cohorts apart."""
    settings = [flat(run.config) for run in runs]
    keys = sorted({key for setting in settings for key in setting})
    hidden = ("impl.", "wandb.", "out", *_TITLE_KEYS)
    extra = [
        key
        for key in keys
        if not key.startswith(hidden) and len({str(setting.get(key)) for setting in settings}) > 1
    ]
    titles = [
        " · ".join([_title(run), *(f"{key.removeprefix('train.')} {setting.get(key)}" for key in extra)])
        for run, setting in zip(runs, settings, strict=True)
    ]
    return [
        f"{title} · started {moment(run.started_at)}" if titles.count(title) > 1 else title
        for title, run in zip(titles, runs, strict=True)
    ]


def _title(run: Record) -> str:
    micro_steps = f"{run.micro_steps} micro-step{'s' if run.micro_steps > 1 else ''}"
    words = [run.workload, run.precision, ranks(run), f"{micro_steps} × micro-batch {run.micro_batch}"]
    if run.config.get("train", {}).get("activation_checkpointing"):
        words.append("activation checkpointing")
    cluster = cluster_name(run)
    if cluster:
        words.insert(1, cluster)
    return " · ".join(words)
