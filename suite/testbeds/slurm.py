"""Slurm: the script of a job array that starts torchrun on the nodes, and what the queue says about it.

No shell text is made from configuration values without quoting; what a task has to do stands in a JSON
file that its number names.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from suite.errors import SuiteError, UsageError
from suite.secrets import names_a_secret

ROOT = Path(__file__).resolve().parents[2]
COMMAND_TIMEOUT_S = 60.0

_FREE_PORT = "import socket; s = socket.create_server(('', 0)); print(s.getsockname()[1])"

_ENDED = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"),
    *("BOOT_FAIL", "DEADLINE", "PREEMPTED", "REVOKED"),
}


@dataclass(frozen=True)
class JobArray:
    """Tasks `first` to `last`, each on equally many whole nodes. `folder` (absolute, on a file system that
    the nodes share) holds a file `<number>.json` per task and receives `<number>.log`. `at_once` bounds
    the tasks that run at the same time; `options` are further ones of sbatch's."""

    folder: Path
    first: int
    last: int
    nodes: int
    ranks_per_node: int
    at_once: int | None = None
    partition: str | None = None
    time_limit: str | None = None
    options: Sequence[str] = ()

    def script(self) -> str:
        """What sbatch gets; it may also be submitted by hand."""
        settings = [
            "--job-name=suite",
            f"--array={self.first}-{self.last}{f'%{self.at_once}' if self.at_once is not None else ''}",
            f"--nodes={self.nodes}",
            "--ntasks-per-node=1",
            "--exclusive",
            "--requeue",
            "--open-mode=append",
            f"--output={str(self.folder).replace('%', '%%')}/%a.log",
        ]
        settings += [f"--partition={self.partition}"] if self.partition is not None else []
        settings += [f"--time={_minutes(self.time_limit)}"] if self.time_limit is not None else []
        settings += self.options
        python, folder = shlex.quote(sys.executable), shlex.quote(str(self.folder))
        return "\n".join(
            [
                "#!/bin/bash",
                *(f"#SBATCH {shlex.quote(setting)}" for setting in settings),
                "set -euo pipefail",
                f"cd {shlex.quote(os.getcwd())}",  # where relative paths of the configuration begin
                f'export PYTHONPATH={shlex.quote(str(ROOT))}"${{PYTHONPATH:+:$PYTHONPATH}}"',
                'nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
                "head=$(scontrol show node --oneliner \"${nodes%%$'\\n'*}\")",
                "head=${head#* NodeAddr=}; head=${head%% *}",
                f"port=$({python} -c {shlex.quote(_FREE_PORT)})",
                'exec srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_ON_NODE" --cpu-bind=none '
                "--kill-on-bad-exit=1 \\",
                f'    {python} -m torch.distributed.run --nnodes="$SLURM_JOB_NUM_NODES" '
                f"--nproc-per-node={self.ranks_per_node} --max-restarts=0 \\",
                '    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" --rdzv-endpoint="$head:$port" \\',
                f'    -m suite.cli task {folder}/"$SLURM_ARRAY_TASK_ID".json',
                "",
            ]
        )


def _minutes(time_limit: str) -> int:
    """Of `testbed.time_limit`: `90m`, `2h`, `1d`."""
    return int(time_limit[:-1]) * {"m": 1, "h": 60, "d": 24 * 60}[time_limit[-1]]


@dataclass(frozen=True)
class State:
    """Of a task: Slurm's name for it, and why it waits."""

    name: str
    reason: str

    @property
    def ended(self) -> bool:
        return self.name in _ENDED


def submit(script: Path, after: Sequence[str] = ()) -> str:
    """The new job's id; `after`: the jobs that have to end first. Raises SuiteError with Slurm's words."""
    dependency = [f"--dependency=afterany:{':'.join(after)}"] if after else []
    return _slurm("sbatch", "--parsable", *dependency, str(script)).strip().partition(";")[0]


def states(jobs: Iterable[str]) -> dict[tuple[str, int], State]:
    """By job and task number; tasks that Slurm has forgotten (minutes after their end) are not there."""
    jobs = list(jobs)
    if not jobs:
        return {}
    words = ("--noheader", "--array", "--states=all", f"--jobs={','.join(jobs)}", "--format=%i|%T|%r")
    try:
        listed = _slurm("squeue", *words)
    except SuiteError as error:
        if "Invalid job id" in str(error):
            return {}
        raise
    found = {}
    for line in listed.splitlines():
        identity, name, reason = line.strip().split("|", 2)
        job, _, task = identity.partition("_")
        if task.isdigit():
            found[job, int(task)] = State(name, reason)
    return found


def cancel(jobs: Iterable[str]) -> None:
    jobs = list(jobs)
    if jobs:
        _slurm("scancel", *jobs)


def why_not() -> str | None:
    """What keeps this machine from submitting jobs; None when nothing does."""
    missing = [tool for tool in ("sbatch", "squeue", "scancel", "scontrol") if shutil.which(tool) is None]
    if missing:
        return f"the command {missing[0]!r} is missing; install Slurm's client, or go to a login node"
    try:
        _slurm("sinfo", "--noheader", "--format=%P")
    except SuiteError as error:
        return str(error)
    return None


def _slurm(*command: str) -> str:
    """What a Slurm command prints. Raises SuiteError with its own message."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
            env=_job_environment(os.environ.items()),
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError as error:
        raise UsageError(f"testbed=slurm needs the command {command[0]!r}; install Slurm's client") from error
    except subprocess.TimeoutExpired as error:
        raise SuiteError(f"{command[0]} did not answer within {COMMAND_TIMEOUT_S:g} s") from error
    if done.returncode != 0:
        message = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[0]
        raise SuiteError(f"{command[0]} failed: {message}")
    return done.stdout


def _job_environment(variables: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Ours, which jobs inherit, without secrets, and without what an allocation around us says about
    itself (it would win over the script)."""
    ours = ("SLURM_CONF", "SLURM_CLUSTERS")
    return {
        name: value
        for name, value in variables
        if name in ours or not (name.startswith("SLURM_") or names_a_secret(name))
    }
