"""A sweep whose cohorts run as tasks of Slurm jobs: submitted, followed, collected.

A call that finds jobs of an earlier one (its terminal was closed, say) collects what they have finished and
follows what still runs, before it submits the rest.
"""

from __future__ import annotations

import fcntl
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from suite.errors import RankError, SuiteError, UsageError
from suite.harness.measure import Failure
from suite.harness.slurm_jobs import JOBS, Task, close_tasks, open_tasks, submit
from suite.harness.sweep import (
    Clock,
    Cohort,
    Outcome,
    Progress,
    cells,
    finished_in,
    identity,
    require_all,
    unfinished,
)
from suite.harness.task import Result, read_result
from suite.records import RECORDS, AnyRecord, append, read
from suite.testbeds import slurm

GRACE_S = 20.0
"""How long a result may be late on a shared file system after Slurm says that its task has ended."""

SILENCE_S = 900.0
"""How long Slurm may fail to answer before following it is given up; the jobs run on even then."""

Keep = Callable[[Sequence[AnyRecord]], None]
"""Receives the records of a task that is through."""


def run_on_slurm(
    cohorts: Sequence[Cohort], out: Path, observe: Callable[[Progress], None] = lambda _: None
) -> Outcome:
    """As `suite.harness.sweep.run_sweep`, on the nodes of a Slurm cluster. Blocks until all tasks have
    ended; KeyboardInterrupt cancels them, and what was finished is kept."""
    require_slurm(cohorts)
    with _alone_in(out / JOBS):
        return _run(cohorts, out, observe)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Two that follow the same jobs would collect them twice."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UsageError(
                f"another `suite sweep` follows the jobs in {folder}; wait for it, or name another --out"
            ) from error
        yield


def _run(cohorts: Sequence[Cohort], out: Path, observe: Callable[[Progress], None]) -> Outcome:
    records, outcome = out / RECORDS, Outcome()

    def keep(found: Sequence[AnyRecord]) -> None:
        # All or none are added, but a collection may have been interrupted before it was noted.
        done = finished_in(records)
        known = {(identity(record), record.started_at) for record in read(records)}
        fresh = [
            record
            for record in found
            if identity(record) not in done and (identity(record), record.started_at) not in known
        ]
        if fresh:
            append(records, *fresh)
        outcome.finished += fresh

    earlier = []
    for task in open_tasks(out):
        result = read_result(task.file)
        if result is None:
            earlier.append(task)
        else:
            keep(result.records)
    tasks = _still_queued(earlier)
    for task in earlier:
        if task not in tasks:
            keep(_finished_by(task))
    finished = finished_in(records)
    underway = {
        (task.cohort.kind, task.cohort.stage, cell.hash()) for task in tasks for cell in task.cohort.cells
    }
    todo = unfinished(cohorts, finished | underway)
    outcome.finished = [record for record in outcome.finished if identity(record) in finished]
    skipped = cells(unfinished(cohorts, underway)) - cells(todo) - len(outcome.finished)
    outcome.skipped = max(0, skipped)  # what was collected may be another sweep's
    clock = Clock(cells(todo) + sum(len(task.cohort.cells) for task in tasks), observe)
    tasks += submit(todo, out, True, {task.job for task in tasks}) if todo else []
    _follow(tasks, outcome, keep, clock)
    close_tasks(out)
    return outcome


def run_once(cohort: Cohort, out: Path, observe: Callable[[Progress], None]) -> Result:
    """One cohort, whatever has been measured before; the caller keeps the records. The job's files stay
    in `out/jobs`."""
    require_slurm([cohort])
    outcome = Outcome()
    (task,) = submit([cohort], out, resumable=False)
    _follow([task], outcome, outcome.finished.extend, Clock(len(cohort.cells), observe))
    return read_result(task.file) or Result(failures=outcome.failures)


def require_slurm(cohorts: Sequence[Cohort]) -> None:
    """Raises UsageError for what would only fail in the job, and when there is no Slurm."""
    require_all(cohorts)
    reason = slurm.why_not()
    if reason is not None:
        raise UsageError(f"testbed=slurm cannot submit jobs here: {reason}")


def _still_queued(tasks: Sequence[Task]) -> list[Task]:
    if not tasks:
        return []
    known = slurm.states({task.job for task in tasks})
    found = [(task, known.get((task.job, task.number))) for task in tasks]
    # One that is being cleaned up after (its cancellation, say) will not begin anything any more.
    return [task for task, state in found if state and not state.ended and state.name != "COMPLETING"]


def _follow(tasks: list[Task], outcome: Outcome, keep: Keep, clock: Clock) -> None:
    started = heard = time.monotonic()
    try:
        while tasks:
            try:
                known = slurm.states({task.job for task in tasks})
            except SuiteError as error:  # a controller that is restarted, say; the jobs run on
                if time.monotonic() > heard + SILENCE_S:
                    raise
                clock.say(str(error))
                time.sleep(10.0)
                continue
            heard = time.monotonic()
            tasks = [task for task in tasks if not _settled(task, known, outcome, keep, clock)]
            clock.say(_summary(tasks, known))
            if tasks:
                time.sleep(min(10.0, 1.0 + (time.monotonic() - started) / 60))
    except KeyboardInterrupt as stop:
        if signal.SIGHUP not in stop.args:  # a terminal that goes away is no wish to end the jobs
            slurm.cancel({task.job for task in tasks})
        for task in tasks:
            keep(_finished_by(task))
        raise


def _settled(
    task: Task,
    known: dict[tuple[str, int], slurm.State],
    outcome: Outcome,
    keep: Keep,
    clock: Clock,
) -> bool:
    """Whether nothing more is to be expected of the task; its result or its failure is in the outcome."""
    result = read_result(task.file)
    if result is not None:
        keep(result.records)
        outcome.failures += result.failures
    else:
        state = known.get((task.job, task.number))
        if state is not None and not state.ended:
            task.ended = None
            return False
        task.ended = task.ended or time.monotonic()
        if time.monotonic() < task.ended + GRACE_S and not (state and state.name == "CANCELLED"):
            return False
        error, finished = _lost(task, state), _finished_by(task)
        keep(finished)
        missing = unfinished([task.cohort], {identity(record) for record in finished})
        outcome.failures += [Failure(cell, error) for cohort in missing for cell in cohort.cells]
    clock.finished(len(task.cohort.cells), task.cohort.title())
    return True


def _finished_by(task: Task) -> list[AnyRecord]:
    """What the task has recorded, whether it came to its end or not."""
    result = read_result(task.file)
    return result.records if result is not None else read(task.file.with_suffix("") / RECORDS)


def _lost(task: Task, state: slurm.State | None) -> RankError:
    """The task ended without a result: its last words."""
    lines = task.log.read_text(errors="replace").splitlines() if task.log.exists() else []
    said = [line for line in lines if line.startswith("suite: ")] or [line for line in lines if line.strip()]
    last = said[-1].removeprefix("suite: ") if said else "it printed nothing"
    how = state.name if state is not None else "unknown to Slurm by now"
    return RankError(
        f"job {task.job}_{task.number} ended without a result ({how}): {last}; see {task.log}",
        details="\n".join(lines[-30:]),
    )


def _summary(tasks: Iterable[Task], known: dict[tuple[str, int], slurm.State]) -> str:
    """`2 running, 1 pending (Resources)`."""
    states = [known.get((task.job, task.number)) for task in tasks]
    counts = Counter(
        "ending"
        if state is None
        else state.name.lower() + (f" ({state.reason})" if state.name == "PENDING" else "")
        for state in states
    )
    return "Slurm: " + (", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "done")
