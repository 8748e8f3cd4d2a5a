"""All timed runs as TensorBoard event files, a folder per run."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

from suite.errors import UsageError
from suite.records import AnyRecord, Record
from suite.reports.cohorts import flat, runs_of
from suite.reports.metrics import STEP, per_step, summary

MISSING = "TensorBoard files need the package tensorboard: pip install tensorboard"


def export_tensorboard(records: Iterable[AnyRecord], folder: Path) -> list[Path]:
    """Writes `folder/STAGE/IMPL-...` per run (its curves, and configuration and results for the HPARAMS
    tab) and returns these folders. Raises UsageError without the package, or when there are no runs."""
    runs = runs_of(records)
    if not runs:
        raise UsageError("there are no timed runs among these results; TensorBoard shows nothing else")
    if importlib.util.find_spec("tensorboard") is None:
        raise UsageError(MISSING)
    return [_write(run, folder / _name(run)) for run in runs]


def _name(run: Record) -> str:
    """Says what it is and is its own: the same configuration may be measured in several cohorts."""
    taken = re.sub(r"\D", "", run.started_at)
    words = (run.impl, run.workload, run.precision, f"{run.nodes}x{run.ranks_per_node}", run.evidence)
    place = re.sub(r"[^\w.-]+", "-", run.stage or "run")
    return f"{place}/{'-'.join(words)}-{run.config_hash[:8]}-{taken}"


def _write(run: Record, folder: Path) -> Path:
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    taken = datetime.fromisoformat(run.started_at).timestamp()
    for earlier in folder.glob("events.out.tfevents.*") if folder.exists() else ():
        earlier.unlink()  # written again, not twice
    with SummaryWriter(str(folder)) as writer:
        for row in per_step(run):
            step = int(row.pop(STEP))
            for name, value in row.items():
                writer.add_scalar(name, value, step, walltime=taken)
        results = {
            f"result/{key}": float(value)
            for key, value in flat(summary(run)).items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        for part in hparams({key: _plain(value) for key, value in flat(run.config).items()}, results):
            writer.file_writer.add_summary(part, walltime=taken)
        for name, value in results.items():
            writer.add_scalar(name, value, len(run.losses), walltime=taken)
        writer.add_text("notes", "\n\n".join([f"evidence: {run.evidence}", *run.notes]), walltime=taken)
    return folder


def _plain(value: object) -> bool | int | float | str:
    return value if isinstance(value, (bool, int, float)) else str(value)
