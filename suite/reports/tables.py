"""Tables as data: the same rows go to the HTML report, to the terminal and to CSV files."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable
from dataclasses import dataclass

from suite.records import Record
from suite.reports.cohorts import FLOOR, Cohort, Ratio, is_noisy
from suite.reports.emulated import best_overlap, overlap

NOTHING = "–"
MIB = 2**20


@dataclass(frozen=True)
class Cell:
    """What is shown, the value behind it for sorting and CSV (None where there is none), and where it
    leads."""

    text: str
    value: float | str | None = None
    link: str | None = None

    @property
    def is_number(self) -> bool:
        return isinstance(self.value, (int, float)) or self.text == NOTHING


@dataclass(frozen=True)
class Table:
    """`head` names the columns, units included; the first cell of a row names the row."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Per column, whether it holds numbers; such columns are set flush right."""
        return tuple(all(row[index].is_number for row in self.rows) for index in range(len(self.head)))

    def to_csv(self) -> str:
        """Unrounded values; an empty field where there is none."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.head)
        writer.writerows([[cell.value for cell in row] for row in self.rows])
        return text.getvalue()


def word(text: str | None) -> Cell:
    return Cell(text, text) if text else Cell(NOTHING)


def number(value: float | None, write: Callable[[float], str] | None = None) -> Cell:
    """A missing or non-finite number is shown as missing, never as 0."""
    if value is None or not math.isfinite(value):
        return Cell(NOTHING)
    return Cell((write or rounded)(value), value)


def rounded(value: float) -> str:
    """Three significant digits, more before the point where there are more."""
    if value == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{digits}f}"


def scientific(value: float) -> str:
    """Two significant digits: 7.5e-8."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def whole(value: float) -> str:
    return f"{value:.0f}"


def range_text(low: float, high: float) -> str:
    return f"{rounded(low)}–{rounded(high)}"


def percent(share: float | None) -> Cell:
    return number(None if share is None else 100 * share)


def mebibytes(value: float | None) -> Cell:
    return number(None if value is None else value / MIB)


@dataclass(frozen=True)
class TimeUnit:
    """Seconds or milliseconds, whichever reads better for a whole cohort."""

    name: str
    per_second: float

    @staticmethod
    def of(cohort: Cohort) -> TimeUnit:
        longest = max(run.step_time_s.median for run in cohort.members)
        return TimeUnit("s", 1) if longest >= 1 else TimeUnit("ms", 1000)


@dataclass(frozen=True)
class SpeedUnit:
    """GFLOPS for processors, TFLOPS for accelerators."""

    name: str
    per_tflops: float

    @staticmethod
    def of(cohort: Cohort) -> SpeedUnit:
        fastest = max(run.model_tflops_per_gpu for run in cohort.members)
        return SpeedUnit("TFLOPS", 1) if fastest >= 1 else SpeedUnit("GFLOPS", 1000)


def ratio_cell(run: Record, reference: Record | None, pattern: str = "{} no difference") -> Cell:
    """The ratio of the medians; `pattern` marks it where the spreads allow no difference."""
    if reference is None:
        return Cell(NOTHING)
    ratio = Ratio.of(run, reference)
    if run is reference:
        return Cell("1", 1.0)
    text = f"{ratio.median:.2f}"
    return Cell(text if ratio.differs else pattern.format(text), ratio.median)


def evidence_cell(run: Record) -> Cell:
    return word(f"{run.evidence}, noisy" if is_noisy(run) else run.evidence)


def overlap_cell(run: Record) -> Cell:
    """In percent; see `suite.reports.emulated.OVERLAP_RULE`."""
    found = overlap(run)
    if found is None:
        return Cell(NOTHING)
    return Cell(f"{'≥ ' if found.at_least else ''}{100 * found.share:.0f}", 100 * found.share)


def best_overlap_cell(run: Record) -> Cell:
    best = best_overlap(run)
    return number(None if best is None else 100 * best, whole)


def milliseconds(seconds: float | None) -> Cell:
    return number(None if seconds is None else 1000 * seconds)


def members(cohort: Cohort) -> list[tuple[str, Record]]:
    """Labels and runs, the floor last."""
    pairs = list(zip(cohort.labels, cohort.runs, strict=True))
    return [*pairs, (FLOOR, cohort.floor)] if cohort.floor else pairs


def per_run(cohort: Cohort, row: Callable[[str, Record], tuple[Cell, ...]]) -> tuple[tuple[Cell, ...], ...]:
    rows = [row(label, run) for label, run in zip(cohort.labels, cohort.runs, strict=True)]
    if cohort.floor is not None:
        rows.append(row("floor (lower bound)", cohort.floor))
    return tuple(rows)


def rows_of(cohort: Cohort, cells: Callable[[str, Record], tuple[Cell, ...]]) -> tuple[tuple[Cell, ...], ...]:
    return tuple(cells(label, run) for label, run in members(cohort))
