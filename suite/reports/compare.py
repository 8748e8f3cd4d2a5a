"""Is one set of results faster than another? With a confidence interval, and a refusal to guess.

The interval is the 95% percentile bootstrap of the ratio of the median step times (`step_times_s`,
resampled with a fixed seed). Few steps decide nothing about one configuration, but many configurations
can decide about the results as a whole: `Together`. Both know the steps of each result only: a machine that
changed between two results changes their ratio, too (the floor's row shows it).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from suite.errors import UsageError
from suite.records import AnyRecord, Record
from suite.reports.cohorts import FLOOR, cluster_name, device, ranks, runs_of, training_key
from suite.reports.tables import Table, number, whole, word

CONFIDENCE = 0.95
RESAMPLES = 10_000
FEWEST_STEPS = 4
"""With three steps on each side chance alone keeps two results apart in one of ten cases."""
FASTER, SLOWER, SAME = "faster", "slower", "no significant difference"
TOO_FEW = f"no significant difference (fewer than {FEWEST_STEPS} timed steps)"
FEWEST_TOGETHER = 5


@dataclass(frozen=True)
class Interval:
    """Step time of the second result over the first's."""

    low: float
    middle: float
    high: float

    @staticmethod
    def of(first: Sequence[float], second: Sequence[float]) -> Interval:
        return Interval._of(
            resampled_ratios(first, second, np.random.default_rng(0)), np.median(second) / np.median(first)
        )

    @staticmethod
    def together(sides: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Interval:
        """The geometric mean of the ratios of several configurations; these are resampled, too, so that a
        few that changed a lot do not speak for all."""
        random = np.random.default_rng(0)
        logs = np.log([resampled_ratios(first, second, random) for first, second in sides])
        drawn = random.integers(len(sides), size=(RESAMPLES, len(sides)))
        means = logs[drawn, np.arange(RESAMPLES)[:, None]].mean(axis=1)
        middle = np.mean([np.log(np.median(second) / np.median(first)) for first, second in sides])
        return Interval._of(np.exp(means), np.exp(middle))

    @staticmethod
    def _of(ratios: np.ndarray, middle: float) -> Interval:
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(ratios, [tail, 1 - tail])
        return Interval(float(low), float(middle), float(high))

    @property
    def verdict(self) -> str:
        return SLOWER if self.low > 1 else FASTER if self.high < 1 else SAME


def resampled_ratios(first: Sequence[float], second: Sequence[float], random: np.random.Generator) -> Any:
    """RESAMPLES ratios of medians, second over first."""
    medians = [
        np.median(random.choice(values, (RESAMPLES, len(values))), axis=1) for values in (first, second)
    ]
    return medians[1] / medians[0]


@dataclass(frozen=True)
class Comparison:
    """One configuration in both results; all its repetitions on a side count together."""

    first: tuple[Record, ...]
    second: tuple[Record, ...]

    @property
    def label(self) -> str:
        run = self.first[0]
        options = run.config["impl"].get("options") or {}
        return f"{run.impl} ({', '.join(f'{k}={v}' for k, v in options.items())})" if options else run.impl

    @property
    def training(self) -> str:
        run = self.first[0]
        micro_steps = f"{run.micro_steps} × micro-batch {run.micro_batch}"
        words = (run.workload, cluster_name(run), run.precision, ranks(run), micro_steps)
        return ", ".join(word for word in words if word)

    @property
    def steps(self) -> tuple[list[float], list[float]]:
        first, second = ([t for run in side for t in run.step_times_s] for side in (self.first, self.second))
        return first, second

    @property
    def interval(self) -> Interval:
        return Interval.of(*self.steps)

    @property
    def verdict(self) -> str:
        if min(map(len, self.steps)) < FEWEST_STEPS:
            return TOO_FEW
        return self.interval.verdict

    def regressed(self, threshold: float) -> bool:
        """Whether it is significantly slower, and by more than this share."""
        return self.verdict == SLOWER and self.interval.middle > 1 + threshold


@dataclass(frozen=True)
class Together:
    """All configurations of one kind of evidence, but for the floor, which is no method."""

    evidence: str
    items: tuple[Comparison, ...]

    @property
    def label(self) -> str:
        return f"all {len(self.items)} together"

    training = "geometric mean of the ratios"

    @property
    def interval(self) -> Interval:
        return Interval.together([item.steps for item in self.items])

    @property
    def verdict(self) -> str:
        return self.interval.verdict

    def regressed(self, threshold: float) -> bool:
        """As of a single configuration."""
        return self.verdict == SLOWER and self.interval.middle > 1 + threshold


def together(found: Iterable[Comparison]) -> list[Together]:
    """Per kind of evidence, where there are enough configurations to speak of a whole."""
    kinds: dict[str, list[Comparison]] = {}
    for item in found:
        if item.first[0].impl != FLOOR:
            kinds.setdefault(item.first[0].evidence, []).append(item)
    enough = {kind: items for kind, items in kinds.items() if len(items) >= FEWEST_TOGETHER}
    return [Together(kind, tuple(items)) for kind, items in sorted(enough.items())]


def compare(first: Iterable[AnyRecord], second: Iterable[AnyRecord]) -> list[Comparison]:
    """Every configuration that both hold. Raises UsageError when there is none."""
    ours, theirs = _by_configuration(first), _by_configuration(second)
    found = [Comparison(tuple(ours[key]), tuple(theirs[key])) for key in ours if key in theirs]
    if not found:
        raise UsageError("these results have no configuration in common; sweep both with the same file")
    return found


def _by_configuration(records: Iterable[AnyRecord]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for run in runs_of(records):
        key = json.dumps([training_key(run), run.config["impl"]], sort_keys=True)
        found.setdefault(key, []).append(run)
    return found


def comparison_table(found: Sequence[Comparison]) -> Table:
    head = (
        "implementation",
        "training",
        "first, median s",
        "second, median s",
        "ratio",
        "low",
        "high",
        "steps",
        "verdict",
        "evidence",
    )

    def row(item: Comparison) -> tuple:
        interval, (ours, theirs) = item.interval, item.steps
        return (
            word(item.label),
            word(item.training),
            number(float(np.median(ours))),
            number(float(np.median(theirs))),
            *(number(value, "{:.3f}".format) for value in (interval.middle, interval.low, interval.high)),
            number(min(len(ours), len(theirs)), whole),
            word(item.verdict),
            word(item.first[0].evidence),
        )

    def whole_row(item: Together) -> tuple:
        interval = item.interval
        ratios = (number(value, "{:.3f}".format) for value in (interval.middle, interval.low, interval.high))
        missing = word(None)
        return (
            word(item.label),
            word(item.training),
            missing,
            missing,
            *ratios,
            missing,
            word(item.verdict),
            word(item.evidence),
        )

    title = f"Second over first, with the {CONFIDENCE:.0%} bootstrap interval of the ratio of medians"
    return Table(title, head, (*map(row, found), *map(whole_row, together(found))))


def other_machine(found: Iterable[Comparison]) -> bool:
    """Whether the two sides were measured on different devices."""
    return any(device(item.first[0]) != device(item.second[0]) for item in found)


def share(text: str) -> float:
    """A threshold: `5%` or `0.05`. Raises UsageError."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError(f"{text!r} is not a threshold; write 5% or 0.05")
    return value
