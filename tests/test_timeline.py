"""The timeline: every rank on one clock, undilated, and readable by trace viewers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from suite.cli import main
from suite.harness.timeline import Timeline, chrome_trace, trace_step, write_timeline
from suite.impls.trace import Kind, Mark, Span, Trace
from suite.testbeds.network import why_not

SPANS = [
    [Span(Kind.COMPUTE, "forward 0", 0.0, 0.5), Span(Kind.GATHER, "gather 1", 0.1, 0.9)],
    [Span(Kind.WAIT, "gather 1", 0.5, 0.9), Span(Kind.GATHER, "gather 2", 0.2, 1.0)],
]


def test_chrome_events_have_a_process_per_rank_and_pairs_for_what_is_in_flight() -> None:
    trace = chrome_trace(Timeline("zero3", "emulated", ranks_per_node=1, spans=SPANS))
    events = trace["traceEvents"]
    names = [event["args"]["name"] for event in events if event["name"] == "process_name"]
    assert names == ["rank 0 (node 0)", "rank 1 (node 1)"]
    complete = [(event["pid"], event["ts"], event["dur"]) for event in events if event["ph"] == "X"]
    assert complete == [(0, 0.0, 5e5), (1, 5e5, pytest.approx(4e5))]
    begun = {event["id"]: event["ts"] for event in events if event["ph"] == "b"}
    ended = {event["id"]: event["ts"] for event in events if event["ph"] == "e"}
    assert begun.keys() == ended.keys() and len(begun) == 2
    assert all(ended[key] > begun[key] for key in begun)


def test_a_shaped_link_is_a_counter_of_how_busy_it_is() -> None:
    marks = [[Mark(0.0, 0), Mark(0.5, 250), Mark(1.0, 750)], []]
    timeline = Timeline("zero3", "emulated", 1, SPANS, marks, link_bytes_s=1000.0)
    link = [event for event in chrome_trace(timeline)["traceEvents"] if event["ph"] == "C"]
    assert [(event["pid"], event["ts"], event["args"]["busy, %"]) for event in link] == [
        (0, 0.0, 50.0),
        (0, 5e5, 100.0),
        (0, 1e6, 0.0),
    ]


def test_a_written_timeline_says_which_run_it_belongs_to(tmp_path: Path) -> None:
    path = tmp_path / "timelines" / "one.json"
    write_timeline(path, Timeline("zero3", "emulated", 1, SPANS), {"config_hash": "abc"})
    about = json.loads(path.read_text())["otherData"]
    assert about["config_hash"] == "abc" and about["evidence"] == "emulated"
    assert [item.name for item in path.parent.iterdir()] == ["one.json"]


def test_nothing_is_logged_while_not_recording() -> None:
    trace = Trace()
    with trace.span(Kind.WAIT, "early"):
        trace.recording = True
    with trace.span(Kind.WAIT, "late"):
        pass
    trace.recording = False
    trace.add(Kind.GATHER, "after", trace.now())
    assert [span.name for span in trace.spans] == ["early", "late"]


@pytest.mark.skipif(why_not() is not None, reason=f"this host cannot build emulated networks: {why_not()}")
def test_the_command_writes_the_blocks_of_an_emulated_step(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    options = ["testbed=emulated", "cluster=p3dn", "workload=bert-scale", "testbed.dilation=2", "impl=floor"]
    shape = ["workload.model.layers=2", "testbed.nodes=2", "testbed.ranks_per_node=1", "train.warmup=1"]
    assert main(["timeline", *options, *shape, "--out", str(out)]) == 0
    events = [event for event in json.loads(out.read_text())["traceEvents"] if event["ph"] == "X"]
    for rank in (0, 1):
        names = [event["name"] for event in events if event["pid"] == rank]
        assert names == ["forward 0", "forward 1", "backward 1", "backward 0"]
    # A block's forward takes 10.65 ms on a V100 at half of its peak, its backward twice as long; what
    # the small model really computed before is taken off.
    assert all(event["dur"] < 23_000 for event in events)
    assert max(event["dur"] for event in events) > 15_000
    # The step begins with the embedding, which is not paced.
    assert 0 <= min(event["ts"] for event in events) < 20_000


def test_a_local_step_can_be_traced_too() -> None:
    from suite.config_load import load

    timeline = trace_step(load(["impl=floor", "workload.data=synthetic", "testbed.ranks=2"]))
    assert timeline.evidence == "measured" and len(timeline.spans) == 2
