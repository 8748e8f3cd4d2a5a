"""The machine, its software, and what else happened on it."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from suite.records import AnyRecord
from suite.reports.cohorts import Cohort, flat, moment
from suite.reports.tables import NOTHING, Cell, Table, evidence_cell, number, whole, word


def noise_table(cohorts: Sequence[Cohort]) -> Table:
    """What else happened on the machine during each cohort."""

    def row(cohort: Cohort) -> tuple[Cell, ...]:
        noises = [run.noise for run in cohort.members]

        def share(key: str) -> Cell:
            values = [noise[key] for noise in noises if noise.get(key) is not None]
            return number(100 * median(values) if values else None, "{:.1f}".format)

        return (
            word(f"{cohort.key} {cohort.title}"),
            share("ours"),
            share("others"),
            share("steal"),
            number(max((noise.get("attempts", 1) for noise in noises), default=None), whole),
            word("noisy" if any(noise.get("noisy") for noise in noises) else "quiet"),
            word(moment(cohort.any.started_at)),
            evidence_cell(cohort.any),
        )

    head = (
        "cohort",
        "used by us, % of the cores",
        "by others, %",
        "taken by the hypervisor, %",
        "attempts",
        "verdict",
        "started",
        "evidence",
    )
    return Table("Noise", head, tuple(map(row, cohorts)))


def environment_table(records: Sequence[AnyRecord]) -> Table:
    """Machine and versions; where results differ, every value with how many results have it."""
    environments = [flat(record.env) for record in records]
    keys = list(dict.fromkeys(key for environment in environments for key in environment))

    def shown(value: Any) -> str:
        return NOTHING if value in (None, [], {}) else str(value)

    def values(key: str) -> Cell:
        counts: dict[str, int] = {}
        for environment in environments:
            text = shown(environment.get(key))
            counts[text] = counts.get(text, 0) + 1
        if len(counts) == 1:
            return word(next(iter(counts)))
        return word("; ".join(f"{text} ({count} results)" for text, count in counts.items()))

    return Table("Environment", ("what", "value"), tuple((word(key), values(key)) for key in keys))
