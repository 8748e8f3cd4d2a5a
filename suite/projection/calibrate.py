"""Fits the few free assumptions to the stated subset of published numbers; the rest stays prediction.

A pattern search: each parameter in turn is moved up and down inside its plausible range, by ever
smaller shares of it. It needs no derivatives, which have kinks wherever the compute begins to wait,
and it is started from several places, because such kinks also make local minima. What was fitted before
plays no part: the same numbers give the same assumptions.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

from suite.projection.assumptions import Assumption, Assumptions
from suite.projection.published_runs import Number, evaluate

STRIDES = (0.15, 0.08, 0.04, 0.02, 0.01)
"""Shares of a parameter's range by which it is moved."""
ROUNDS = 6
"""Of all parameters, at most, with each stride."""
TRIED, STARTS = 30, 3
"""Random points that are tried, and the best of them from which a search starts; another one starts in the
middle of all ranges."""
POWER = 4
"""Of an error in the misfit. What is aimed at is a bound on each error: a large one weighs more than it
would among squares."""
PRIOR = 0.01
"""Pull towards the middle of the range, as a relative error for a parameter at its end: it decides
where the numbers do not."""


def calibrate(
    assumptions: Assumptions, numbers: Sequence[Number], tried: int = TRIED, starts: int = STARTS
) -> Assumptions:
    """The assumptions with those marked `fitted` moved to where the numbers are met best. On all cores."""
    places = [_middle(assumptions), *_random_places(assumptions, tried)]
    with ProcessPoolExecutor(mp_context=get_context("fork")) as pool:
        misfits = list(pool.map(partial(misfit, numbers=numbers), places))
        best = sorted(range(1, len(places)), key=misfits.__getitem__)[:starts]
        searched = list(pool.map(partial(_search, numbers=numbers), [places[index] for index in (0, *best)]))
    found, _ = min(searched, key=lambda result: result[1])
    return found


def _middle(assumptions: Assumptions) -> Assumptions:
    return assumptions.with_values({entry.name: (entry.low + entry.high) / 2 for entry in assumptions.fitted})


def _random_places(assumptions: Assumptions, count: int) -> Iterator[Assumptions]:
    dice = random.Random(0)
    for _ in range(count):
        values = {entry.name: dice.uniform(entry.low, entry.high) for entry in assumptions.fitted}
        yield assumptions.with_values(values)


def _search(assumptions: Assumptions, numbers: Sequence[Number]) -> tuple[Assumptions, float]:
    """The best place found from here, and its misfit."""
    best, least = assumptions, misfit(assumptions, numbers)
    for stride in STRIDES:
        for _ in range(ROUNDS):
            before = least
            for entry in assumptions.fitted:
                for sign in (1, -1):
                    moved = _moved(best, entry, sign * stride)
                    error = misfit(moved, numbers)
                    if error < least:
                        best, least = moved, error
                        break
            if least == before:
                break
    return best, least


def misfit(assumptions: Assumptions, numbers: Sequence[Number]) -> float:
    """Sum of the relative errors and of the pulls towards the middle of the ranges, each to the POWER."""
    rows = evaluate(assumptions, numbers)
    errors = [row.projected / row.number.published - 1 for row in rows]
    errors += [PRIOR * (2 * _share(entry) - 1) for entry in assumptions.fitted]
    return sum(error**POWER for error in errors)


def _share(entry: Assumption) -> float:
    """Where in its range a value lies, 0 to 1."""
    return (entry.value - entry.low) / (entry.high - entry.low)


def _moved(assumptions: Assumptions, entry: Assumption, by: float) -> Assumptions:
    share = min(1.0, max(0.0, _share(assumptions.entries[entry.name]) + by))
    return assumptions.with_values({entry.name: entry.low + share * (entry.high - entry.low)})
