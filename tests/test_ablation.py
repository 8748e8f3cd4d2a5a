"""Judging an optimisation: the same training with and without it, round by round."""

from __future__ import annotations

from dataclasses import replace

import pytest
import record_factory as factory

from suite.records import Record, Spread
from suite.reports.claims import Verdict, judge
from suite.reports.judges.pairs import sign_test


def run(times: list[float], impl: str = "zero3", **options: bool) -> Record:
    base = factory.run(impl, options=options)
    return replace(base, step_times_s=times, step_time_s=Spread.of(times), details={"deciding_s": 0.001})


def verdict_on(claim: str, *records: Record) -> Verdict:
    return next(verdict for verdict in judge(records) if verdict.claim.id == claim)


ON = [1.0, 1.3, 0.9, 1.1, 1.0, 1.2]


def test_slower_in_every_round_is_reproduced_although_the_ranges_overlap() -> None:
    off = [time * 1.1 for time in ON]
    verdict = verdict_on("Z4", run(ON), run(off, coalesced=False))
    assert verdict.verdict == "reproduced"
    assert "× 1.10 the step time" in verdict.findings[0].ours
    assert "slower in 6 of 6 rounds" in verdict.findings[0].ours
    assert verdict.findings[0].spread == "ratio round by round: 1.10 to 1.10"
    assert verdict.commands[0] == "suite sweep sweeps/Z4.yaml --out ../again"


def test_slower_in_half_of_the_rounds_is_no_difference_and_not_reproduced() -> None:
    off = [time * factor for time, factor in zip(ON, [2.0, 0.9, 2.0, 0.9, 2.0, 0.9], strict=True)]
    verdict = verdict_on("Z4", run(ON), run(off, coalesced=False))
    assert verdict.verdict == "not reproduced"
    assert "no significant difference" in verdict.findings[0].ours


def test_another_option_or_another_cohort_says_nothing_about_a_claim() -> None:
    off = [2.0] * 6
    elsewhere = replace(run(off, coalesced=False), cohort="another")
    assert verdict_on("Z4", run(ON), run(off, preflattened=False)).verdict == "not testable here"
    assert verdict_on("Z4", run(ON), elsewhere).verdict == "not testable here"
    both = run(off, coalesced=False, preflattened=False)
    assert verdict_on("Z4", run(ON), both).verdict == "not testable here"


@pytest.mark.parametrize(("deciding_s", "expected"), [(0.001, "reproduced"), (0.5, "not reproduced")])
def test_deciding_is_judged_by_its_share_of_the_step(deciding_s: float, expected: str) -> None:
    on = replace(run(ON), details={"deciding_s": deciding_s})
    assert verdict_on("Z3", on, run(ON, cached_schedule=False)).verdict == expected


def test_all_together_is_at_most_partly_reproduced_away_from_the_published_hardware() -> None:
    assert verdict_on("Z8", run(ON), run([9.0] * 6, "zero3-unoptimized")).verdict == "partly"
    assert verdict_on("Z8", run(ON), run(ON, "zero3-unoptimized")).verdict == "not reproduced"


def test_the_sign_test_counts_fair_coins() -> None:
    assert sign_test(6, 6) == pytest.approx(1 / 64)
    assert sign_test(5, 6) == pytest.approx(7 / 64)
    assert sign_test(0, 6) == 1 and sign_test(0, 0) == 1
