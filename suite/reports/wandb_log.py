"""Logs finished runs to Weights & Biases, one W&B run per record.

W&B is given a process of its own: it starts threads, and the process that measures forks its ranks
and must stay free of them. Whatever happens there, the results on disk are safe and the caller gets
one line to show.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from suite.records import Record, read
from suite.reports.cohorts import flat

RECORDS = "records.jsonl"
MARKER = "logged.jsonl"
"""Says which records of a folder were logged: one JSON object per line."""

TIMEOUT_S = 120.0


def log_records(
    directory: Path,
    mode: str = "offline",
    entity: str | None = None,
    project: str = "sharded-data-parallel",
    group: str | None = None,
    timeout_s: float = TIMEOUT_S,
) -> str | None:
    """Logs the runs of `directory/records.jsonl` that were not logged before; `group` is the folder's
    name unless given. W&B's own files go to `directory/wandb/`.

    `mode` is `offline` (needs no account and no network), `online` or `disabled`. Returns None, or
    one line that says why runs were not logged. Never raises for what W&B does.
    """
    if mode == "disabled" or not (directory / RECORDS).exists():
        return None
    if importlib.util.find_spec("wandb") is None:
        return "not logged to W&B: the package is not installed (pip install wandb, or wandb.mode=disabled)"
    # In one word each: a name may begin with a dash.
    words = [f"--mode={mode}", f"--project={project}", f"--group={group or directory.resolve().name}"]
    if entity:
        words.append(f"--entity={entity}")
    return _run_apart([str(directory.resolve()), *words], timeout_s)


def _run_apart(arguments: list[str], timeout_s: float) -> str | None:
    """Runs this module in a session of its own, so that W&B's helper processes end with it."""
    again = "the next call tries again"
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "suite.reports.wandb_log", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=_quiet_environment(arguments),
            start_new_session=True,
        )
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return f"not logged to W&B: no answer within {timeout_s:g} s; {again}"
        finally:
            _end_session(process)
        if status == 0:
            return None
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines() or [f"exit status {status}"]
        return f"not logged to W&B: {lines[-1][:200]}; {again}"


def _end_session(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _quiet_environment(arguments: list[str]) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    # Error reporting would send W&B's own failures over the network, also when offline.
    return {**os.environ, "PYTHONPATH": path, "WANDB_SILENT": "true", "WANDB_ERROR_REPORTING": "false"}


def main() -> None:
    """The child's program."""
    parser = argparse.ArgumentParser(prog="suite.reports.wandb_log", description=__doc__)
    parser.add_argument("directory", type=Path)
    for option in ("--mode", "--project", "--group"):
        parser.add_argument(option, required=True)
    parser.add_argument("--entity")
    given = parser.parse_args()
    logged = _logged(given.directory / MARKER)
    for record in read(given.directory / RECORDS):
        if isinstance(record, Record) and _identity(record) not in logged:
            _log(record, given)
            _mark(given.directory / MARKER, record)


def _log(record: Record, given: argparse.Namespace) -> None:
    import wandb

    run = wandb.init(
        dir=given.directory,
        mode=given.mode,
        entity=given.entity,
        project=given.project,
        group=given.group,
        job_type=record.impl,
        name=f"{record.impl} {record.workload} {record.precision}",
        # The same record gets the same id: logging it again cannot make a second run.
        id="-".join(_identity(record)).translate(str.maketrans(":+.", "---")),
        tags=[record.testbed, record.evidence],
        config=record.config,
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
    )
    run.define_metric("train/step")
    run.define_metric("*", step_metric="train/step")
    for row in _per_step(record):
        run.log(row)
    run.summary.update(_summary(record))
    run.finish()


def _per_step(record: Record) -> list[dict[str, float]]:
    """Warm-up steps have a loss and a gradient norm but no time."""
    warmup = len(record.losses) - len(record.step_times_s)
    rows = []
    for index, (loss, grad_norm) in enumerate(zip(record.losses, record.grad_norms, strict=True)):
        row: dict[str, float | None] = {"train/loss": loss, "train/grad_norm": grad_norm}
        if index >= warmup:
            row["perf/step_time_s"] = record.step_times_s[index - warmup]
        rows.append(
            {"train/step": index + 1, **{key: value for key, value in row.items() if value is not None}}
        )
    return rows


def _summary(record: Record) -> dict[str, Any]:
    """The record as a row; the curves and the configuration are logged as such."""
    apart = ("config", "losses", "grad_norms", "step_times_s")
    return flat({key: value for key, value in asdict(record).items() if key not in apart})


def _identity(record: Record) -> tuple[str, str]:
    return record.config_hash, record.started_at


def _logged(marker: Path) -> set[tuple[str, str]]:
    if not marker.exists():
        return set()
    items = (json.loads(line) for line in marker.read_text().splitlines() if line.endswith("}"))
    return {(item["config_hash"], item["started_at"]) for item in items}


def _mark(marker: Path, record: Record) -> None:
    config_hash, started_at = _identity(record)
    with marker.open("a") as file:
        file.write(json.dumps({"config_hash": config_hash, "started_at": started_at}) + "\n")


if __name__ == "__main__":
    main()
