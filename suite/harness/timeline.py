"""One step of every rank on a common clock, in the format of Chrome's and Perfetto's trace viewers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from suite.config import Config
from suite.harness.launch import launch, prepare, scale_of, step_timeout_s
from suite.harness.worker import Worker
from suite.impls.trace import Kind, Span

IN_FLIGHT = (Kind.GATHER, Kind.REDUCE)
"""Kinds of which several may be under way at once."""


@dataclass(frozen=True)
class Timeline:
    """`spans[rank]`, in seconds from the first one of all ranks, undilated where the testbed is slowed
    down. Ranks are numbered node by node."""

    title: str
    evidence: str
    ranks_per_node: int
    spans: list[list[Span]]


def trace_step(config: Config) -> Timeline:
    """Runs the configured warm-up and one more step, and returns what was logged in that one.

    Raises UsageError for wrong input and RankError when a rank fails.
    """
    prepare(config)
    with launch(config, Worker) as ranks:
        for step in range(config.train.warmup):
            ranks.call("step", timeout_s=step_timeout_s(config, step))
        logged = ranks.call("traced_step", timeout_s=step_timeout_s(config, config.train.warmup))
    scale = scale_of(config)
    title = f"{config.impl.name}, {config.workload.name}, {config.world_size} ranks"
    return Timeline(
        title,
        "measured" if scale is None else "emulated",
        config.ranks_per_node,
        _undilated(logged, 1.0 if scale is None else scale.dilation),
    )


def chrome_trace(timeline: Timeline) -> dict[str, Any]:
    """One process per rank, with a track for the training thread (compute, wait) and one for each kind
    that is in flight beside it."""
    events: list[dict[str, Any]] = []
    for rank, spans in enumerate(timeline.spans):
        name = f"rank {rank} (node {rank // timeline.ranks_per_node})"
        events.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": name}})
        events.append({"ph": "M", "name": "process_sort_index", "pid": rank, "args": {"sort_index": rank}})
        for number, span in enumerate(spans):
            events += _events(rank, f"{rank}.{number}", span)
    about = {"title": timeline.title, "evidence": timeline.evidence}
    return {"traceEvents": events, "displayTimeUnit": "ms", "otherData": about}


def _events(rank: int, identity: str, span: Span) -> Iterator[dict[str, Any]]:
    """Microseconds. A span in flight may overlap its like, so it is a pair of asynchronous events."""
    start, end = span.start_s * 1e6, span.end_s * 1e6
    event = {"name": span.name, "cat": span.kind.value, "pid": rank, "tid": 0}
    if span.kind in IN_FLIGHT:
        yield {**event, "ph": "b", "id": identity, "ts": start}
        yield {**event, "ph": "e", "id": identity, "ts": end}
    else:
        yield {**event, "ph": "X", "ts": start, "dur": end - start}


def _undilated(logged: Sequence[Sequence[Span]], dilation: float) -> list[list[Span]]:
    zero = min((span.start_s for spans in logged for span in spans), default=0.0)

    def moved(span: Span) -> Span:
        start, end = ((moment - zero) / dilation for moment in (span.start_s, span.end_s))
        return replace(span, start_s=start, end_s=end)

    return [[moved(span) for span in spans] for spans in logged]
