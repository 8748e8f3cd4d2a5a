"""Members that are not alive together: the same result, in rounds, and said so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import record_factory as factory

from suite.config import Config
from suite.config_load import load
from suite.harness.turns import ALONE_NOTE, measure_alone
from suite.records import Record
from suite.reports.metrics import STEP_TIME, per_step

SMALL = ["workload.model.layers=1", "workload.model.hidden=64", "workload.data=synthetic"]


def test_members_alone_take_turns_in_rounds_and_are_comparable() -> None:
    words = [*SMALL, "testbed.ranks=1", "train.steps=3", "train.warmup=0", "testbed.alone=true"]
    cohort = [load([f"impl={name}", *words]) for name in ("floor", "ddp")]
    said: list[str] = []
    floor, ddp = measure_alone(cohort, said.append)
    assert isinstance(floor, Record) and isinstance(ddp, Record)
    rounds = [text for text in said if text.startswith("round")]
    assert rounds == ["round 1 of floor", "round 1 of ddp", "round 2 of floor", "round 2 of ddp"]
    assert len(floor.step_times_s) == 3 == floor.step_time_s.n  # two steps, then one
    assert floor.cohort == ddp.cohort and floor.config_hash == cohort[0].hash()
    assert ALONE_NOTE in floor.notes and ALONE_NOTE in ddp.notes
    assert ddp.samples_per_s == pytest.approx(2 / ddp.step_time_s.median)


def test_the_curves_of_the_last_round_get_the_last_times() -> None:
    run = factory.run("ddp")
    warmup, times = run.config["train"]["warmup"], run.step_times_s[:5]
    alone = replace(run, losses=run.losses[: warmup + 2], grad_norms=run.grad_norms[: warmup + 2])
    rows = per_step(replace(alone, step_times_s=times))
    assert [row.get(STEP_TIME) for row in rows] == [*[None] * warmup, *times[-2:]]


def test_a_member_that_fails_is_left_out_of_the_next_round(monkeypatch: pytest.MonkeyPatch) -> None:
    from suite.errors import RankError
    from suite.harness import turns
    from suite.harness.measure import Failure

    tried: list[str] = []

    def measure(cohort: list[Config], *_: object) -> list[Failure]:
        tried.append(cohort[0].impl.name)
        return [Failure(cohort[0], RankError("rank 0 failed"))]

    monkeypatch.setattr(turns, "measure", measure)
    cohort = [load([f"impl={name}"]) for name in ("ddp", "zero3")]
    failures = measure_alone(cohort)
    assert tried == ["ddp", "zero3"]
    assert [item.config for item in failures if isinstance(item, Failure)] == cohort  # whole, not a round's
