"""Runs a program that uses W&B in a process of its own, for a limited time, with nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

KEY = "WANDB_API_KEY"


@dataclass(frozen=True)
class Done:
    """How a program ended, and the line of its output that says the most."""

    ok: bool
    line: str


def run_apart(arguments: Sequence[str], directory: Path, timeout_s: float) -> Done:
    """Runs `python -m ...` in a session of its own, so that W&B's helper processes end with it; what they
    write besides (logs, what is staged for artifacts) goes to `directory/wandb`.
    Never raises for what the program does."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(directory),
            start_new_session=True,
        )
        try:
            status = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return Done(False, f"no answer within {timeout_s:g} s")
        finally:
            _end_session(process)
        output.seek(0)
        lines = output.read().decode(errors="replace").strip().splitlines()
    errors = [line for line in lines if " ERROR " in line]
    shown = (errors or lines or [f"exit status {status}"])[-1]
    return Done(status == 0, _without_key(shown)[:200])


def _end_session(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _without_key(text: str) -> str:
    key = os.environ.get(KEY)
    return text.replace(key, "***") if key else text


def _environment(directory: Path) -> dict[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    staged = str((directory / "wandb" / "staged").resolve())
    quiet = {"WANDB_SILENT": "true", "NO_COLOR": "1"}
    # Error reporting would send W&B's own failures over the network, also when offline.
    return {
        **os.environ,
        **quiet,
        "PYTHONPATH": path,
        "WANDB_DIR": str(directory.resolve()),
        "WANDB_DATA_DIR": staged,
        "WANDB_ERROR_REPORTING": "false",
    }
