"""Fits the few free assumptions to the stated subset of published numbers; the rest stays prediction.

Gauss-Newton on the relative errors, with every parameter held inside its plausible range.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from suite.projection.assumptions import Assumption, Assumptions
from suite.projection.published_runs import Number, evaluate

ITERATIONS = 10
NUDGE = 0.01
"""Share of its range by which a parameter is moved to see its effect."""
PRIOR = 0.01
"""Pull towards the middle of the range, as a relative error for a parameter at its end: it decides
where the numbers do not."""

Vector = NDArray[np.float64]


def calibrate(assumptions: Assumptions, numbers: Sequence[Number]) -> Assumptions:
    """The assumptions with those marked `fitted` moved to where these numbers are met best."""
    free = assumptions.fitted
    position = np.array([(entry.value - entry.low) / (entry.high - entry.low) for entry in free])
    best = _errors(assumptions, free, position, numbers)
    for _ in range(ITERATIONS):
        step = _step(assumptions, free, position, best, numbers)
        for damping in (1.0, 0.5, 0.25, 0.1, 0.03):
            moved = np.clip(position + damping * step, 0.0, 1.0)
            errors = _errors(assumptions, free, moved, numbers)
            if errors @ errors < best @ best - 1e-9:
                position, best = moved, errors
                break
        else:
            break
    return _at(assumptions, free, position)


def _step(
    assumptions: Assumptions,
    free: Sequence[Assumption],
    position: Vector,
    errors: Vector,
    numbers: Sequence[Number],
) -> Vector:
    columns = []
    for index in range(len(free)):
        nudge = NUDGE if position[index] + NUDGE <= 1 else -NUDGE
        moved = position.copy()
        moved[index] += nudge
        columns.append((_errors(assumptions, free, moved, numbers) - errors) / nudge)
    solution = np.linalg.lstsq(np.stack(columns, axis=1), -errors, rcond=None)[0]
    return np.asarray(solution, dtype=np.float64)


def _errors(
    assumptions: Assumptions, free: Sequence[Assumption], position: Vector, numbers: Sequence[Number]
) -> Vector:
    rows = evaluate(_at(assumptions, free, position), numbers)
    relative = [row.projected / row.number.published - 1 for row in rows]
    return np.array([*relative, *(PRIOR * (2 * position - 1))])


def _at(assumptions: Assumptions, free: Sequence[Assumption], position: Vector) -> Assumptions:
    values = {
        entry.name: float(entry.low + share * (entry.high - entry.low))
        for entry, share in zip(free, position, strict=True)
    }
    return assumptions.with_values(values)
