"""What the report shows of projections: the figures of the sources, sensitivities, timelines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import record_factory as factory

from suite.cli import main
from suite.projection.assumptions import default_assumptions
from suite.projection.project import project
from suite.projection.published_runs import NUMBERS, evaluate, projected_config, sensitivities
from suite.projection.record import published_records, record_of
from suite.projection.trace import around_the_turn
from suite.records import ProjectionRecord
from suite.reports.figures import Plot, styles_for
from suite.reports.sections.projected import projected_section

NUMBER = next(number for number in NUMBERS if number.what == "RoBERTa-10B, ZeRO-2, 16 p3dn")
WORDS = ["impl=mics", "workload=bert-10b", "cluster=p4d", "cluster.nodes=2", "workload.model.layers=6"]


@pytest.fixture(scope="module")
def published() -> list[ProjectionRecord]:
    return published_records(evaluate(), default_assumptions())


def plots(records: list[ProjectionRecord]) -> dict[str, Plot]:
    section = projected_section(records, styles_for([record.impl for record in records]))
    return {} if section is None else {plot.name: plot for plot in section.plots}


def test_the_figures_of_the_sources_are_drawn_with_their_errors(published: list[ProjectionRecord]) -> None:
    found = plots(published)
    speedup, scaling = found["zero3-before-after"], found["weak-scaling-100b"]
    assert [row[0].text for row in speedup.table.rows] == ["RoBERTa-10B"] * 2 + ["RoBERTa-50B"] * 2
    assert [row[1].text for row in scaling.table.rows] == ["128", "512"] * 2
    assert all("points" in text or "%" in text for text in (speedup.alt, scaling.alt))


def test_sensitivities_are_shown_farthest_first(published: list[ProjectionRecord]) -> None:
    (record,) = [item for item in published if (item.published or {})["what"] == NUMBER.what]
    moved = {"overlap_slowdown": [0, 0.25, 44.0, 40.0], "launch_us": [5, 50, 44.8, 44.2]}
    shown = replace(record, published={**(record.published or {}), "sensitivities": moved})
    (plot,) = [plot for name, plot in plots([shown]).items() if name == "sensitivities"]
    assert [row[0].text for row in plot.table.rows] == ["overlap_slowdown", "launch_us"]


def test_every_assumption_is_moved_to_both_ends_of_its_range() -> None:
    rows = {row.assumption: row for row in sensitivities(numbers=[NUMBER])}
    gemm = rows["gemm_efficiency.V100"]
    assert gemm.at_low < gemm.at_high
    assert rows["gemm_efficiency.A100"].at_low == rows["gemm_efficiency.A100"].at_high


def test_a_timeline_is_cut_to_what_can_be_looked_at_and_drawn() -> None:
    step = project(projected_config(WORDS), timeline=True)
    part = around_the_turn(step.spans)
    names = [span.name for span in part if span.stream == "compute"]
    assert names[0] == "block 5 forward" and names[-1] == "block 5 backward"
    assert "head backward" in names and len(part) < len(step.spans)
    (plot,) = plots([record_of(step)]).values()
    assert "Timeline" in plot.title and len(plot.table.rows) == len(part)


@pytest.mark.parametrize("name", ["step.svg", "step.pdf"])
def test_the_command_draws_a_step(name: str, tmp_path: Path) -> None:
    assert main(["project", *WORDS, "--picture", str(tmp_path / name)]) == 0
    assert (tmp_path / name).read_bytes()[:5] in (b"<?xml", b"%PDF-")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--picture", "step.gif"], "neither SVG nor PDF"),
        (["--scaling", "--trace", "step.json"], "a timeline is of one step"),
    ],
)
def test_what_cannot_be_drawn_is_one_clear_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["project", *WORDS, *words]) == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split()) and "Traceback" not in error


def test_projections_without_sensitivities_or_timeline_are_drawn_without_them() -> None:
    assert not {"sensitivities", "projected-timeline-1"} & set(plots(factory.projections()))
