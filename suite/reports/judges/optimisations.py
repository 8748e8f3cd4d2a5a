"""Z2 to Z9: the engine's optimisations, each switched off alone and all of them together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from suite.records import Record
from suite.reports.judges.pairs import (
    SLOWER_RULE,
    Pair,
    as_it_is,
    both,
    options_of,
    pairs,
    rounds_text,
    where,
)
from suite.reports.judges.projections import speedups
from suite.reports.tables import MIB, rounded
from suite.reports.verdicts import NOT_REPRODUCED, NOT_TESTABLE, PARTLY, Finding, Judge, shared

ENGINE = "zero3"
ALL_OFF = "zero3-unoptimized"
OPTIONS = {
    "fine_grained_sync": "Z2",
    "cached_schedule": "Z3",
    "coalesced": "Z4",
    "preflattened": "Z5",
    "contiguous_arenas": "Z6",
    "one_kernel_norm": "Z7",
    "group_batched": "Z9",
}
"""The engine's switch -> the claim that it stands for."""
DECIDING_LIMIT = 0.01
"""Share of a step below which the time for deciding counts as none."""
MEMORY_MARGIN = 0.05
"""Share by which peak memory must rise to count: allocators and timing move it by some percent."""


def one_off(option: str, run: Record) -> bool:
    return run.impl == ENGINE and options_of(run) == {option: False}


def _pairs(runs: Sequence[Record], is_off: Callable[[Record], bool]) -> list[Pair]:
    return pairs(runs, as_it_is(ENGINE), is_off)


def _finding(found: Sequence[Pair], outcome: str, ours: str, spread: str = "") -> Finding:
    return Finding(found[0].on.evidence, outcome, ours, spread or rounds_text(found), both(found))


def _time(option: str, runs: Sequence[Record]) -> Finding | None:
    found = _pairs(runs, partial(one_off, option))
    if not found:
        return None
    outcome = shared(sum(pair.slower for pair in found), len(found))
    return _finding(found, outcome, "; ".join(pair.text() for pair in found))


def _deciding(runs: Sequence[Record]) -> Finding | None:
    """Z3: the share of the step that decisions take, cached and not."""
    found = [
        pair
        for pair in _pairs(runs, partial(one_off, "cached_schedule"))
        if "deciding_s" in pair.on.details and "deciding_s" in pair.off.details
    ]
    if not found:
        return None
    shares = [_deciding_share(pair.on) for pair in found]
    ours = "; ".join(
        f"deciding takes {share:.3%} of a step cached, {_deciding_share(pair.off):.3%} not cached "
        f"({where(pair.on)})"
        for pair, share in zip(found, shares, strict=True)
    )
    return _finding(found, shared(sum(share < DECIDING_LIMIT for share in shares), len(found)), ours)


def _deciding_share(run: Record) -> float:
    """Of a step as this host lived it: an emulated one lasted longer here by its dilation."""
    return run.details["deciding_s"] / (run.step_time_s.median * run.details.get("dilation", 1.0))


def _arenas(runs: Sequence[Record]) -> Finding | None:
    """Z6: what the allocator had to hold at most, and how often it flushed. Processes without an
    accelerator have no allocator that could fragment, so theirs is shown and decides nothing."""
    found = [
        pair
        for pair in _pairs(runs, partial(one_off, "contiguous_arenas"))
        if _held(pair.on) and _held(pair.off)
    ]
    if not found:
        return None
    deciding = [pair for pair in found if pair.on.device]
    ours = "; ".join(map(_arenas_text, deciding or found))
    worse = sum(
        _held(pair.off) > (1 + MEMORY_MARGIN) * _held(pair.on) or _flushes(pair.off) > _flushes(pair.on)
        for pair in deciding
    )
    changes = sorted(_held(pair.off) / _held(pair.on) for pair in deciding or found)
    return _finding(
        deciding or found,
        shared(worse, len(deciding)) if deciding else NOT_TESTABLE,
        ours if deciding else f"{ours}; no accelerator, no caching allocator",
        f"memory without over with: {changes[0]:.2f} to {changes[-1]:.2f}",
    )


def _held(run: Record) -> float:
    """Bytes that a rank took from the device at most, its allocator's cache included; 0 if unknown."""
    return run.details.get("peak_reserved_bytes") or run.peak_memory_bytes or 0


def _flushes(run: Record) -> float:
    return run.details.get("alloc_retries", 0)


def _arenas_text(pair: Pair) -> str:
    def of(run: Record) -> str:
        words = [f"{rounded(_held(run) / MIB)} MiB"]
        if "fragmentation" in run.details:
            words += [f"{run.details['fragmentation']:.1%} of it fragmented", f"{_flushes(run):.0f} flushes"]
        return ", ".join(words)

    return (
        f"a rank holds {of(pair.on)} with it, {of(pair.off)} without, × {pair.ratio:.2f} the step time "
        f"({where(pair.on)})"
    )


def _all_together(runs: Sequence[Record]) -> Finding | None:
    """Z8: its number belongs to 64 A100, so anything else confirms at most the direction."""
    found = _pairs(runs, lambda run: run.impl == ALL_OFF)
    if not found:
        return None
    outcome = PARTLY if any(pair.slower for pair in found) else NOT_REPRODUCED
    return _finding(found, outcome, "; ".join(pair.text("all off:") for pair in found))


def _judge(option: str) -> Judge:
    rule = (
        f"The engine ({ENGINE}) with only {option} off is slower than with everything on. {SLOWER_RULE} "
        "Reproduced: in every cohort; not reproduced: in none; partly: anything between."
    )
    return Judge(rule, partial(_time, option))


OPTIMISATION_JUDGES = {
    "Z2": _judge("fine_grained_sync"),
    "Z3": Judge(
        f"With cached_schedule on, deciding takes less than {DECIDING_LIMIT:.0%} of a step. Reproduced: in "
        "every cohort that also holds the run without; not reproduced: in none; partly: anything between.",
        _deciding,
    ),
    "Z4": _judge("coalesced"),
    "Z5": _judge("preflattened"),
    "Z6": Judge(
        "Without contiguous_arenas the memory that a rank holds, its allocator's cache included, is over "
        f"{MEMORY_MARGIN:.0%} higher, or the allocator flushes more often. Reproduced: in every cohort; not "
        "reproduced: in none; partly: anything between. Runs without an accelerator decide nothing: what "
        "the claim speaks of does not exist there.",
        _arenas,
    ),
    "Z7": _judge("one_kernel_norm"),
    "Z8": Judge(
        "Projected: reproduced when every ratio of after to before is within 10% of the published one; "
        f"partly when some are, or all are above 1. On other hardware at most partly: {ALL_OFF} is slower "
        f"than {ENGINE} in some cohort; not reproduced: in none. {SLOWER_RULE}",
        _all_together,
        speedups,
    ),
    "Z9": _judge("group_batched"),
}
