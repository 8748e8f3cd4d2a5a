"""M6, and the projected side of Z8, M4 and M5: projections held against published numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from suite.records import ProjectionRecord
from suite.reports.verdicts import NOT_REPRODUCED, PARTLY, REPRODUCED, Finding, Judge, shared

EVIDENCE = "projected"
RELATIVE_LIMIT = 0.10
POINTS_LIMIT = 3.0
PEAK_SHARE = 0.54
EFFICIENCIES = ("MiCS 100 B, 128 → 512 GPUs", "ZeRO-3 100 B, 128 → 512 GPUs")
SHARES = ("MiCS 100 B, 64 p4d", "MiCS 175 B, 16 p4de")
SPEEDUPS = ("RoBERTa-10B, after against before", "RoBERTa-50B, after against before")
HEADLINE = ("MiCS against ZeRO-3, BERT-10B on p3dn (up to)",)


@dataclass(frozen=True)
class Row:
    """A published number and what the projection makes of it."""

    record: ProjectionRecord
    what: str
    unit: str
    role: str
    published: float
    projected: float

    @property
    def in_points(self) -> bool:
        return self.unit == "%"

    @property
    def is_memory(self) -> bool:
        """Whether it fits, which has no error."""
        return self.unit == "fits"

    @property
    def error(self) -> float:
        """Relative; percentage points where the number itself is a percentage."""
        return self.projected - self.published if self.in_points else self.projected / self.published - 1

    @property
    def close(self) -> bool:
        return abs(self.error) <= (POINTS_LIMIT if self.in_points else RELATIVE_LIMIT)

    def text(self) -> str:
        error = f"{self.error:+.1f} points" if self.in_points else f"{self.error:+.1%}"
        unit = {"×": "", "%": "%"}.get(self.unit, " " + self.unit)
        sign = "× " if self.unit == "×" else ""
        return (
            f"{self.what}: {sign}{self.projected:.3g}{unit} against {sign}{self.published:.3g}{unit} "
            f"published ({error}, {self.role})"
        )


def newest_rows(records: Iterable[ProjectionRecord]) -> list[Row]:
    """The newest projection of each published number."""
    newest = {
        record.published["what"]: record
        for record in sorted(records, key=lambda record: record.started_at)
        if record.published is not None
    }
    return [_row(record) for record in newest.values()]


def rows(records: Iterable[ProjectionRecord], names: Sequence[str]) -> list[Row]:
    """Those of that name, in that order; empty when one is missing."""
    found = {row.what: row for row in newest_rows(records)}
    return [found[name] for name in names] if all(name in found for name in names) else []


def _row(record: ProjectionRecord) -> Row:
    content = record.published or {}
    keys = ("what", "unit", "role", "published", "projected")
    return Row(record, *(content[key] for key in keys))


def _finding(
    names: Sequence[str],
    outcome: Callable[[Sequence[Row]], str],
    describe: Callable[[Row], str],
    records: Sequence[ProjectionRecord],
) -> Finding | None:
    found = rows(records, names)
    if not found:
        return None
    return Finding(
        EVIDENCE,
        outcome(found),
        "; ".join(map(describe, found)),
        "none: a model has no repetitions; see the sensitivities in docs/projection.md",
        tuple(row.record for row in found),
    )


def _close(found: Sequence[Row]) -> str:
    return shared(sum(row.close for row in found), len(found))


def _speedup(found: Sequence[Row]) -> str:
    outcome = _close(found)
    right_direction = all(row.projected > 1 for row in found)
    return PARTLY if outcome == NOT_REPRODUCED and right_direction else outcome


def _over_peak(found: Sequence[Row]) -> str:
    if all(row.record.share_of_peak >= PEAK_SHARE for row in found):
        return REPRODUCED
    return PARTLY if any(row.close for row in found) else NOT_REPRODUCED


def _share_text(row: Row) -> str:
    return f"{row.text()}, {row.record.share_of_peak:.1%} of peak"


speedups = partial(_finding, SPEEDUPS, _speedup, Row.text)
efficiencies = partial(_finding, EFFICIENCIES, _close, Row.text)
headline = partial(_finding, HEADLINE, _speedup, Row.text)

PROJECTION_JUDGES = {
    "M6": Judge(
        f"Projected: reproduced when both runs reach {PEAK_SHARE:.0%} of peak (hardware FLOPs). Partly: one "
        f"of them is at least within {RELATIVE_LIMIT:.0%} of the published TFLOPS; not reproduced: none.",
        projected=partial(_finding, SHARES, _over_peak, _share_text),
    ),
}
