"""Z1: what a slower network costs ZeRO-3, and what it costs ZeRO-2."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from suite.records import Record
from suite.reports.cohorts import has_network
from suite.reports.judges.pairs import as_it_is
from suite.reports.verdicts import NOT_REPRODUCED, PARTLY, REPRODUCED, Finding, Judge

STAGE2, STAGE3 = "deepspeed-zero2", "deepspeed-zero3"
ABOUT_TWICE = 1.5
BANDWIDTH = "inter_node_gbit_s"


@dataclass(frozen=True)
class Drop:
    """One implementation on the fastest and on the slowest of the networks that it ran on."""

    fast: Record
    slow: Record

    @property
    def share(self) -> float:
        """Of the throughput, lost."""
        return 1 - self.fast.step_time_s.median / self.slow.step_time_s.median

    @property
    def low(self) -> float:
        return 1 - self.fast.step_time_s.max / self.slow.step_time_s.min

    @property
    def high(self) -> float:
        return 1 - self.fast.step_time_s.min / self.slow.step_time_s.max


def _bandwidth(run: Record) -> float | None:
    return (run.config.get("cluster") or {}).get(BANDWIDTH)


def _but_for_bandwidth(run: Record) -> dict[str, Any]:
    """Whatever the implementation: the training, timed however often, and the rest of the cluster."""
    config: dict[str, Any] = {key: run.config.get(key) for key in ("workload", "testbed")}
    train = run.config.get("train") or {}
    config["train"] = {key: value for key, value in train.items() if key not in ("steps", "warmup")}
    cluster = {key: value for key, value in (run.config.get("cluster") or {}).items() if key != BANDWIDTH}
    return {**config, "cluster": cluster}


def _drop(impl: str, runs: Sequence[Record], like: Record | None = None) -> Drop | None:
    picked = as_it_is(impl)
    ours = [run for run in runs if picked(run) and has_network(run) and _bandwidth(run)]
    for run in ours:
        same = [other for other in ours if _but_for_bandwidth(other) == _but_for_bandwidth(run)]
        same.sort(key=lambda other: _bandwidth(other) or 0.0)
        alike = like is None or _but_for_bandwidth(like) == _but_for_bandwidth(run)
        if alike and _bandwidth(same[0]) != _bandwidth(same[-1]):
            return Drop(fast=same[-1], slow=same[0])
    return None


def _slower_network(runs: Sequence[Record]) -> Finding | None:
    third = _drop(STAGE3, runs)
    second = _drop(STAGE2, runs, third.slow) if third else None
    if third is None or second is None:
        return None
    more = third.low > max(0.0, second.high)
    enough = third.share >= ABOUT_TWICE * second.share
    outcome = (REPRODUCED if enough else PARTLY) if more else NOT_REPRODUCED
    ratio = f"× {third.share / second.share:.2f}" if second.share > 0 else "nothing to compare with"
    return Finding(
        third.fast.evidence,
        outcome,
        f"from {_bandwidth(third.fast):g} to {_bandwidth(third.slow):g} Gbit/s {STAGE3} loses "
        f"{third.share:.1%} of its "
        f"throughput, {STAGE2} {second.share:.1%}: {ratio}{_overlapped(third.slow, second.slow)}",
        f"{STAGE3} {third.low:.1%} to {third.high:.1%}, {STAGE2} {second.low:.1%} to {second.high:.1%}",
        (third.fast, third.slow, second.fast, second.slow),
    )


def _overlapped(third: Record, second: Record) -> str:
    """Why a backend may turn the claim round: a stage that does not overlap there loses more."""
    shares = [run.details.get("sent_while_computing_share") for run in (third, second)]
    if None in shares:
        return ""
    return (
        f"; on the slow one {shares[0]:.0%} and {shares[1]:.0%} of their bytes went out while they computed"
    )


NETWORK_JUDGES = {
    "Z1": Judge(
        "The same training on two networks that differ in bandwidth only; the share of throughput that "
        f"{STAGE3} loses over the share that {STAGE2} loses. Reproduced: at least {ABOUT_TWICE}, and the "
        f"least that {STAGE3} lost, by the spread, is more than the most that {STAGE2} did; partly: the "
        "latter alone; not reproduced: otherwise.",
        _slower_network,
    ),
}
