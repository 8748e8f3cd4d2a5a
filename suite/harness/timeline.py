"""One step of every rank on a common clock, in the format of Chrome's and Perfetto's trace viewers.

The file is also what the report's pictures are drawn from: events of category `compute`, `wait`, `gather`
and `reduce`, and a counter `link` (how busy the way out of the rank's node is) where it is shaped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from suite.config import Config
from suite.harness.launch import launch, prepare, scale_of, step_timeout_s
from suite.harness.worker import Worker
from suite.impls.trace import Kind, Log, Mark, Span

IN_FLIGHT = (Kind.GATHER, Kind.REDUCE)
"""Kinds of which several may be under way at once."""
LINK, BUSY = "link", "busy, %"


@dataclass(frozen=True)
class Timeline:
    """`spans[rank]` and `marks[rank]`, in seconds from the first of all ranks, undilated where the
    testbed is slowed down. Ranks are numbered node by node. `link_bytes_s`: what a node's shaped link
    carries, in the same seconds."""

    title: str
    evidence: str
    ranks_per_node: int
    spans: list[list[Span]]
    marks: list[list[Mark]] = field(default_factory=list)
    link_bytes_s: float | None = None


def trace_step(config: Config) -> Timeline:
    """Runs the configured warm-up and one more step, and returns what was logged in that one.

    Raises UsageError for wrong input and RankError when a rank fails.
    """
    prepare(config)
    with launch(config, Worker) as ranks:
        for step in range(config.train.warmup):
            ranks.call("step", timeout_s=step_timeout_s(config, step))
        ranks.call("traced_step", timeout_s=step_timeout_s(config, config.train.warmup))
        logged = ranks.call("trace", timeout_s=config.testbed.timeout_s)
    return timeline_of(config, logged)


def timeline_of(config: Config, logged: Sequence[Log]) -> Timeline:
    """What the ranks logged in the same step, on one clock."""
    scale = scale_of(config)
    dilation = 1.0 if scale is None else scale.dilation
    starts = [span.start_s for log in logged for span in log.spans]
    zero = min([*starts, *(mark.at_s for log in logged for mark in log.marks)], default=0.0)

    def moved(moment_s: float) -> float:
        return (moment_s - zero) / dilation

    return Timeline(
        f"{config.impl.name}, {config.workload.name}, {config.world_size} ranks",
        "measured" if scale is None else "emulated",
        config.ranks_per_node,
        [
            [replace(span, start_s=moved(span.start_s), end_s=moved(span.end_s)) for span in log.spans]
            for log in logged
        ],
        [[Mark(moved(mark.at_s), mark.sent_bytes) for mark in log.marks] for log in logged],
        None if scale is None else scale.link_bits_per_s * dilation / 8,
    )


def write_timeline(path: Path, timeline: Timeline, about: dict[str, Any] | None = None) -> None:
    """As one file that is complete or not there; `about` says which run it belongs to."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    try:
        aside.write_text(json.dumps(chrome_trace(timeline, about), separators=(",", ":")))
        aside.rename(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def chrome_trace(timeline: Timeline, about: dict[str, Any] | None = None) -> dict[str, Any]:
    """One process per rank, with a track for the training thread (compute, wait), one for each kind
    that is in flight beside it, and one for its node's link."""
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(timeline.spans):
        name = f"rank {rank} (node {rank // timeline.ranks_per_node})"
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": name}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}})
        for number, span in enumerate(spans):
            events += _events(rank, f"{rank}.{number}", span)
    if timeline.link_bytes_s is not None:
        for rank, marks in enumerate(timeline.marks):
            events += _link_events(rank, marks, timeline.link_bytes_s)
    general = {
        "title": timeline.title,
        "evidence": timeline.evidence,
        "ranks_per_node": timeline.ranks_per_node,
    }
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": general | (about or {})}


def _events(rank: int, identity: str, span: Span) -> Iterator[dict[str, Any]]:
    """Microseconds. A span in flight may overlap its like, so it is a pair of asynchronous events."""
    start, end = _microseconds(span.start_s), _microseconds(span.end_s)
    event = {"name": span.name, "cat": span.kind.value, "pid": rank, "tid": 0}
    if span.kind in IN_FLIGHT:
        yield {**event, "ph": "b", "id": identity, "ts": start}
        yield {**event, "ph": "e", "id": identity, "ts": end}
    else:
        yield {**event, "ph": "X", "ts": start, "dur": round(end - start, 1)}


def _link_events(rank: int, marks: Sequence[Mark], link_bytes_s: float) -> Iterator[dict[str, Any]]:
    """The share of its speed at which the link runs, from each mark to the next."""
    event = {"ph": "C", "name": LINK, "pid": rank, "tid": 0}
    for mark, following in pairwise(marks):
        if following.at_s > mark.at_s:
            speed = (following.sent_bytes - mark.sent_bytes) / (following.at_s - mark.at_s)
            busy = {BUSY: round(100 * speed / link_bytes_s, 1)}
            yield {**event, "ts": _microseconds(mark.at_s), "args": busy}
    for last in marks[-1:]:  # what comes after is not known
        yield {**event, "ts": _microseconds(last.at_s), "args": {BUSY: 0.0}}


def _microseconds(seconds: float) -> float:
    return round(seconds * 1e6, 1)
