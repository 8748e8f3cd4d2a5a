"""One cohort as a file: what a job is told to do, and what it answers.

Beside `<number>.json`, the task, a job leaves `<number>.result.json` when it is through, whole or not at
all, and keeps what it has finished so far in the folder `<number>`, from where a job that Slurm starts
anew goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from suite.config_load import load
from suite.errors import RankError, UsageError
from suite.harness.doctor import Finding
from suite.harness.launch import Place
from suite.harness.measure import Failure
from suite.harness.sweep import Cohort, Progress, run_sweep
from suite.records import RECORDS, AnyRecord, from_json, read, to_json
from suite.secrets import mask


@dataclass
class Result:
    """Of one task."""

    records: list[AnyRecord] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)


def write_task(path: Path, cohort: Cohort) -> None:
    """Configurations are written whole, so that presets may change while the job waits."""
    write_whole(
        path, {"stage": cohort.stage, "kind": cohort.kind, "cells": [asdict(cell) for cell in cohort.cells]}
    )


def read_task(path: Path) -> Cohort:
    """Raises UsageError when there is none."""
    try:
        content = json.loads(path.read_text())
        return Cohort(content["stage"], content["kind"], [load(cell) for cell in content["cells"]])
    except (OSError, ValueError, KeyError, TypeError, UsageError) as error:
        raise UsageError(
            f"{path} is not a task of this version's `suite sweep` ({error}); remove its folder to go on "
            "without it"
        ) from error


def result_file(task: Path) -> Path:
    return task.with_suffix(".result.json")


def run_task(task: Path, place: Place, observe: Callable[[Progress], None]) -> Result:
    """Runs what the task's folder does not hold yet, and leaves the result."""
    cohort, folder = read_task(task), task.with_suffix("")
    outcome = run_sweep([cohort], folder, observe, place=place)
    result = Result(read(folder / RECORDS), outcome.failures)
    failures = [
        {
            "cell": cohort.cells.index(failure.config),
            "error": mask(str(failure.error)),
            "rank": getattr(failure.error, "rank", None),
            "details": mask(failure.error.details),
        }
        for failure in result.failures
    ]
    write_whole(result_file(task), {"records": [*map(to_json, result.records)], "failures": failures})
    return result


def examine_task(task: Path, findings: list[Finding]) -> Result:
    """Leaves what `suite doctor --cluster` has found as the task's result."""
    write_whole(result_file(task), {"findings": [asdict(finding) for finding in findings]})
    return Result(findings=findings)


def read_result(task: Path) -> Result | None:
    """None while there is none."""
    file = result_file(task)
    if not file.exists():
        return None
    content = json.loads(file.read_text())
    cells = read_task(task).cells
    failures = [
        Failure(cells[item["cell"]], RankError(item["error"], item["rank"], item["details"]))
        for item in content.get("failures", [])
    ]
    records = [*map(from_json, content.get("records", []))]
    return Result(records, failures, [Finding(**item) for item in content.get("findings", [])])


def write_whole(path: Path, content: Any) -> None:
    """As JSON: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    with unfinished.open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
