"""A projected step's timeline as a Chrome trace, which Perfetto and chrome://tracing show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from suite.projection.simulate import Span

STREAMS = ("compute", "intra-node", "inter-node")
TURN = "head forward"
"""What is computed last in a forward."""


def write_trace(path: Path, spans: Sequence[Span], title: str) -> None:
    """Writes the JSON object; one row per stream, times in microseconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": _events(spans, title), "displayTimeUnit": "ms"}))


def around_the_turn(spans: Sequence[Span], blocks: int = 2) -> list[Span]:
    """What goes on from the forward of the last `blocks` blocks to the end of their backward, in the
    last micro-step: short enough to be looked at. Empty without a timeline."""
    computed = [span for span in spans if span.stream == STREAMS[0]]
    turns = [index for index, span in enumerate(computed) if span.name == TURN]
    if not turns:
        return []
    before, behind = computed[: turns[-1]], computed[turns[-1] :]
    start = _first_of(list(reversed(before)), blocks).start_s
    end = _first_of(behind, blocks).end_s
    return [span for span in spans if span.end_s > start and span.start_s < end]


def _first_of(spans: Sequence[Span], blocks: int) -> Span:
    """The farthest of them that still belongs to one of the first `blocks` blocks."""
    names: dict[str, None] = {}
    farthest = spans[0]
    for span in spans:
        name = " ".join(span.name.split()[:2])
        if name.startswith("block"):
            names[name] = None
        if len(names) > blocks:
            break
        farthest = span
    return farthest


def _events(spans: Sequence[Span], title: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = [
        {"ph": "M", "pid": 0, "name": "process_name", "args": {"name": f"{title} (projected)"}}
    ]
    for number, stream in enumerate(STREAMS):
        rows.append({"ph": "M", "pid": 0, "tid": number, "name": "thread_name", "args": {"name": stream}})
    for span in spans:
        rows.append(
            {
                "ph": "X",
                "pid": 0,
                "tid": STREAMS.index(span.stream),
                "name": span.name,
                "ts": span.start_s * 1e6,
                "dur": (span.end_s - span.start_s) * 1e6,
            }
        )
    return rows
