"""What a verdict is made of: outcomes, findings per kind of evidence, and the judge of a claim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from suite.records import ProjectionRecord, Record

REPRODUCED = "reproduced"
PARTLY = "partly"
NOT_REPRODUCED = "not reproduced"
NOT_TESTABLE = "not testable here"
VERDICTS = (REPRODUCED, PARTLY, NOT_REPRODUCED, NOT_TESTABLE)


@dataclass(frozen=True)
class Finding:
    """What the records of one kind of evidence say about one claim. A finding that is `not testable
    here` shows its numbers and decides nothing."""

    evidence: str
    outcome: str
    ours: str
    spread: str
    runs: tuple[Record | ProjectionRecord, ...]


@dataclass(frozen=True)
class Judge:
    """How a claim is tested: `evaluate` gets the runs of one kind of evidence, `projected` all
    projections; both return None when these do not hold what they need."""

    rule: str
    evaluate: Callable[[Sequence[Record]], Finding | None] = lambda _: None
    projected: Callable[[Sequence[ProjectionRecord]], Finding | None] = lambda _: None


def shared(good: int, of: int) -> str:
    """All, none, or something between."""
    return REPRODUCED if good == of else PARTLY if good else NOT_REPRODUCED
