"""Two results against each other, and records and tables for other programs."""

from __future__ import annotations

import csv
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import record_factory as factory

from suite import cli
from suite.errors import UsageError
from suite.records import Record, Spread, append
from suite.reports.compare import Interval, compare, share, together
from suite.reports.export import export_latex, export_records, to_latex
from suite.reports.tables import Table, number, word

STEPS = [1.0, 1.02, 0.98, 1.01, 0.99, 1.0]


def timed(factor: float = 1.0, steps: list[float] = STEPS, impl: str = "zero3", **changes: object) -> Record:
    times = [time * factor for time in steps]
    return replace(factory.run(impl), step_times_s=times, step_time_s=Spread.of(times), **changes)  # type: ignore[arg-type]


@pytest.fixture
def folders(tmp_path: Path):
    def write(*factors: float) -> list[str]:
        for index, factor in enumerate(factors):
            append(tmp_path / str(index) / "records.jsonl", timed(factor))
        return [str(tmp_path / str(index)) for index in range(len(factors))]

    return write


@pytest.mark.parametrize(
    ("factor", "verdict"), [(1.2, "slower"), (0.8, "faster"), (1.001, "no significant difference")]
)
def test_the_interval_decides(factor: float, verdict: str):
    (item,) = compare([timed()], [timed(factor)])
    assert item.verdict == verdict
    assert item.interval.low <= item.interval.middle <= item.interval.high
    assert item.interval.middle == pytest.approx(factor)


def test_three_steps_decide_nothing():
    (item,) = compare([timed(steps=STEPS[:3])], [timed(2.0, STEPS[:3])])
    assert item.verdict.startswith("no significant difference (fewer than 4")
    assert not item.regressed(0.05)


def test_the_same_numbers_give_the_same_interval():
    assert Interval.of(STEPS, STEPS[::-1]) == Interval.of(STEPS, STEPS[::-1])


def test_repetitions_of_one_configuration_count_together():
    (item,) = compare([timed(), timed()], [timed()])
    assert [len(side) for side in item.steps] == [12, 6]


def many(factor: float, steps: int = 3, slower: tuple[str, ...] | None = None) -> list[Record]:
    """Six configurations, all of them (or those named) slower by this factor."""
    impls = ("ddp", "fsdp2", "hsdp", "mics", "zero3", "deepspeed-zero3")
    chosen = impls if slower is None else slower
    return [
        timed(factor if impl in chosen else 1.0, [s * (1 + 0.01 * index) for s in STEPS[:steps]], impl)
        for index, impl in enumerate(impls)
    ]


def test_many_configurations_decide_together_what_three_steps_of_each_cannot():
    found = compare(many(1.0), many(1.2))
    assert all(item.verdict.startswith("no significant difference") for item in found)
    (whole,) = together(found)
    assert whole.verdict == "slower" and whole.interval.middle == pytest.approx(1.2)
    assert whole.regressed(0.05) and not whole.regressed(0.3)


def test_one_configuration_that_changed_does_not_speak_for_all():
    (whole,) = together(compare(many(1.0), many(1.5, slower=("mics",))))
    assert whole.verdict == "no significant difference"


def test_few_configurations_and_the_floor_are_no_whole():
    floors = [timed(impl="floor") for _ in range(9)]
    assert together(compare([*many(1.0)[:4], *floors], [*many(1.2)[:4], *floors])) == []


def test_kinds_of_evidence_are_never_taken_together():
    sides = [[*many(f), *(replace(run, evidence="emulated") for run in many(2 * f))] for f in (1.0, 1.1)]
    assert [(whole.evidence, len(whole.items)) for whole in together(compare(*sides))] == [
        ("emulated", 6),
        ("measured", 6),
    ]


def test_only_the_same_training_and_options_are_compared():
    other = timed(impl="mics")
    assert [item.label for item in compare([timed(), other], [timed(), factory.check("zero3")])] == ["zero3"]
    with pytest.raises(UsageError, match="in common"):
        compare([timed()], [other])


def test_emulated_and_measured_results_are_never_compared():
    with pytest.raises(UsageError, match="in common"):
        compare([timed()], [timed(evidence="emulated")])


@pytest.mark.parametrize(("factor", "threshold", "status"), [(1.2, "5%", 1), (1.2, "0.3", 0), (0.8, "5%", 0)])
def test_the_command_fails_on_a_regression_beyond_the_threshold(
    folders, factor: float, threshold: str, status: int
):
    assert cli.main(["compare", *folders(1.0, factor), "--threshold", threshold]) == status


@pytest.mark.parametrize(("text", "value"), [("5%", 0.05), ("0.1", 0.1), ("0", 0)])
def test_a_threshold_is_a_percentage_or_a_share(text: str, value: float):
    assert share(text) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "five", "-1%", "nan", "inf"])
def test_anything_else_is_no_threshold(text: str):
    with pytest.raises(UsageError, match="threshold"):
        share(text)


def test_the_terminal_shows_claims_and_tables_and_writes_no_page(
    folders, capsys, monkeypatch, tmp_path: Path
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", *folders(1.0), "--terminal"]) == 0
    shown = capsys.readouterr().out
    assert "M8" in shown and "not testable here" in shown and "zero3" in shown
    assert not (tmp_path / "report").exists()


def test_export_writes_every_kind_of_record_with_all_its_fields(tmp_path: Path):
    written, problem = export_records(factory.full_report(), tmp_path)
    names = {path.name for path in written}
    assert {"runs.csv", "checks.csv", "projections.csv"} <= names
    has_parquet = importlib.util.find_spec("pyarrow") is not None
    assert ("runs.parquet" in names) == has_parquet and bool(problem) != has_parquet
    rows = list(csv.DictReader((tmp_path / "runs.csv").open()))
    assert len(rows) == sum(isinstance(record, Record) for record in factory.full_report())
    assert rows[0]["step_time_s.median"] == str(factory.run("floor").step_time_s.median)
    assert rows[0]["config.train.seed"] == "0" and rows[0]["exposed_comm_s"] == ""


def test_parquet_keeps_numbers_as_numbers(tmp_path: Path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    export_records(factory.full_report(), tmp_path)
    table = parquet.read_table(tmp_path / "runs.parquet")
    assert str(table.schema.field("step_time_s.median").type) == "double"
    assert table.num_rows == sum(isinstance(record, Record) for record in factory.full_report())


def test_latex_escapes_what_would_break_it_and_sets_numbers_flush_right():
    table = Table("T", ("name", "50% & more"), ((word("a_b × {c}"), number(1.5)),))
    assert to_latex(table).splitlines()[1:] == [
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"name & 50\% \& more \\",
        r"\midrule",
        r"a\_b $\times$ \{c\} & 1.50 \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


def test_latex_files_are_named_after_their_tables(tmp_path: Path):
    table = Table("T", ("name",), ((word("a"),),))
    assert [path.name for path in export_latex([("c1-memory", table)], tmp_path)] == ["c1-memory.tex"]
