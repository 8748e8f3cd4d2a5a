"""The results file: nothing finished is ever lost, nothing unfinished is ever read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from record_factory import run

from suite.errors import UsageError
from suite.records import CheckRecord, Record, Spread, append, from_json, read, to_json

CHECK = CheckRecord(
    impl="ddp",
    workload="bert-tiny",
    world_size=4,
    micro_steps=1,
    precision="fp32",
    steps=5,
    max_abs_grad_diff=1e-7,
    max_rel_grad_diff=1e-6,
    max_abs_param_diff=1e-6,
    max_replica_diff=0.0,
    max_loss_diff=1e-7,
    max_rel_grad_norm_diff=1e-7,
    tolerance={"max_abs_grad_diff": 1e-6},
    ok=True,
    worst={},
    env={},
    config={},
    config_hash="abc",
    started_at="2026-01-01T00:00:00+00:00",
)


def test_what_is_appended_is_read_back_in_order(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "records.jsonl"
    records = [replace(CHECK, config_hash=str(number)) for number in range(3)]
    for record in records:
        append(file, record)
    assert read(file) == records


def test_a_line_cut_off_by_a_crash_is_not_read_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    append(file, CHECK)
    with file.open("ab") as stream:
        stream.write(to_json(replace(CHECK, impl="lost")).encode()[:-20])
    assert [record.impl for record in read(file)] == ["ddp"]
    append(file, replace(CHECK, impl="next"))
    assert [record.impl for record in read(file)] == ["ddp", "next"]


def test_a_last_line_that_only_wants_its_end_is_kept(tmp_path: Path) -> None:
    """As an editor leaves it that a record was pasted into."""
    file = tmp_path / "records.jsonl"
    append(file, CHECK)
    with file.open("ab") as stream:
        stream.write(to_json(replace(CHECK, impl="pasted")).encode())
    assert [record.impl for record in read(file)] == ["ddp", "pasted"]
    append(file, replace(CHECK, impl="next"))
    assert [record.impl for record in read(file)] == ["ddp", "pasted", "next"]


@pytest.mark.parametrize("line", ["[]", "{}", "nonsense", '{"schema": "run/99"}', '{"schema": "run/1"}'])
def test_a_line_that_is_no_record_is_an_error_that_names_it(tmp_path: Path, line: str) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text(line + "\n")
    with pytest.raises(UsageError, match="line 1"):
        read(file)


def test_numbers_that_json_lacks_become_null() -> None:
    line = to_json(replace(CHECK, max_loss_diff=float("nan"), max_abs_param_diff=float("inf")))
    values = json.loads(line)
    assert values["max_loss_diff"] is None and values["max_abs_param_diff"] is None
    assert isinstance(from_json(line), CheckRecord)


def test_a_line_from_before_the_accelerator_s_fields_is_read_without_them() -> None:
    values = json.loads(to_json(run("ddp")))
    for key in ("device", "peak_tflops", "mfu", "hfu", "attention"):
        del values[key]
    record = from_json(json.dumps(values))
    assert isinstance(record, Record)
    assert record == replace(run("ddp"), started_at=record.started_at)
    assert record.mfu is None and record.attention is None


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40))
def test_a_spread_orders_its_figures(values: list[float]) -> None:
    spread = Spread.of(values)
    assert spread.min <= spread.median <= spread.p95 <= spread.max
    assert spread.n == len(values) and spread.p95 in values


def test_the_spread_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least one"):
        Spread.of([])
