"""Checks against single-process torch: every difference beside its limit."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from suite.records import CheckRecord
from suite.reports.tables import Cell, Table, number, scientific, whole, word

CHECK_LIMITS = {
    "gradient, abs.": "max_abs_grad_diff",
    "gradient, rel.": "max_rel_grad_diff",
    "parameter, abs.": "max_abs_param_diff",
    "between replicas": "max_replica_diff",
    "loss, abs.": "max_loss_diff",
    "gradient norm, rel.": "max_rel_grad_norm_diff",
}
_CHECK_HEAD = ("implementation", "workload", "ranks", "micro-steps", "precision", "verdict")


def correctness_table(checks: Iterable[CheckRecord]) -> Table:
    """One row per check; every difference beside its limit."""
    rows = (
        (
            *_check_cells(check),
            *(_against(getattr(check, key), check.tolerance.get(key)) for key in CHECK_LIMITS.values()),
        )
        for check in _worst_first(checks)
    )
    return Table("Largest differences to single-process torch", (*_CHECK_HEAD, *CHECK_LIMITS), tuple(rows))


def brief_check_table(checks: Iterable[CheckRecord]) -> Table:
    """The same for a terminal: of the differences only the one that comes closest to its limit."""

    def row(check: CheckRecord) -> tuple[Cell, ...]:
        micro_steps = "1 micro-step" if check.micro_steps == 1 else f"{check.micro_steps} micro-steps"
        training = f"{check.workload}, {check.precision}, {check.world_size} ranks, {micro_steps}"
        return word(check.impl), word(training), _ok(check), _closest(check)

    head = ("implementation", "training", "verdict", "closest to its limit")
    return Table("Checks against single-process torch", head, tuple(map(row, _worst_first(checks))))


def _worst_first(checks: Iterable[CheckRecord]) -> list[CheckRecord]:
    def order(check: CheckRecord) -> tuple[Any, ...]:
        training = (check.workload, check.precision, check.world_size, check.micro_steps)
        return (check.ok, check.impl, *training)

    return sorted(checks, key=order)


def _check_cells(check: CheckRecord) -> tuple[Cell, ...]:
    return (
        word(check.impl),
        word(check.workload),
        number(check.world_size, whole),
        number(check.micro_steps, whole),
        word(check.precision),
        _ok(check),
    )


def _ok(check: CheckRecord) -> Cell:
    return word("ok" if check.ok else "NOT OK")


def _closest(check: CheckRecord) -> Cell:
    def used(key: str) -> float:
        difference, limit = getattr(check, key), check.tolerance.get(key)
        if difference is None:  # not finite
            return math.inf
        return (difference / limit if limit else math.inf) if difference else 0.0

    name, key = max(CHECK_LIMITS.items(), key=lambda item: used(item[1]))
    return word(f"{name} {_against(getattr(check, key), check.tolerance.get(key)).text}")


def _against(difference: float | None, limit: float | None) -> Cell:
    if difference is None:
        return Cell("not finite")
    shown = scientific(difference)
    return Cell(shown if limit is None else f"{shown} / {scientific(limit)}", difference)
