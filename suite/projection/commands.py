"""What `suite project` and `suite plan` answer: records, and something to look at."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from enum import Enum
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from suite import records
from suite.errors import UsageError
from suite.projection import tables
from suite.projection.against_emulation import compare
from suite.projection.assumptions import default_assumptions, keep
from suite.projection.calibrate import calibrate
from suite.projection.elsewhere import NUMBERS_ELSEWHERE
from suite.projection.plan import make_plan
from suite.projection.project import project
from suite.projection.published_runs import evaluate, fit_numbers, projected_config, sensitivities
from suite.projection.record import emulated_records, published_records, record_of, scaling_records
from suite.projection.scaling import weak_scaling
from suite.projection.trace import write_trace
from suite.records import AnyRecord, ProjectionRecord


class Question(Enum):
    """What is asked of `suite project`."""

    STEP = "step"
    SCALING = "scaling"
    PUBLISHED = "published"
    ELSEWHERE = "elsewhere"
    CALIBRATE = "calibrate"
    SENSITIVITY = "sensitivity"

    @staticmethod
    def of(parsed: Namespace) -> Question:
        return next((item for item in Question if getattr(parsed, item.value, False)), Question.STEP)


def answer(
    words: Sequence[str],
    question: Question,
    trace: Path | None = None,
    markdown: bool = False,
    timeline: bool = False,
) -> tuple[list[ProjectionRecord], RenderableType]:
    """Raises UsageError for what cannot be projected, and for a timeline of more than one step."""
    if (timeline or trace is not None) and question is not Question.STEP:
        raise UsageError("a timeline is of one step; leave --trace, --timeline and --picture out")
    if words and question not in (Question.STEP, Question.SCALING):
        raise UsageError(f"--{question.value} has a set of runs of its own; leave {words[0]!r} out")
    if question is Question.SCALING:
        curve = weak_scaling(projected_config(words))
        return scaling_records(curve), tables.scaling_table(curve)
    if question is Question.STEP:
        projection = project(projected_config(words), timeline=timeline or trace is not None)
        if trace is not None:
            write_trace(trace, projection.spans, projection.config.impl.name)
        return [record_of(projection)], tables.projection_table(projection)
    given = default_assumptions()
    if question is Question.ELSEWHERE:
        now = evaluate(given, NUMBERS_ELSEWHERE)
        shown = _shown(tables.ELSEWHERE_COLUMNS, tables.elsewhere_rows(now), markdown)
        return published_records(now, given), shown
    if question is Question.CALIBRATE:
        given = calibrate(given, fit_numbers())
        keep(given)
    now = evaluate(given)
    if question is Question.SENSITIVITY:
        moved = sensitivities(given)
        rows = tables.sensitivity_rows(moved, now)
        return published_records(now, given, moved), _shown(tables.SENSITIVITY_COLUMNS, rows, markdown)
    return published_records(now, given), Group(
        _shown(tables.PUBLISHED_COLUMNS, tables.published_rows(now), markdown),
        _shown(tables.ASSUMPTION_COLUMNS, tables.assumption_rows(list(given.entries.values())), markdown),
    )


def against_emulation(
    measured: Sequence[AnyRecord], markdown: bool = False
) -> tuple[list[ProjectionRecord], RenderableType]:
    """The projection of every record of the engine on an emulated cluster, and both side by side. Raises
    UsageError when there are none."""
    rows = compare(measured)
    return emulated_records(rows), _shown(tables.EMULATION_COLUMNS, tables.emulation_rows(rows), markdown)


def _shown(columns: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool) -> RenderableType:
    if markdown:
        return Text(tables.markdown(columns, rows) + "\n", overflow="ignore", no_wrap=True)
    return tables.table_of(columns, rows, "projected")


def plan(model: str, cluster: str, gpus: int, global_batch: int | None) -> tuple[RenderableType, str]:
    """The fastest configurations as a table and as JSON. Raises UsageError when nothing fits."""
    found = make_plan(model, cluster, gpus, global_batch)
    content = {
        "evidence": "projected",
        "fastest": [
            {"choice": asdict(item.choice), "reason": item.reason, **asdict(record_of(item.projection))}
            for item in found.fastest
        ],
        "lost": list(found.lost),
        "tried": found.tried,
        "out_of_memory": found.out_of_memory,
    }
    return Group(tables.plan_table(found), Text(tables.plan_text(found))), json.dumps(content)


def to_json(rows: Sequence[ProjectionRecord]) -> str:
    """One object: the record, or all of them as `records`."""
    lines = [records.to_json(row) for row in rows]
    return lines[0] if len(lines) == 1 else '{"records": [' + ", ".join(lines) + "]}"
