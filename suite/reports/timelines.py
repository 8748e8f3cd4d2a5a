"""Timelines that were kept beside the records: one traced step each, in the format of trace viewers."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from suite.errors import UsageError
from suite.records import Record
from suite.reports.cohorts import Cohort

FOLDER = "timelines"
LOGGED = ("wait", "gather", "reduce")
"""What an implementation logs itself, if it logs anything; compute is logged for all."""


@dataclass(frozen=True)
class Interval:
    """Milliseconds from the begin of the step."""

    start: float
    end: float

    @property
    def length(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class RankTrack:
    """What one rank did, by kind; `link` is how busy its node's way out was, percent from each moment on."""

    intervals: dict[str, list[Interval]]
    link: list[tuple[float, float]]

    def total(self, kind: str) -> float:
        """Milliseconds in which at least one of that kind was under way."""
        total, until = 0.0, 0.0
        for item in sorted(self.intervals.get(kind, []), key=lambda item: item.start):
            total += max(0.0, item.end - max(item.start, until))
            until = max(until, item.end)
        return total

    @property
    def has_messages(self) -> bool:
        """Whether the implementation has logged what it sends and waits for."""
        return any(self.intervals.get(kind) for kind in LOGGED)

    @property
    def end(self) -> float:
        """The last reading of the link is that at the end of the step."""
        ends = [item.end for items in self.intervals.values() for item in items]
        return max([*ends, *(moment for moment, _ in self.link)], default=0.0)

    def idle(self) -> list[Interval]:
        """Where the training thread does not compute: it waits, or does the host's own work."""
        found, until = [], 0.0
        computing = sorted(self.intervals.get("compute", []), key=lambda item: item.start)
        for item in [*computing, Interval(self.end, self.end)]:
            if item.start > until:
                found.append(Interval(until, item.start))
            until = max(until, item.end)
        return found


@dataclass(frozen=True)
class Timeline:
    """One step of one run; `config_hash` and `cohort` are those of its record, ranks in their order."""

    file: Path
    impl: str
    config_hash: str
    cohort: str
    ranks_per_node: int
    ranks: tuple[RankTrack, ...]

    @property
    def link(self) -> str:
        """Its place in the report's folder."""
        return f"{FOLDER}/{self.file.name}"

    @property
    def end(self) -> float:
        return max(rank.end for rank in self.ranks)


@dataclass(frozen=True)
class Traced:
    """A run with its timeline, under its label in its cohort."""

    label: str
    run: Record
    timeline: Timeline


def read_timelines(folders: Iterable[Path]) -> list[Timeline]:
    """Those in `FOLDER` of these result folders. Raises UsageError for a file that is no timeline."""
    files = [
        file for folder in folders if folder.is_dir() for file in sorted(folder.glob(f"{FOLDER}/*.json"))
    ]
    return [_read(file) for file in files]


def _read(file: Path) -> Timeline:
    try:
        content = json.loads(file.read_text())
        about, events = content["otherData"], content["traceEvents"]
        ranks = sorted({event["pid"] for event in events})
        if not ranks:
            raise ValueError("it holds no event")
        tracks = _tracks(events)
        return Timeline(
            file,
            about["impl"],
            about["config_hash"],
            about["cohort"],
            about["ranks_per_node"],
            tuple(tracks[rank] for rank in ranks),
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UsageError(f"{file} is not a timeline ({error}); delete it, or run its cell again") from error


def _tracks(events: Sequence[dict[str, Any]]) -> dict[int, RankTrack]:
    tracks: dict[int, RankTrack] = defaultdict(lambda: RankTrack({}, []))
    begun: dict[str, float] = {}
    for event in events:
        track, at = tracks[event["pid"]], event.get("ts", 0.0) / 1000
        if event["ph"] == "X":
            interval = Interval(at, at + event["dur"] / 1000)
            track.intervals.setdefault(event["cat"], []).append(interval)
        elif event["ph"] == "b":
            begun[event["id"]] = at
        elif event["ph"] == "e":
            track.intervals.setdefault(event["cat"], []).append(Interval(begun.pop(event["id"]), at))
        elif event["ph"] == "C":
            (busy,) = event["args"].values()
            track.link.append((at, busy))
    return tracks


def traced(cohort: Cohort, timelines: Iterable[Timeline]) -> list[Traced]:
    """The cohort's runs that have a timeline, fastest first, the floor left out."""
    found = {(item.config_hash, item.cohort): item for item in timelines}
    return [
        Traced(label, run, found[run.config_hash, run.cohort])
        for label, run in zip(cohort.labels, cohort.runs, strict=True)
        if (run.config_hash, run.cohort) in found
    ]
