"""Slurm jobs in a results folder: `jobs/<name>/` holds what was submitted, and receives what the jobs leave.

Of every task: `<number>.json` (what to do), `<number>.log`, and what `suite.harness.task` describes.
"""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from suite.errors import SuiteError, UsageError, first_line
from suite.harness.sweep import Cohort
from suite.harness.task import read_task, write_task, write_whole
from suite.testbeds import slurm

JOBS = "jobs"
OPEN = "open.json"
"""In a job's folder: job id -> its tasks, as long as they have not been collected."""


@dataclass
class Task:
    """One submitted cohort. `job` is Slurm's id; `ended` when the queue was first seen to know no more of
    it (monotonic seconds)."""

    file: Path
    job: str
    cohort: Cohort
    ended: float | None = None

    @property
    def number(self) -> int:
        return int(self.file.stem)

    @property
    def log(self) -> Path:
        return self.file.with_suffix(".log")


def scripts(cohorts: Sequence[Cohort], out: Path) -> list[str]:
    """What would be submitted for these cohorts."""
    folder = (out / JOBS / "NAME").resolve()
    return [array.script() for array, _ in _arrays(cohorts, folder)]


def _arrays(cohorts: Sequence[Cohort], folder: Path) -> Iterator[tuple[slurm.JobArray, list[Cohort]]]:
    """A job array's tasks all take equally many nodes and ask Slurm for the same: one array for each such
    request, in order of size."""

    def request(cohort: Cohort) -> tuple[int, int, str]:
        cell = cohort.cells[0]
        testbed = cell.testbed
        words = (testbed.max_nodes, testbed.partition, testbed.time_limit, testbed.sbatch)
        return cell.world_size // cell.ranks_per_node, cell.ranks_per_node, str(words)

    first = 1
    for (nodes, ranks_per_node, _), group in groupby(sorted(cohorts, key=request), key=request):
        members = list(group)
        testbed = members[0].cells[0].testbed
        last = first + len(members) - 1
        yield (
            slurm.JobArray(
                folder,
                first,
                last,
                nodes,
                ranks_per_node,
                None if testbed.max_nodes is None else testbed.max_nodes // nodes,
                testbed.partition,
                testbed.time_limit,
                testbed.sbatch,
            ),
            members,
        )
        first = last + 1


def submit(cohorts: Sequence[Cohort], out: Path, resumable: bool, queued: Collection[str] = ()) -> list[Task]:
    """Writes tasks and scripts and submits the arrays; with `testbed.max_nodes` one after the other, and
    after the `queued` jobs, for the limit holds for all of them together."""
    folder = _new_folder(out)
    tasks: list[Task] = []
    jobs: dict[str, list[int]] = {}
    try:
        for array, members in _arrays(cohorts, folder):
            numbers = list(range(array.first, array.last + 1))
            files = [folder / f"{number}.json" for number in numbers]
            for file, cohort in zip(files, members, strict=True):
                write_task(file, cohort)
            script = folder / f"job-{array.first}.sh"
            script.write_text(array.script())
            before = list(jobs)[-1:] or sorted(queued)
            job = slurm.submit(script, after=before if array.at_once is not None else [])
            jobs[job] = numbers
            if resumable:
                write_whole(folder / OPEN, jobs)
            tasks += [Task(file, job, cohort) for file, cohort in zip(files, members, strict=True)]
    except BaseException:
        slurm.cancel(jobs)
        shutil.rmtree(folder)
        raise
    return tasks


def close_tasks(out: Path) -> None:
    """All open tasks have been collected."""
    for file in (out / JOBS).glob(f"*/{OPEN}"):
        file.unlink()


def _new_folder(out: Path) -> Path:
    name = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    for suffix in ("", *(f"-{number}" for number in range(2, 100))):
        folder = (out / JOBS / f"{name}{suffix}").resolve()
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        return folder
    raise SuiteError(f"cannot make a new folder in {out / JOBS}")


def _jobs_in(file: Path) -> dict[str, list[int]]:
    try:
        jobs = json.loads(file.read_text())
        return {str(job): [int(number) for number in numbers] for job, numbers in jobs.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{file} is damaged ({first_line(error)}); remove it to go on without its jobs"
        ) from error


def open_tasks(out: Path) -> Iterator[Task]:
    for file in sorted((out / JOBS).glob(f"*/{OPEN}")):
        for job, numbers in _jobs_in(file).items():
            for number in numbers:
                task = (file.parent / f"{number}.json").resolve()
                yield Task(task, job, read_task(task))
