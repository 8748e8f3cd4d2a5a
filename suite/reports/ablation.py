"""Judges of the engine's optimisations: the same training with one of them off, timed in turns."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from suite.records import Record
from suite.reports.cohorts import ranks
from suite.reports.verdicts import NOT_REPRODUCED, PARTLY, REPRODUCED, Finding, Judge

ENGINE = "zero3"
ALL_OFF = "zero3-unoptimized"
SIGNIFICANCE = 0.05
DECIDING_LIMIT = 0.01
"""Share of a step below which the time for deciding counts as none."""
PUBLISHED_SPEEDUP = 1.68
COMMANDS = (
    "suite sweep configs/sweeps/ablation_zero3.yaml --out results/again",
    "suite report results/again",
)
"""Single runs would not be timed in turns, so the rows are repeated as one sweep."""


@dataclass(frozen=True)
class Pair:
    """The engine with everything on, and the same without something, from one cohort."""

    on: Record
    off: Record

    @property
    def ratios(self) -> list[float]:
        """Round by round, step time without over step time with."""
        return [b / a for a, b in zip(self.on.step_times_s, self.off.step_times_s, strict=False)]

    @property
    def slower(self) -> bool:
        """Whether the off-side was slower in so many rounds that chance seldom does it."""
        return sign_test(sum(ratio > 1 for ratio in self.ratios), len(self.ratios)) < SIGNIFICANCE

    def text(self) -> str:
        ordered = sorted(self.ratios)
        ratio = self.off.step_time_s.median / self.on.step_time_s.median
        verdict = "slower" if self.slower else "no significant difference"
        return (
            f"without it × {ratio:.2f} the step time on {self.on.workload}, {self.on.precision}, "
            f"{ranks(self.on)} ({verdict}; slower in {sum(r > 1 for r in ordered)} of {len(ordered)} rounds)"
        )


def sign_test(wins: int, rounds: int) -> float:
    """Probability of at least `wins` heads in `rounds` throws of a fair coin; 1 without rounds."""
    return sum(math.comb(rounds, k) for k in range(wins, rounds + 1)) / 2**rounds


def pairs(runs: Sequence[Record], is_off: Callable[[Record], bool]) -> list[Pair]:
    """The cohorts that hold both the engine as it is and the run that `is_off` picks."""
    engines = [run for run in runs if run.impl == ENGINE and not _options(run)]
    return [
        Pair(engine, run)
        for engine in engines
        for run in runs
        if is_off(run) and (run.cohort, run.config["train"]) == (engine.cohort, engine.config["train"])
    ]


def _options(run: Record) -> dict:
    return run.config["impl"].get("options") or {}


def _one_off(option: str, run: Record) -> bool:
    return run.impl == ENGINE and _options(run) == {option: False}


def _time(is_off: Callable[[Record], bool], runs: Sequence[Record]) -> Finding | None:
    """Reproduced: significantly slower without it in every cohort; not reproduced: in none."""
    found = pairs(runs, is_off)
    if not found:
        return None
    slower = sum(pair.slower for pair in found)
    outcome = REPRODUCED if slower == len(found) else PARTLY if slower else NOT_REPRODUCED
    return _finding(found, outcome, "; ".join(pair.text() for pair in found))


def _finding(found: Sequence[Pair], outcome: str, ours: str) -> Finding:
    ratios = sorted(ratio for pair in found for ratio in pair.ratios)
    return Finding(
        evidence=found[0].on.evidence,
        outcome=outcome,
        ours=ours,
        spread=f"ratio round by round: {ratios[0]:.2f} to {ratios[-1]:.2f}",
        runs=tuple(run for pair in found for run in (pair.on, pair.off)),
    )


def _deciding(runs: Sequence[Record]) -> Finding | None:
    """Z3: the share of the step that decisions take, cached and not."""
    found = [
        pair
        for pair in pairs(runs, partial(_one_off, "cached_schedule"))
        if "deciding_s" in pair.on.details and "deciding_s" in pair.off.details
    ]
    if not found:
        return None
    shares = [pair.on.details["deciding_s"] / pair.on.step_time_s.median for pair in found]
    ok = sum(share < DECIDING_LIMIT for share in shares)
    outcome = REPRODUCED if ok == len(found) else PARTLY if ok else NOT_REPRODUCED
    ours = "; ".join(
        f"deciding takes {share:.3%} of a step cached, "
        f"{pair.off.details['deciding_s'] / pair.off.step_time_s.median:.3%} not cached "
        f"({pair.on.workload}, {pair.on.precision})"
        for pair, share in zip(found, shares, strict=True)
    )
    return _finding(found, outcome, ours)


def _all_together(runs: Sequence[Record]) -> Finding | None:
    """Z8: its number belongs to 64 A100, so anything else confirms at most the direction."""
    found = pairs(runs, lambda run: run.impl == ALL_OFF)
    if not found:
        return None
    slower = any(pair.slower for pair in found)
    text = "; ".join(pair.text().replace("without it", "all off:") for pair in found)
    return _finding(found, PARTLY if slower else NOT_REPRODUCED, text)


_SIGN_RULE = (
    f"The engine ({ENGINE}) with only {{option}} off is slower than with everything on, in so many of the "
    f"interleaved rounds that chance would do it in less than {SIGNIFICANCE:.0%} of cases (one-sided sign "
    "test). Reproduced: in every cohort; not reproduced: in none; partly: anything between."
)


def _judge(option: str) -> Judge:
    return Judge(_SIGN_RULE.format(option=option), partial(_time, partial(_one_off, option)), COMMANDS)


ABLATION_JUDGES = {
    "Z2": _judge("fine_grained_sync"),
    "Z3": Judge(
        f"With cached_schedule on, deciding takes less than {DECIDING_LIMIT:.0%} of a step. Reproduced: in "
        "every cohort that also holds the run without; not reproduced: in none; partly: anything between.",
        _deciding,
        COMMANDS,
    ),
    "Z4": _judge("coalesced"),
    "Z5": _judge("preflattened"),
    "Z7": _judge("one_kernel_norm"),
    "Z8": Judge(
        f"Published: × {PUBLISHED_SPEEDUP} and more on 64 A100. On other hardware at most partly: {ALL_OFF} "
        f"is slower than {ENGINE} by the other rows' sign test in some cohort; not reproduced: in none.",
        _all_together,
        COMMANDS,
    ),
    "Z9": _judge("group_batched"),
}
