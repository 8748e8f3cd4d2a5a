"""What ran, on what, and how quiet it was."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from suite.records import AnyRecord, ProjectionRecord
from suite.reports.cohorts import FLOOR, Cohort, checks_of, device, moment, projections_of, runs_of


def impl_names(records: Sequence[AnyRecord]) -> list[str]:
    """Of what was run, in alphabetical order, the floor last."""
    return sorted(
        {record.impl for record in run_here(records)},
        key=lambda name: (name == FLOOR, name),
    )


def run_here(records: Iterable[AnyRecord]) -> list[AnyRecord]:
    """All but what a model has computed."""
    return [record for record in records if not isinstance(record, ProjectionRecord)]


def summary(records: Sequence[AnyRecord], cohorts: Sequence[Cohort]) -> list[tuple[str, str]]:
    """Names and values, in words."""
    runs, checks, projections = runs_of(records), checks_of(records), projections_of(records)
    evidence = Counter(run.evidence for run in runs)
    noisy = sum(bool(run.noise.get("noisy")) for run in runs)
    failed = sum(not check.ok for check in checks)
    started = [moment(at) for at in sorted(record.started_at for record in records)]
    competitors = [name for name in impl_names(records) if name != FLOOR]
    return [
        ("Implementations", f"{len(competitors)}: {', '.join(competitors)}"),
        (
            "Timed runs",
            f"{len(runs)} in {len(cohorts)} cohorts"
            + "".join(f"; {count} {kind}" for kind, count in sorted(evidence.items())),
        ),
        ("Projections", f"{len(projections)}" if projections else "none among these results"),
        ("Workloads", ", ".join(sorted({record.workload for record in records}))),
        ("Ranks", ", ".join(str(size) for size in sorted({record.world_size for record in records}))),
        (
            "Correctness",
            f"{len(checks) - failed} of {len(checks)} checks ok"
            if checks
            else "no checks among these results",
        ),
        (
            "Machine",
            "; ".join(sorted({device(record) for record in run_here(records)}) or "nothing was run"),
        ),
        ("Noise", f"{noisy} of {len(runs)} runs marked noisy" if runs else "no timed runs"),
        ("Taken", started[0] if started[0] == started[-1] else f"{started[0]} to {started[-1]}"),
    ]
