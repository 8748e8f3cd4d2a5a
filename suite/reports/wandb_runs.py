"""The program that talks to W&B, started by `wandb_log`: writes offline runs, one per record.

Only this process logs, when everything was measured: the ranks know nothing of W&B, so nothing of
theirs is there twice. W&B's own system metrics would describe this process and are off; what the ranks
used (memory, bytes, noise) is in each run's summary.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from suite.records import RECORDS, AnyRecord, Record, read
from suite.reports.cohorts import runs_of
from suite.reports.metrics import STEP, per_step, summary
from suite.reports.sections.runs import evidence_of

MARKER = "logged.jsonl"
"""Says which records of a folder were logged: one JSON object per line."""
COMPARISON = "comparison"


def main() -> None:
    parser = argparse.ArgumentParser(prog="suite.reports.wandb_runs", description=__doc__)
    parser.add_argument("directory", type=Path)
    for option in ("--project", "--group"):
        parser.add_argument(option, required=True)
    parser.add_argument("--entity")
    parser.add_argument("--compare", action="store_true")
    given = parser.parse_args()
    marker = given.directory / MARKER
    records, logged = read(given.directory / RECORDS), _logged(marker)
    for record in runs_of(records):
        if _identity(record) not in logged:
            _log_run(record, given)
            _mark(marker, _identity(record))
    whole = _all_of(records)
    if given.compare and records and whole not in logged:
        _log_comparison(records, whole[1], given)
        _mark(marker, whole)


def _log_run(record: Record, given: argparse.Namespace) -> None:
    run = _start(
        given,
        job_type=record.impl,
        name=f"{record.impl} {record.workload} {record.precision}",
        # The same record gets the same id: logging it again cannot make a second run.
        id="-".join(_identity(record)).translate(str.maketrans(":+./", "----")),
        tags=[record.testbed, record.evidence],
        config=record.config,
    )
    run.define_metric(STEP)
    run.define_metric("*", step_metric=STEP)
    for row in per_step(record):
        run.log(row)
    run.summary.update(summary(record))
    run.finish()


def _log_comparison(records: Sequence[AnyRecord], digest: str, given: argparse.Namespace) -> None:
    """All results beside each other: tables to filter, and the report with its figures as an artifact.
    An offline run refers to an artifact's files, so they stay where they are."""
    import wandb

    from suite.reports.build import build_report, main_tables
    from suite.reports.descriptions import registered
    from suite.reports.timelines import read_timelines

    place = given.directory / "wandb" / "reports" / digest
    page = build_report(records, place, registered(), read_timelines([given.directory]))
    run = _start(
        given,
        job_type=COMPARISON,
        name=f"{given.group} {COMPARISON}",
        id=f"{COMPARISON}-{digest}",
        tags=sorted({run.testbed for run in runs_of(records)} | set(evidence_of(records))),
        config={"results": len(records)},
    )
    for name, table in main_tables(records):
        rows = [[cell.text if cell.value is None else cell.value for cell in row] for row in table.rows]
        run.log({f"table/{name}": wandb.Table(columns=list(table.head), data=rows, allow_mixed_types=True)})
    artifact = wandb.Artifact(f"{COMPARISON}-{digest}", type="report")
    for file in sorted(path for path in page.parent.rglob("*") if path.is_file()):
        artifact.add_file(str(file), name=str(file.relative_to(page.parent)), policy="immutable")
    run.log_artifact(artifact, aliases=["latest", given.group])
    run.finish()


def _start(given: argparse.Namespace, **about: Any) -> Any:
    import wandb

    return wandb.init(
        dir=given.directory,
        mode="offline",
        entity=given.entity,
        project=given.project,
        group=given.group,
        settings=wandb.Settings(
            console="off",
            silent=True,
            save_code=False,
            disable_git=True,
            host="",
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_save_requirements=False,
        ),
        **about,
    )


def _identity(record: Record) -> tuple[str, str]:
    """The same configuration may have been started in several cohorts within one second."""
    return record.config_hash, record.cohort or record.started_at


def _all_of(records: Sequence[AnyRecord]) -> tuple[str, str]:
    """Changes when a result is added."""
    parts = sorted(f"{record.schema} {record.config_hash} {record.started_at}" for record in records)
    return COMPARISON, hashlib.sha256("\n".join(parts).encode()).hexdigest()[:12]


def _logged(marker: Path) -> set[tuple[str, str]]:
    if not marker.exists():
        return set()
    items = (json.loads(line) for line in marker.read_text().splitlines() if line.endswith("}"))
    return {(item["config_hash"], item["cohort"]) for item in items}


def _mark(marker: Path, identity: tuple[str, str]) -> None:
    config_hash, cohort = identity
    with marker.open("a") as file:
        file.write(json.dumps({"config_hash": config_hash, "cohort": cohort}) + "\n")


if __name__ == "__main__":
    main()
