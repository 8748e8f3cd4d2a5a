"""A projected step's timeline as a Chrome trace, which Perfetto and chrome://tracing show."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from suite.projection.simulate import Span

STREAMS = ("compute", "intra-node", "inter-node")


def write_trace(path: Path, spans: Sequence[Span], title: str) -> None:
    """Writes the JSON object; one row per stream, times in microseconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"traceEvents": _events(spans, title), "displayTimeUnit": "ms"}))


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
