"""Two runs of one cohort that differ in one respect, compared round by round."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from suite.records import Record
from suite.reports.cohorts import Ratio, ranks, training_key

SIGNIFICANCE = 0.05
FEWEST_ROUNDS = 3
SLOWER_RULE = (
    f"Slower means: in so many of the interleaved rounds that chance would do it in less than "
    f"{SIGNIFICANCE:.0%} of cases (one-sided sign test; it takes 5 rounds to say anything), or in "
    f"{FEWEST_ROUNDS} and more timed steps each all longer than the other's longest (chance: "
    "at most 1 in 20)."
)


@dataclass(frozen=True)
class Pair:
    """Something as it is (`on`), and without a part of it or another method (`off`)."""

    on: Record
    off: Record

    @property
    def ratios(self) -> list[float]:
        """Round by round, step time of `off` over that of `on`."""
        return [b / a for a, b in zip(self.on.step_times_s, self.off.step_times_s, strict=False)]

    @property
    def ratio(self) -> float:
        return self.off.step_time_s.median / self.on.step_time_s.median

    @property
    def wins(self) -> int:
        return sum(ratio > 1 for ratio in self.ratios)

    @property
    def slower(self) -> bool:
        """Whether `off` is; see SLOWER_RULE."""
        ratio = Ratio.of(self.off, self.on)
        rounds = len(self.ratios)
        apart = rounds >= FEWEST_ROUNDS and ratio.differs and ratio.median > 1
        return apart or sign_test(self.wins, rounds) < SIGNIFICANCE

    def text(self, without: str = "without it") -> str:
        verdict = "slower" if self.slower else "no significant difference"
        return (
            f"{without} × {self.ratio:.2f} the step time on {where(self.on)} ({verdict}; "
            f"slower in {self.wins} of {len(self.ratios)} rounds)"
        )


def sign_test(wins: int, rounds: int) -> float:
    """Probability of at least `wins` heads in `rounds` throws of a fair coin; 1 without rounds."""
    return sum(math.comb(rounds, k) for k in range(wins, rounds + 1)) / 2**rounds


def pairs(
    runs: Sequence[Record], is_on: Callable[[Record], bool], is_off: Callable[[Record], bool]
) -> list[Pair]:
    """Every two runs of the same training that were timed together and that these pick."""
    return [
        Pair(on, off)
        for on in runs
        if is_on(on)
        for off in runs
        if is_off(off) and (off.cohort, training_key(off)) == (on.cohort, training_key(on))
    ]


def options_of(run: Record) -> dict[str, Any]:
    """The switches of its implementation that were not left alone, but for the partition size."""
    options = run.config["impl"].get("options") or {}
    return {key: value for key, value in options.items() if key != "partition_size"}


def as_it_is(impl: str) -> Callable[[Record], bool]:
    """Picks the implementation with every switch left alone; its partition size may be any."""
    return lambda run: run.impl == impl and not options_of(run)


def rounds_text(found: Sequence[Pair]) -> str:
    """The spread of all ratios of all pairs."""
    ratios = sorted(ratio for pair in found for ratio in pair.ratios)
    return f"ratio round by round: {ratios[0]:.2f} to {ratios[-1]:.2f}"


def both(found: Sequence[Pair]) -> tuple[Record, ...]:
    """All runs of these pairs, each once."""
    runs = {id(run): run for pair in found for run in (pair.on, pair.off)}
    return tuple(runs.values())


def where(run: Record) -> str:
    words = (run.workload, run.precision, ranks(run), *([run.device] if run.device else []))
    return ", ".join(words)
