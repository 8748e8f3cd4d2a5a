"""Logs finished results to Weights & Biases: a W&B run per record, and one that compares them.

W&B is given processes of its own: it starts threads, and the process that measures forks its ranks
and must stay free of them. Everything is written offline first, which needs nobody; `online` then sends
it. Whatever happens there, the results on disk are safe and the caller gets one line to show.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from suite.config import WandbConfig
from suite.records import RECORDS
from suite.reports.apart import run_apart

TIMEOUT_S, TIMEOUT_PER_RECORD_S = 120.0, 4.0
"""How long writing may take; on a slow host a record takes about a second, and its share of the figures."""
SYNC_TIMEOUT_S = 60.0
"""How long a command waits, when its results are safe, for a server that does not answer."""


def log_records(
    directory: Path,
    wandb: WandbConfig,
    compare: bool = False,
    group: str | None = None,
    timeout_s: float | None = None,
    sync_timeout_s: float = SYNC_TIMEOUT_S,
) -> str | None:
    """Logs the runs of `directory/records.jsonl` that were not logged before and, with `compare`, the
    comparison of all of them; `group` is the folder's name unless given. W&B's own files go to
    `directory/wandb/`.

    `wandb.mode` is `offline` (needs no account and no network), `online` (then sends them) or `disabled`.
    Returns None, or one line that says what was not logged or sent and what to do. Never raises for what
    W&B does.
    """
    if wandb.mode == "disabled" or not (directory / RECORDS).exists():
        return None
    if importlib.util.find_spec("wandb") is None:
        return "not logged to W&B: the package is not installed (pip install wandb, or wandb.mode=disabled)"
    # In one word each: a name may begin with a dash.
    words = [str(directory.resolve()), f"--project={wandb.project}"]
    words += [f"--group={group or directory.resolve().name}"]
    words += [f"--entity={wandb.entity}"] if wandb.entity else []
    words += ["--compare"] if compare else []
    if timeout_s is None:
        timeout_s = TIMEOUT_S + TIMEOUT_PER_RECORD_S * (directory / RECORDS).read_bytes().count(b"\n")
    written = run_apart(["suite.reports.wandb_runs", *words], directory, timeout_s)
    if not written.ok:
        return f"not logged to W&B: {written.line}; the next call tries again"
    return _send(directory, sync_timeout_s) if wandb.mode == "online" else None


def sync_command(directory: Path) -> str:
    """What sends the offline runs of a result folder."""
    return f"wandb sync {directory}/wandb"


def _send(directory: Path, timeout_s: float) -> str | None:
    """Sends what was not sent before. W&B marks a run that it has sent; its command's status says less."""
    sent = run_apart(["wandb", "sync", str(directory / "wandb")], directory, timeout_s)
    if all(list(run.glob("*.synced")) for run in (directory / "wandb").glob("offline-run-*")):
        return None
    return f"kept here, not sent to W&B: {sent.line}; later: {sync_command(directory)}"
