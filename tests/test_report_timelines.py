"""Kept timelines become pictures, and files that the report's page leads to."""

from __future__ import annotations

from pathlib import Path

import pytest
import record_factory as factory
from test_report import Page

from suite.errors import UsageError
from suite.harness.sweep import keep_timeline
from suite.harness.timeline import Timeline
from suite.impls.trace import Kind, Mark, Span
from suite.records import Record
from suite.reports.build import build_report
from suite.reports.cohorts import group_cohorts
from suite.reports.sections.timelines import shown_cohorts, timeline_table, timelines_section
from suite.reports.timelines import read_timelines


def spans(rank: int) -> list[Span]:
    later = 0.001 * rank
    return [
        Span(Kind.COMPUTE, "forward 0", 0.0 + later, 0.06 + later),
        Span(Kind.GATHER, "block 1", 0.01, 0.08),
        Span(Kind.GATHER, "block 2", 0.05, 0.09),
        Span(Kind.WAIT, "gather block 1", 0.06 + later, 0.08),
        Span(Kind.COMPUTE, "backward 0", 0.08, 0.2),
        Span(Kind.REDUCE, "block 0", 0.19, 0.205),
    ]


def keep(folder: Path, run: Record, logs_messages: bool = True) -> None:
    logged = [spans(rank) for rank in range(run.world_size)]
    if not logs_messages:
        logged = [[span for span in track if span.kind is Kind.COMPUTE] for track in logged]
    marks = [[Mark(0.0, 0), Mark(0.1, 1000), Mark(0.2, 3000)] for _ in logged]
    keep_timeline(folder, run, Timeline("a step", "emulated", run.ranks_per_node, logged, marks, 20_000.0))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for run in factory.weak_scaling():
        keep(tmp_path / "results", run, logs_messages=run.impl in ("zero3", "mics"))
    return tmp_path / "results"


def test_the_step_of_the_most_nodes_is_shown(results: Path) -> None:
    timelines = read_timelines([results])
    assert len(timelines) == 12
    ((cohort, found),) = shown_cohorts(group_cohorts(factory.weak_scaling()), timelines)
    assert cohort.any.nodes == 4
    assert sorted(item.run.impl for item in found) == ["deepspeed-zero3", "mics", "zero3"]


def test_a_track_adds_up_what_overlaps_only_once(results: Path) -> None:
    timelines = read_timelines([results])
    track = next(item for item in timelines if item.impl == "mics").ranks[0]
    assert track.total("compute") == pytest.approx(180)
    assert track.total("gather") == pytest.approx(80)
    assert track.link == [(0.0, 50.0), (100.0, 100.0), (200.0, 0.0)]


def test_what_was_not_logged_is_missing_and_not_zero(results: Path) -> None:
    ((_, found),) = shown_cohorts(group_cohorts(factory.weak_scaling()), read_timelines([results]))
    rows = {row[0].text: [cell.text for cell in row] for row in timeline_table(found).rows}
    assert rows["deepspeed-zero3"][2:6] == ["180", "–", "–", "–"]
    assert "–" not in rows["zero3"][2:6]


def test_the_page_shows_the_pictures_and_leads_to_the_traces(results: Path, tmp_path: Path) -> None:
    records, out = factory.weak_scaling(), tmp_path / "report"
    build_report(records, out, timelines=read_timelines([results]))
    text = (out / "index.html").read_text()
    page = Page(text)
    names = {"timeline-mics", "timeline-zero3", "timeline-deepspeed-zero3"}
    assert names <= set(page.ids) and "timelines" in page.ids
    traces = [link for link in page.links if link.startswith("timelines/")]
    assert traces and all((out / link).is_file() for link in traces)
    assert len(page.ids) == len(set(page.ids))
    build_report(records, out)  # a report may replace one that has timelines
    assert not (out / "timelines").exists()


def test_without_timelines_there_is_no_such_section() -> None:
    assert timelines_section(group_cohorts(factory.weak_scaling()), []) is None


def test_a_file_that_is_no_timeline_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "timelines"
    folder.mkdir()
    (folder / "odd.json").write_text('{"traceEvents": []}')
    with pytest.raises(UsageError, match=r"odd\.json is not a timeline"):
        read_timelines([tmp_path])
