"""What a verdict is made of: outcomes, findings per kind of evidence, and the judge of a claim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from suite.records import Record

REPRODUCED = "reproduced"
PARTLY = "partly"
NOT_REPRODUCED = "not reproduced"
NOT_TESTABLE = "not testable here"
VERDICTS = (REPRODUCED, PARTLY, NOT_REPRODUCED, NOT_TESTABLE)


@dataclass(frozen=True)
class Finding:
    """What the records of one kind of evidence say about one claim."""

    evidence: str
    outcome: str
    ours: str
    spread: str
    runs: tuple[Record, ...]


@dataclass(frozen=True)
class Judge:
    """How a claim is tested; `evaluate` gets the runs of one kind of evidence and returns None when
    they do not hold what it needs. `commands` repeat the row; without them, its runs are repeated one
    by one."""

    rule: str
    evaluate: Callable[[Sequence[Record]], Finding | None]
    commands: tuple[str, ...] = ()
